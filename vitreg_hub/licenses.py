"""Whose weights may be published: a license comes from the source, or from whoever takes the responsibility."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from vitreg_hub.errors import LicenseError

UNKNOWN, OTHER = "unknown", "other"
"""The Hub's identifiers for a license that nobody knows, which a user may say too, and for one without identifier."""

NAMELESS = frozenset(
    {"", UNKNOWN, OTHER, "none", "null", "na", "n-a", "no-license", "unlicensed", "public-domain", "creative-commons"}
)
"""What stands where a license should, and names none."""

IDENTIFIERS = frozenset(
    """
    apache-2.0 mit openrail openrail++ bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr isc h-research intel-research lppl-1.3c ms-pl apple-ascl
    apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
    """.split()  # noqa: SIM905
)
"""The only values of `license` in a card that the Hub takes. Source: huggingface.co/docs/hub/repositories-licenses."""

NONCOMMERCIAL = re.compile(
    r"(^|.*-)(by)?nc([-\d].*|$)|.*no(n|t|t-for)?-?commercial.*|.*research.*|apple-amlr|deepfloyd-if.*|seer-license"
)
"""Names of licenses that are taken to forbid commercial use: those whose names say so, and besides Apple's AMLR,
DeepFloyd's, and SEER's, which timm names. Licenses with other names are not looked into."""

SEPARATORS = re.compile(r"[\s_/\u2010-\u2015-]+")
"""What people write for the hyphens of an identifier."""
NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*")
"""Close to what the Hub takes as `license_name`."""


def is_noncommercial(license: str) -> bool:
    """Whether a license forbids commercial use, as far as its name tells."""
    return NONCOMMERCIAL.fullmatch(_spelled(license)) is not None


def metadata(license: str | None) -> dict[str, str]:
    """How a card's metadata tells a license: the Hub refuses cards with other values than its own.

    Returns:
        Keyword arguments of `huggingface_hub.ModelCardData`.
    """
    if license is None:
        return {"license": UNKNOWN}
    return {"license": license} if license in IDENTIFIERS else {"license": OTHER, "license_name": license}


def told_by(config: Mapping[str, Any], card: Path, *, header: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The licenses that a repository's files tell, spelled as the Hub does, each once.

    Args:
        config: config.json of timm, or of a bundle; those of other libraries tell none.
        card: README.md; need not exist, and tells nothing if its metadata cannot be read.
        header: Texts by name in the header of a .safetensors file.
    """
    cfg, ours = config.get("pretrained_cfg"), config.get("vitreg")
    origin = ours.get("provenance") if isinstance(ours, Mapping) else None
    found = [part.get("license") for part in (cfg, origin, header) if isinstance(part, Mapping)]
    try:
        data = (metadata_load(card) or {}) if card.is_file() else {}
    except (yaml.YAMLError, ValueError):
        data = {}
    named = data.get("license")
    if named == OTHER:
        named = data.get("license_name")
    found += named if isinstance(named, list) else [named]
    names = (_spelled(name) for name in found if isinstance(name, str))
    return tuple(dict.fromkeys(name for name in names if name not in NAMELESS))


def settle(told: str | Sequence[str] | None, given: str | None, *, called: str) -> str | None:
    """Decide under which license weights go on.

    Args:
        told: What the source says: an identifier of the Hub or another name, or several where its files differ.
        given: What the user says; "unknown" goes on without knowing, where the source does not tell either.
        called: The source, for messages.

    Returns:
        The identifier in lower case and with hyphens; None if nobody knows.

    Raises:
        LicenseError: Nobody says; or it is a non-commercial one and the user does not say so too; or the two differ; or
            the user's is misspelled.
    """
    names = [told] if isinstance(told, str) else told or ()
    told = sorted({_spelled(name) for name in names} - NAMELESS)
    given = None if given is None else _spelled(given)
    if given is not None and given not in told:
        _require_spelled(given)
    if not told:
        if not given:
            raise LicenseError(
                f"nothing tells the license of {called}: give it with --license, as the Hub spells it "
                "(apache-2.0, mit, cc-by-nc-4.0, ..., the own name of one that it does not list, or unknown)."
            )
        return None if given == UNKNOWN else given
    if len(told) > 1 and given not in told:
        raise LicenseError(f"{called} names several licenses, {', '.join(told)}: say with --license which one holds.")
    if given in told:
        return given
    (license,) = told
    if given and given != UNKNOWN:
        raise LicenseError(
            f"the license of {called} is {license}, not {given}: leave --license out, or correct what the source says."
        )
    if is_noncommercial(license):
        raise LicenseError(
            f"the license of {called} is {license}, which does not allow every use: go on with --license {license} if "
            "yours is one that it does."
        )
    return license


def _require_spelled(name: str) -> None:
    """Refuse what is no name, or nearly one of the Hub's identifiers; a license that the Hub does not list is let pass.

    Raises:
        LicenseError: With the nearest identifiers.
    """
    if name in NAMELESS - {UNKNOWN}:
        raise LicenseError(
            f"--license {name or repr(name)} names no license: give it as the Hub spells it (apache-2.0, cc0-1.0, ...) "
            "or by its own name, or say unknown."
        )
    if name in IDENTIFIERS:
        return
    if not NAME.fullmatch(name):
        raise LicenseError(f"{name!r} is no license identifier: give one as the Hub spells it, such as apache-2.0.")
    letters = {_letters(known): known for known in sorted(IDENTIFIERS)}
    near = [known for squeezed, known in letters.items() if squeezed.startswith(_letters(name))]
    near = near or [letters[found] for found in difflib.get_close_matches(_letters(name), letters, n=1, cutoff=0.9)]
    if near:
        raise LicenseError(f"--license {name} is not how the Hub spells it: did you mean {', '.join(near[:4])}?")


def _spelled(name: str) -> str:
    """A name in lower case and with hyphens, as the Hub's identifiers are spelled."""
    return SEPARATORS.sub("-", name.strip().lower()).strip("-")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.replace("license", ""))
