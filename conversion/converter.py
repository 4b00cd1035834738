"""A checkpoint becomes a bundle."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vitreg_hub import environment
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Conversion, Provenance
from vitreg_hub.conversion.checkpoint.opening import checksums, open_checkpoint
from vitreg_hub.conversion.checkpoint.safetensors_writer import write_safetensors
from vitreg_hub.conversion.formats.clip import TEXT_TOWER
from vitreg_hub.conversion.formats.detect import find_format
from vitreg_hub.conversion.planning.choices import Request
from vitreg_hub.conversion.planning.plan import make_plan
from vitreg_hub.conversion.reference import measure
from vitreg_hub.conversion.text_tower import tower_config, write_towers
from vitreg_hub.errors import ConversionError
from vitreg_hub.files import CARD_FILE, CONFIG_FILE, TOWER_SUFFIX, WEIGHTS_FILE, new_folder, require_absent
from vitreg_hub.licenses import settle, stated_licenses
from vitreg_hub.model_cards.card import render
from vitreg_hub.model_cards.facts import KEPT_TOWER


def convert(
    source: str | Path,
    out: str | Path | None = None,
    *,
    format: str = "auto",
    weights: str | None = None,
    arch: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_registers: int | None = None,
    num_heads: int | None = None,
    act: str | None = None,
    license: str | None = None,
    text_tower: bool = False,
    verify: bool = False,
) -> ModelBundle:
    """Convert a checkpoint to a bundle, exactly, or refuse it.

    Tensors are read one at a time and written to a folder that appears when it is complete.

    Args:
        source: A weights file, a folder, or ``hf-hub:org/name[@revision]``.
        out: New folder for the bundle; without it the bundle is only held in memory.
        format: One of `vitreg_hub.conversion.formats.detect.FORMATS`, by default recognised from the checkpoint.
        weights: Which of several sets of weights in the file: "ema" for averaged ones, "raw" for others, or a key of
            the file or prefix of names, such as ``state_dict_ema`` or ``model.encoder``. By default the averaged ones,
            as timm does, if there are any.
        arch: Row of the table, which must fit the tensors; it tells heads and activation where these cannot.
        img_size: Side, or height and width, in pixels: stores the position table that the lineage itself would make for
            that size, so that plain timm is exact there too.
        num_registers: Registers for a checkpoint without any, drawn from N(0, 0.02^2) and untrained.
        num_heads: Attention heads, where neither tensors nor config tell.
        act: "gelu" or "quick_gelu", where neither tensors nor config tell.
        license: The Hub's identifier of the weights' license, where the source does not name one, or names one that
            does not allow every use; "unknown" goes on without knowing.
        text_tower: Whether OpenCLIP's whole model, both towers, is also written to ``{out}-open_clip``, from where
            `open_clip` loads it (needs the extra ``clip``).
        verify: Whether to measure the difference to a reference implementation on a fixed input.

    Returns:
        The bundle; its report is `ConversionReport.of(bundle)`.

    Raises:
        BundleError: `out` exists or cannot be written.
        ConversionError: The checkpoint fits no format, is ambiguous, or no bundle can hold it.
        HubError: No such repository, no permission, or no network.
        LicenseError: The license is unknown, or it does not allow every use and `license` does not say so.
        UnknownArchError: The table has no row `arch`.
    """
    start = time.perf_counter()
    target = None if out is None else Path(out)
    if text_tower and target is None:
        raise ConversionError("a text tower is kept beside the bundle: give `out`.")
    beside = target.with_name(f"{target.name}{TOWER_SUFFIX}") if text_tower and target else None
    for folder in filter(None, (target, beside)):
        require_absent(folder)
    holds_both_towers = text_tower or (format != "auto" and find_format(format).has_text_tower)
    checkpoint = open_checkpoint(source, prefer="open_clip" if holds_both_towers else "", weights=weights or "")
    request = Request(
        format=format,
        arch=arch,
        img_size=(img_size, img_size) if isinstance(img_size, int) else img_size,
        num_registers=num_registers,
        num_heads=num_heads,
        act=act,
    )
    with checksums(checkpoint.files) as sha256:
        plan = make_plan(checkpoint, request)
        towers = tower_config(plan) if text_tower else None
        told = stated_licenses(checkpoint.config, checkpoint.folder / CARD_FILE, header=checkpoint.metadata)
        license = settle(told, license, called=checkpoint.called)

        def finished(state_dict: Mapping[str, Tensor]) -> ModelBundle:
            dropped = plan.dropped()
            if towers:
                dropped = {KEPT_TOWER if why == TEXT_TOWER else why: names for why, names in dropped.items()}
            report = Conversion(
                source=checkpoint.source,
                sha256=_sorted(sha256()),
                format=plan.tensors.fmt.name,
                arch=plan.config.arch,
                num_mapped=len(checkpoint.infos) - sum(map(len, dropped.values())),
                dropped=_sorted(dropped),
                network=_sorted(plan.network()),
                license=license,
                notes=(*plan.notes(), *_license_notes(told, license)),
                untrained_registers=plan.num_untrained_registers,
                measured=_sorted(measure(plan, state_dict)) if verify else {},
            )
            provenance = Provenance(
                origin=f"converted from {report.source} ({plan.tensors.fmt.title})",
                license=license,
                made=report,
                **environment.made_with("safetensors"),
                created=environment.now(),
                seconds=round(time.perf_counter() - start, 2),
            )
            bundle = ModelBundle.of(replace(plan.config, provenance=provenance), state_dict)
            bundle.require_consistent()
            return bundle

        if target is None:
            return finished({name: plan.make(name).clone() for name in plan.wanted})

        with new_folder(target) as staging:
            write_safetensors(staging / WEIGHTS_FILE, plan.wanted, plan.make)
            bundle = finished(load_file(staging / WEIGHTS_FILE))
            (staging / CONFIG_FILE).write_text(bundle.text(), encoding="utf-8")
            (staging / CARD_FILE).write_text(render(bundle), encoding="utf-8")
            if towers and beside:  # last: both folders appear, or none
                write_towers(beside, checkpoint, towers)
    return ModelBundle.load(target)


def _sorted(found: Mapping[str, Any]) -> dict[str, Any]:
    """In the order that config.json has, so that a card is the same before and after loading."""
    return dict(sorted(found.items()))


def _license_notes(told: Sequence[str], license: str | None) -> Iterator[str]:
    if len(told) > 1:
        yield f"the license is as asked for: the source names {' and '.join(told)}"
    elif not told and license:
        yield "the license is as asked for: the source tells none"
