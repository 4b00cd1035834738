"""The parts of a card about what a model is, how to use it and what it is for."""

from vitreg_hub import licenses
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.files import TOWER_SUFFIX
from vitreg_hub.model_cards.facts import (
    EMBEDDINGS,
    FEATURES,
    KEPT_TOWER,
    LOGITS,
    Tokens,
    count,
    in_words,
    measured_on,
    objective_of,
    output,
    scores,
)

PAPER = "[Darcet et al., ICLR 2024](https://arxiv.org/abs/2309.16588)"

TIMM_USAGE = """\
```python
{imports}

model = timm.create_model("{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
images = transform(Image.open("photo.jpg").convert("{mode}")).unsqueeze(0)
with torch.inference_mode():
    tokens = model.forward_features(images)  # {tokens}: {kinds}
    {output}
```"""

TRANSFORMERS_USAGE = """\
```python
{imports}

processor = AutoImageProcessor.from_pretrained({name})
model = AutoModel.from_pretrained({name}).eval()
with torch.inference_mode():
    inputs = processor(Image.open("photo.jpg").convert("{mode}"), return_tensors="pt")
    outputs = model(**inputs)
tokens = outputs.last_hidden_state  # {tokens}: {kinds}{classify}
```"""

CLASSIFY = """

classifier = AutoModelForImageClassification.from_pretrained({name}).eval()
with torch.inference_mode():
    logits = classifier(**inputs).logits  # [1, {num_classes}]"""

PLUGIN_USAGE = """\
```python
{imports}

{folder}processor = AutoImageProcessor.from_pretrained({name})
model = AutoModel.from_pretrained({name}).eval()
with torch.inference_mode():
    inputs = processor(Image.open("photo.jpg").convert("{mode}"), return_tensors="pt")
    outputs = model(**inputs, output_hidden_states=True)
{lines}{classify}
```"""

INSTALL = "`pip install vitreg_hub`"

CITATION = """\
## Citation

Registers in Vision Transformers are due to:

```bibtex
@inproceedings{darcet2024vision,
  title={Vision Transformers Need Registers},
  author={Darcet, Timoth{\\'e}e and Oquab, Maxime and Mairal, Julien and Bojanowski, Piotr},
  booktitle={International Conference on Learning Representations},
  year={2024}
}
```"""


def summary(bundle: ModelBundle, *, title: str) -> str:
    """Title, and what the model is."""
    args, origin = bundle.model_args, bundle.provenance
    _, height, width = bundle.preprocess.input_size
    params = sum(tensor.numel() for tensor in bundle.state_dict.values())
    size = f"{params / 1e6:.1f} M" if params >= 1e6 else f"{params / 1e3:.1f} K"
    measured = ", ".join(f"{in_words(bundle, name)} {value:.4f}" for name, value in scores(bundle)) or "not measured"
    number = bundle.num_registers
    head = ""
    if output(bundle) == EMBEDDINGS:
        head = f" Its head projects onto embeddings of width {bundle.num_classes:,}."
    return f"""\
# {title}

A Vision Transformer with {count(number, "register") if number else "no registers"} (`{bundle.arch}`): {size} \
parameters, {count(args["depth"], "block")} of width {args["embed_dim"]:,} with \
{count(args["num_heads"], "attention head")}, patches of {count(args["patch_size"], "pixel")}, images of {height} x \
{width} pixels.{head}

- **Origin:** {origin.origin}
- **Measured:** {measured}
- **License:** {origin.license or licenses.UNKNOWN}"""


def usage(bundle: ModelBundle, *, repo: str, revision: str | None = None, towers: bool | None = None) -> str:
    """Code for timm and for transformers, without and with this package; arguments as of `card.render`."""
    facts = _usage_facts(bundle)
    plugin = "import vitreg_hub  # before models are loaded"
    in_timm = f"hf-hub:{repo}" + (f"@{revision}" if revision else "")
    name = f'"{repo}"' + (f', revision="{revision}"' if revision else "")
    parts = [
        "## Usage",
        "### timm",
        TIMM_USAGE.format(imports=_imports("import timm"), name=in_timm, **facts),
        "### transformers",
        TRANSFORMERS_USAGE.format(
            imports=_imports(_from_transformers(bundle)), name=name, classify=_classify(bundle, name), **facts
        ),
        f"With `import vitreg_hub` before ({INSTALL}), `AutoModel` gives the same numbers, and more:",
        _plugin_usage(bundle, imports=_imports(plugin, _from_transformers(bundle)), name=name),
    ]
    if towers is None:
        conversion, objective = bundle.provenance.conversion, objective_of(bundle.provenance.run)
        kept = conversion is not None and KEPT_TOWER in conversion.dropped
        towers = kept or (objective is not None and objective.text_tower)
    if towers:
        parts += ["### open_clip", _towers(repo + TOWER_SUFFIX, revision)]
    return "\n\n".join(parts)


def _towers(repo: str, revision: str | None) -> str:
    branch = f" (branch `{revision}`)" if revision else ""
    return (
        f"This is the image tower. For zero-shot classification, open_clip finds it with its text tower in `{repo}`"
        f"{branch}."
    )


def usage_of_shipped(bundle: ModelBundle, *, name: str) -> str:
    """The same for weights that are part of this package, under the name by which timm then knows them."""
    timm_code = TIMM_USAGE.format(
        imports=_imports("import timm", "import vitreg_hub"), name=name, **_usage_facts(bundle)
    )
    imports = f"{_imports(_from_transformers(bundle))}\n\nfrom vitreg_hub.timm_models import SHIPPED_WEIGHTS"
    code = _plugin_usage(bundle, imports=imports, name="folder", folder=f'folder = SHIPPED_WEIGHTS / "{name}"\n')
    about = "The weights are part of this package, as a bundle:"
    return "\n\n".join(
        ["## Usage", f"It needs this package: {INSTALL}.", "### timm", timm_code, "### transformers", about, code]
    )


def _plugin_usage(bundle: ModelBundle, *, imports: str, name: str, folder: str = "") -> str:
    kinds = {word: number for number, word in Tokens.of(bundle).kinds}
    width, depth = bundle.model_args["embed_dim"], bundle.model_args["depth"]
    shapes = {"register_tokens": kinds.get("register"), "patch_tokens": kinds["patch"]}
    lines = [f"{name} = outputs.{name}  # [1, {number}, {width}]" for name, number in shapes.items() if number]
    lines.append(f"hidden_states = outputs.hidden_states  # {depth + 1}: before the first block and after each")
    return PLUGIN_USAGE.format(
        imports=imports,
        name=name,
        folder=folder,
        mode=_mode(bundle),
        lines="\n".join(lines),
        classify=_classify(bundle, name),
    )


def _from_transformers(bundle: ModelBundle) -> str:
    classifier = ", AutoModelForImageClassification" if output(bundle) == LOGITS else ""
    return f"from transformers import AutoImageProcessor, AutoModel{classifier}"


def _classify(bundle: ModelBundle, name: str) -> str:
    return CLASSIFY.format(name=name, num_classes=bundle.num_classes) if output(bundle) == LOGITS else ""


def _imports(*lines: str) -> str:
    """Import statements with those of torch and Pillow."""
    lines = (*lines, "import torch", "from PIL import Image")
    return "\n".join(sorted(lines, key=lambda line: (line.startswith("from"), line.lower())))


def _mode(bundle: ModelBundle) -> str:
    return "L" if bundle.preprocess.input_size[0] == 1 else "RGB"


def _usage_facts(bundle: ModelBundle) -> dict[str, str]:
    tokens = Tokens.of(bundle)
    name = output(bundle)
    width = tokens.width if name == FEATURES else bundle.num_classes
    return {
        "mode": _mode(bundle),
        "tokens": f"[1, {tokens.num}, {tokens.width}]",
        "kinds": tokens.words,
        "output": f"{name} = model(images)  # [1, {width}]",
    }


def what_registers_are() -> str:
    """A section that holds for every model."""
    return (
        "## Registers\n\n"
        "Registers are learnable input tokens that give a Vision Transformer room for global information, so that it "
        "does not store it in background patches, whose tokens then have high norms; what comes out of them is not "
        f"used ({PAPER})."
    )


def registers(bundle: ModelBundle) -> str:
    """What registers are, and those of this model."""
    number, prefix = bundle.num_registers, Tokens.of(bundle).num_prefix
    lines = [what_registers_are(), ""]
    if not number:
        lines.append(
            "**This model has none.** Where a model without registers stores global information in patches, those "
            "tokens tell less of their own place, which dense tasks need; what was measured of this one stands under "
            "Artifacts."
        )
        return "\n".join(lines)
    first = prefix - number
    where = f"token {first}" if number == 1 else f"tokens {first} to {prefix - 1}"
    lines.append(
        f"**This model has {number}:** {where} of the output, counted from 0. The patches are `tokens[:, {prefix}:]`."
    )
    conversion = bundle.provenance.conversion
    if conversion and conversion.untrained_registers:
        lines += [
            "",
            f"**{conversion.untrained_registers} of the registers are new and untrained: they can cost accuracy until "
            "they are trained; how much was not measured.**",
        ]
    return "\n".join(lines)


def limits(bundle: ModelBundle) -> str:
    """What the model is for, and what it cannot do."""
    args, images = bundle.model_args, bundle.preprocess
    channels, height, width = images.input_size
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (images.mean, images.std))
    told = f" ({_few(bundle.label_names)})" if bundle.label_names else ""
    lines = [
        {
            LOGITS: f"Classifies images into {bundle.num_classes:,} classes{told}; its tokens are features for other "
            "tasks.",
            EMBEDDINGS: f"Gives embeddings of width {bundle.num_classes:,}, to be compared with those of its text "
            "tower; its tokens are features for other tasks. It has no classification head.",
            FEATURES: "Gives features, for a head that is trained on top; it has no classification head of its own.",
        }[output(bundle)]
    ]
    lines.append(
        f"Takes images of {height} x {width} pixels with {count(channels, 'channel')}, of mean {mean} and standard "
        f"deviation {std}; `img_size` and `dynamic_img_size` of timm allow other sides that are multiples of "
        f"{args['patch_size']} pixels. What it gives there was not measured."
    )
    lines += [text for part, value in bundle.untold if (text := part.limits(value))]
    found = measured_on(bundle)
    if scores(bundle) and found:
        lines.append(f"Was measured on {found.words} alone; nothing is known of other images, or of biases.")
    else:
        lines.append("What it can do was not measured, and neither were biases.")
    lines.append(_license_limits(bundle.provenance.license))
    return "\n".join(["## Intended use and limits", "", *(f"- {line}" for line in lines)])


def _license_limits(license: str | None) -> str:
    if license in (None, licenses.UNKNOWN, licenses.OTHER):
        return "The license of these weights is not known: ask whoever made them before you use them."
    if licenses.is_noncommercial(license):
        return f"The license, {license}, does not allow every use: commercial use is excluded or restricted."
    return f"The license is {license}."


def _few(names: tuple[str, ...], most: int = 10) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, ..."
