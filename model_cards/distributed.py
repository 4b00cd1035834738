"""Cards of the models that this project distributes, in the folder `cards`: generated, never written by hand."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import timm
from huggingface_hub import ModelCardData
from timm.models import PretrainedCfg

from vitreg_hub import licenses
from vitreg_hub.analysis.measures import analyze
from vitreg_hub.arch import get_arch
from vitreg_hub.bundle.doors import verify
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.files import EXTRA_FILES
from vitreg_hub.model_cards import description
from vitreg_hub.model_cards.artifacts import record, record_doors
from vitreg_hub.model_cards.card import blocks_of
from vitreg_hub.model_cards.facts import in_words, scores
from vitreg_hub.model_cards.merging import MODEL_INDEX, front_matter
from vitreg_hub.model_cards.metadata import TAGS, metadata
from vitreg_hub.tags import DINOV2, SHIPPED_WEIGHTS

CARDS = Path(__file__).parent / "cards"
WEIGHTS = "../../vitreg_hub/weights"
"""The shipped bundles, as seen from `CARDS` in a checkout."""
DINOV2_TAG = "dinov2_lvd142m"
IMAGES = "digits"
"""What the artifacts of shipped models are measured on: the images that they were not trained on."""
NONE = "not measured"

DINOV2_CARD = """\
# DINOv2 with registers

Meta's DINOv2 Vision Transformers with four registers, as timm distributes them. This project only refers to these
weights: it gives them names of its own, ships none of them and has measured nothing on them.

| name | repository on the Hub | parameters | width / depth / heads | license |
|---|---|---|---|---|
{rows}

{facts}

## Usage

{usage}

`ModelBundle.load("{name}").save("folder")` makes a bundle of them, which transformers opens too.

{registers}

## Results

Not measured.

## Artifacts

Not measured. `vitreg analyze {name}` does it.

{citation}
"""


def distributed_cards() -> dict[str, str]:
    """The text of every card by the name of its file, from the bundles in the package and timm's table."""
    shipped = {folder.name: ModelBundle.load(folder) for folder in sorted(SHIPPED_WEIGHTS.glob("*.*"))}
    cards = {f"{name}.md": _shipped_card(name, shipped) for name in shipped}
    return cards | {f"{DINOV2_TAG}.md": _dinov2_card()}


def write_cards() -> None:
    """Write the cards where they belong."""
    for name, text in distributed_cards().items():
        (CARDS / name).write_text(text, encoding="utf-8")


def measure_shipped() -> None:
    """Measure the artifacts of the shipped models and open them through every door; their bundles keep both."""
    for folder in sorted(SHIPPED_WEIGHTS.glob("*.*")):
        record(folder, analyze(str(folder), IMAGES), card=False)
        record_doors(folder, verify(folder), card=False)


def _shipped_card(name: str, shipped: Mapping[str, ModelBundle]) -> str:
    bundle, beside = shipped[name], f"{WEIGHTS}/{name}/"
    files = [file for file in EXTRA_FILES if (SHIPPED_WEIGHTS / name / file).is_file()]
    data = metadata(bundle, name)
    for result in data[MODEL_INDEX][0]["results"] if MODEL_INDEX in data else ():
        del result["source"]  # there is no repository to point to
    usage = description.usage_of_shipped(bundle, name=name)
    blocks = blocks_of(bundle, title=name, usage=usage, files=files, folder=beside)
    blocks["results"] += f"\n\n{_comparison(shipped)}"
    return front_matter(data) + "\n" + "\n\n".join(part for part in blocks.values() if part) + "\n"


def _comparison(shipped: Mapping[str, ModelBundle]) -> str:
    """The shipped models side by side."""
    told = {metric: in_words(bundle, metric) for bundle in shipped.values() for metric, _ in scores(bundle)}
    metrics = dict(sorted(told.items()))
    titles = ("model", "registers", *metrics.values(), "outliers", "class token's attention on registers")
    rows = []
    for name, bundle in sorted(shipped.items(), key=lambda item: item[1].num_registers):
        found, measured = bundle.provenance.artifacts, dict(scores(bundle))
        outliers = attention = NONE
        if found:
            block = found.block
            outliers = f"{100 * found.outlier_fraction[block]:.3g} % in block {block}"
            of_class = next(mass for mass in found.attention if mass.source == "class")
            if bundle.num_registers:
                attention = f"{100 * of_class.to_registers:.3g} % in block {block}"
            else:
                attention = "no registers"
        values = (f"{measured[metric]:.4f}" if metric in measured else NONE for metric in metrics)
        rows.append((f"[{name}]({name}.md)", str(bundle.num_registers), *values, outliers, attention))
    lines = ["## With and without registers", "", _row(titles), "|---" * len(titles) + "|", *map(_row, rows)]
    return "\n".join([*lines, "", "One run of each: small differences may be chance."])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _dinov2_card() -> str:
    names = list(DINOV2)
    cfgs = [cfg for name in names if (cfg := timm.get_pretrained_cfg(name))]
    specs = [get_arch(name.partition(".")[0]) for name in names]
    rows = [
        _row(
            (
                f"`{name}`",
                f"[{cfg.hf_hub_id}](https://huggingface.co/{cfg.hf_hub_id})",
                f"{spec.num_params / 1e6:,.1f} M",
                f"{spec.embed_dim:,} / {spec.depth} / {spec.num_heads}",
                cfg.license or licenses.UNKNOWN,
            )
        )
        for name, cfg, spec in zip(names, cfgs, specs, strict=True)
    ]
    facts = {_image_facts(cfg, patch=spec.patch_size) for cfg, spec in zip(cfgs, specs, strict=True)}
    (license,) = {cfg.license for cfg in cfgs}  # the card tells one for all
    spec = specs[0]
    data = ModelCardData(
        base_model=[cfg.hf_hub_id for cfg in cfgs if cfg.hf_hub_id],
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=[*TAGS, *(spec.name for spec in specs)],
        **licenses.metadata(license),
    )
    return f"{front_matter(data.to_dict())}\n" + DINOV2_CARD.format(
        rows="\n".join(rows),
        facts="\n".join(facts),
        name=names[0],
        usage=description.TIMM_USAGE.format(
            imports=description.import_lines("import timm", "import vitreg_hub"),
            name=names[0],
            mode="RGB",
            tokens=f"[1, {1 + spec.num_registers + spec.num_patches}, {spec.embed_dim}]: class token, "
            f"{spec.num_registers} registers, {spec.num_patches:,} patches",
            output=f"features = model(images)  # [1, {spec.embed_dim}]",
        ),
        registers=description.what_registers_are(),
        citation=description.CITATION,
    )


def _image_facts(cfg: PretrainedCfg, *, patch: int) -> str:
    mean, std = (", ".join(map(str, values)) for values in (cfg.mean, cfg.std))
    return (
        f"Patches have {patch} pixels. Images have {cfg.input_size[1]} x {cfg.input_size[2]} pixels, mean {mean} and "
        f"standard deviation {std}, resized by {cfg.interpolation} interpolation. There is no classification head."
    )
