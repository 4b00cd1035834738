"""A checkpoint becomes a bundle."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from vitreg_hub.bundle import ModelBundle
from vitreg_hub.bundle_form import Provenance, config_text, require_absent, write_folder
from vitreg_hub.conversion.choices import Request
from vitreg_hub.conversion.plan import Plan, make_plan
from vitreg_hub.conversion.reference import measure
from vitreg_hub.conversion.report import ConversionReport
from vitreg_hub.conversion.source import Checkpoint, checksums, open_checkpoint
from vitreg_hub.conversion.stream import write_safetensors
from vitreg_hub.conversion.text_tower import TextTower
from vitreg_hub.errors import ConversionError
from vitreg_hub.hub_access import CARD_FILE, CONFIG_FILE, HUB_PREFIX, TOWER_SUFFIX, WEIGHTS_FILE
from vitreg_hub.model_cards.card import render


def convert(
    source: str | Path,
    out: str | Path | None = None,
    *,
    format: str = "auto",
    arch: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_registers: int | None = None,
    num_heads: int | None = None,
    act: str | None = None,
    text_tower: bool = False,
    verify: bool = False,
) -> ModelBundle:
    """Convert a checkpoint to a bundle, exactly, or refuse it.

    Tensors are read one at a time and written to a folder that appears when it is complete.

    Args:
        source: A weights file, a folder, or ``hf-hub:org/name[@revision]``.
        out: New folder for the bundle; without it the bundle is only held in memory.
        format: Name of a format in `vitreg_hub.conversion.formats.FORMATS`; found from the tensors' names by default.
        arch: Row of the table, which must fit the tensors; it tells heads and activation where these cannot.
        img_size: Side, or height and width, in pixels: bakes the lineage's own position table for that size in, so that
            plain timm is exact there too.
        num_registers: Registers for a checkpoint without any, drawn from N(0, 0.02^2) and untrained.
        num_heads: Attention heads, where neither tensors nor config tell.
        act: "gelu" or "quick_gelu", where neither tensors nor config tell.
        text_tower: Whether OpenCLIP's whole model, both towers, is written beside the bundle, to ``{out}-open_clip``,
            from where `open_clip` loads it (needs the extra ``clip``).
        verify: Whether to measure the difference to a reference implementation on a fixed input.

    Returns:
        The bundle; its report is `ConversionReport.of(bundle)`.

    Raises:
        BundleError: `out` exists or cannot be written.
        ConversionError: The checkpoint fits no format, is ambiguous, or no bundle can hold it.
        HubError: No such repository, no permission, or no network.
        UnknownArchError: `arch` is in no row.
    """
    target = None if out is None else Path(out)
    if text_tower and target is None:
        raise ConversionError("a text tower is kept beside the bundle: give `out`.")
    beside = target.with_name(f"{target.name}{TOWER_SUFFIX}") if text_tower else None
    for folder in (target, beside):
        if folder is not None:
            require_absent(folder)
    checkpoint = open_checkpoint(source, prefer="open_clip" if text_tower or format.startswith("openclip") else "")
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    request = Request(
        format=format, arch=arch, img_size=size, num_registers=num_registers, num_heads=num_heads, act=act
    )
    with checksums(checkpoint.files) as sha256:
        plan = make_plan(checkpoint, request)
        tower = TextTower.of(checkpoint, plan) if text_tower else None
        if target is None:
            state_dict = {name: plan.assembly.make(name).clone() for name in plan.assembly.wanted}
            return _finished(checkpoint, plan, state_dict, sha256(), verify=verify)

        def fill(staging: Path) -> None:
            write_safetensors(staging / WEIGHTS_FILE, plan.assembly.wanted, plan.assembly.make)
            bundle = _finished(checkpoint, plan, load_file(staging / WEIGHTS_FILE), sha256(), verify=verify)
            (staging / CONFIG_FILE).write_text(config_text(bundle.config()))
            (staging / CARD_FILE).write_text(render(bundle))
            if tower:  # last: both folders appear, or none
                tower.write(beside)

        write_folder(target, fill)
    return ModelBundle.load(target)


def _finished(
    checkpoint: Checkpoint, plan: Plan, state_dict: Mapping[str, Tensor], sha256: Mapping[str, str], *, verify: bool
) -> ModelBundle:
    """The bundle of a plan and its weights, with the report."""
    called = checkpoint.called
    # the folder of a file is nobody's business
    source = called if called.startswith(HUB_PREFIX) else Path(called).resolve().name
    dropped = {**plan.assembly.tensors.dropped, **plan.assembly.lost()}
    report = ConversionReport(
        source=source,
        sha256=sha256,
        format=plan.fmt.name,
        arch=plan.spec.name,
        num_mapped=len(checkpoint.infos) - sum(map(len, dropped.values())),
        dropped=dropped,
        notes=plan.notes,
        untrained_registers=plan.assembly.num_untrained_registers,
        network=plan.network(),
        measured=measure(checkpoint, plan, state_dict) if verify else {},
    )
    libraries = ("vitreg_hub", "torch", "timm", "safetensors")
    provenance = Provenance(
        origin=f"converted from {source} ({plan.fmt.title})",
        license=plan.license,
        settings=report.as_settings(),
        versions={name: version(name) for name in libraries},
    )
    bundle = plan.bundle(state_dict, provenance)
    bundle.require_consistent()
    return bundle
