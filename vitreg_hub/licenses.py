"""Whose weights may be published: a license comes from the source, or from whoever takes the responsibility."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitreg_hub.bounded import read_metadata, read_small
from vitreg_hub.errors import LicenseError

UNKNOWN, OTHER = "unknown", "other"
"""The Hub's identifiers for an unknown license, which a user may give too, and for one that it does not list."""

NAMELESS = frozenset(
    {"", UNKNOWN, OTHER, "none", "null", "na", "n-a", "no-license", "unlicensed", "public-domain", "creative-commons"}
)
"""What people write in place of a license without naming one."""

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
"""The only values of `license` that the Hub accepts in a card (huggingface.co/docs/hub/repositories-licenses)."""

NONCOMMERCIAL = re.compile(
    r"(^|.*-)(by)?nc([-\d].*|$)|.*no(n|t|t-for)?-?commercial.*|.*research.*|apple-amlr|deepfloyd-if.*|seer-license"
)
"""Licenses that are taken to forbid commercial use: those whose names say so, and Apple's, DeepFloyd's and SEER's."""

SEPARATORS = re.compile(r"[\s_/\u2010-\u2015-]+")
"""What people write for the hyphens of an identifier."""
NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*")
"""Close to what the Hub accepts as `license_name`."""


def is_noncommercial(license: str) -> bool:
    """Whether a license forbids commercial use, judging by its name."""
    return NONCOMMERCIAL.fullmatch(_spelled(license)) is not None


def metadata(license: str | None) -> dict[str, Any]:
    """A license as `huggingface_hub.ModelCardData` takes it: the Hub refuses cards with values other than its own."""
    if license is None:
        return {"license": UNKNOWN}
    return {"license": license} if license in IDENTIFIERS else {"license": OTHER, "license_name": license}


def stated_licenses(
    config: Mapping[str, Any], card: Path, *, header: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """The licenses that a repository's files state, spelled as the Hub does, each once.

    Args:
        config: config.json of timm, or of a bundle; those of other libraries state none.
        card: README.md, if it exists and its metadata can be read.
        header: The metadata in the header of a .safetensors file.
    """
    cfg, ours = config.get("pretrained_cfg", config), config.get("vitreg")  # older ones of timm have one level
    origin = ours.get("provenance") if isinstance(ours, Mapping) else None
    found = [part.get("license") for part in (cfg, origin, header) if isinstance(part, Mapping)]
    try:
        data = read_metadata(read_small(card).decode()) if card.is_file() else {}
    except ValueError:
        data = {}
    data = data if isinstance(data, Mapping) else {}
    named = data.get("license")
    if named == OTHER:
        named = data.get("license_name")
    found += named if isinstance(named, list) else [named]
    names = (_spelled(name) for name in found if isinstance(name, str))
    return tuple(dict.fromkeys(name for name in names if name not in NAMELESS))


def settle(stated: str | Sequence[str] | None, given: str | None, *, called: str) -> str | None:
    """Decide which license weights carry from here on.

    Args:
        stated: By the source: an identifier of the Hub or another name, or several where its files differ.
        given: By the user; "unknown" accepts that the source states none.

    Returns:
        The identifier in lower case and with hyphens; None if it is unknown.

    Raises:
        LicenseError: None is stated; or it is a non-commercial one and the user does not agree to it; or source and
            user contradict each other; or the user's is misspelled.
    """
    names = [stated] if isinstance(stated, str) else stated or ()
    stated = sorted({_spelled(name) for name in names} - NAMELESS)
    given = None if given is None else _spelled(given)
    if given is not None and given not in stated:
        _require_spelled(given)
    if not stated:
        if not given:
            raise LicenseError(
                f"no license is stated for {called}: give it with --license, as the Hub spells it (apache-2.0, mit, "
                "cc-by-nc-4.0, ...), or by its own name if the Hub does not list it, or say unknown."
            )
        return None if given == UNKNOWN else given
    if given in stated:
        return given
    if len(stated) > 1:
        raise LicenseError(f"{called} names several licenses, {', '.join(stated)}: say with --license which one holds.")
    (license,) = stated
    if given and given != UNKNOWN:
        raise LicenseError(
            f"the license of {called} is {license}, not {given}: leave --license out, or correct what the source says."
        )
    if is_noncommercial(license):
        raise LicenseError(
            f"the license of {called} is {license}, which does not allow every use: go on with --license {license} if "
            "it allows yours."
        )
    return license


def _require_spelled(name: str) -> None:
    """Refuse what names no license or misspells one of the Hub's; names that the Hub does not list may pass."""
    if name in NAMELESS - {UNKNOWN}:
        raise LicenseError(
            f"--license {name or repr(name)} names no license: give it as the Hub spells it (apache-2.0, cc0-1.0, ...) "
            "or by its own name, or say unknown."
        )
    if name in IDENTIFIERS:
        return
    if not NAME.fullmatch(name):
        raise LicenseError(f"{name!r} is not a license identifier: give one as the Hub spells it, such as apache-2.0.")
    letters = {_letters(known): known for known in sorted(IDENTIFIERS)}
    near = [known for squeezed, known in letters.items() if squeezed.startswith(_letters(name))]
    if near:
        raise LicenseError(f"--license {name} is not how the Hub spells it: did you mean {', '.join(near[:4])}?")


def _spelled(name: str) -> str:
    """A name in lower case and with hyphens, as the Hub's identifiers are spelled."""
    return SEPARATORS.sub("-", name.strip().lower()).strip("-")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.replace("license", ""))
