"""The parts of a card about what a model is, how to use it and what it is for."""

from vitreg_hub import licenses
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.files import TOWER_SUFFIX
from vitreg_hub.model_cards.facts import (
    EMBEDDINGS,
    FEATURES,
    KEPT_TOWER,
    LOGITS,
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
    tokens = model.forward_features(images)  # {tokens}
    {output}
```"""

TRANSFORMERS_USAGE = """\
```python
{imports}

{before}processor = AutoImageProcessor.from_pretrained({name})
model = AutoModel.from_pretrained({name}).eval()
with torch.inference_mode():
    inputs = processor(Image.open("photo.jpg").convert("{mode}"), return_tensors="pt")
    outputs = model(**inputs{options})
{lines}{classify}
```"""

CLASSIFY = """

classifier = AutoModelForImageClassification.from_pretrained({name}).eval()
with torch.inference_mode():
    logits = classifier(**inputs).logits  # [1, {num_classes}]"""

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
    in_timm = f"hf-hub:{repo}" + (f"@{revision}" if revision else "")
    name = f'"{repo}"' + (f', revision="{revision}"' if revision else "")
    parts = [
        "## Usage",
        "### timm",
        timm_usage(bundle, "import timm", name=in_timm),
        "### transformers",
        _transformers_usage(bundle, name=name),
        f"With `import vitreg_hub` before ({INSTALL}), `AutoModel` gives the same numbers, and more:",
        _plugin_usage(bundle, "import vitreg_hub  # before models are loaded", name=name),
    ]
    if towers is None:
        conversion, objective = bundle.provenance.conversion, objective_of(bundle.provenance.run)
        kept = conversion is not None and KEPT_TOWER in conversion.dropped
        towers = kept or (objective is not None and objective.text_tower)
    if towers:
        branch = f" (branch `{revision}`)" if revision else ""
        where = f"`{repo}{TOWER_SUFFIX}`{branch}"
        text = (
            f"This is the image tower. For zero-shot classification, open_clip finds it with its text tower in {where}."
        )
        parts += ["### open_clip", text]
    return "\n\n".join(parts)


def usage_of_shipped(bundle: ModelBundle, *, name: str) -> str:
    """The same for weights that are part of this package, under the name by which timm then knows them."""
    timm_code = timm_usage(bundle, "import timm", "import vitreg_hub", name=name)
    before = f'from vitreg_hub.timm_models import SHIPPED_WEIGHTS\n\nfolder = SHIPPED_WEIGHTS / "{name}"\n'
    code = _plugin_usage(bundle, name="folder", before=before)
    about = "The weights are part of this package, as a bundle:"
    return "\n\n".join(
        ["## Usage", f"It needs this package: {INSTALL}.", "### timm", timm_code, "### transformers", about, code]
    )


def timm_usage(bundle: ModelBundle, *imports: str, name: str) -> str:
    """Code for timm."""
    kind = output(bundle)
    width = bundle.embed_dim if kind == FEATURES else bundle.num_classes
    return TIMM_USAGE.format(
        imports=import_lines(*imports),
        name=name,
        mode=_mode(bundle),
        tokens=_tokens(bundle),
        output=f"{kind} = model(images)  # [1, {width}]",
    )


def _transformers_usage(
    bundle: ModelBundle, *imports: str, name: str, before: str = "", options: str = "", lines: str = ""
) -> str:
    classifies = output(bundle) == LOGITS
    classes = "AutoImageProcessor, AutoModel" + (", AutoModelForImageClassification" if classifies else "")
    return TRANSFORMERS_USAGE.format(
        imports=import_lines(*imports, f"from transformers import {classes}"),
        before=before,
        name=name,
        mode=_mode(bundle),
        options=options,
        lines=lines or f"tokens = outputs.last_hidden_state  # {_tokens(bundle)}",
        classify=CLASSIFY.format(name=name, num_classes=bundle.num_classes) if classifies else "",
    )


def _plugin_usage(bundle: ModelBundle, *imports: str, name: str, before: str = "") -> str:
    kinds, width, depth = _token_kinds(bundle), bundle.embed_dim, bundle.model_args["depth"]
    shapes = {"register_tokens": kinds.get("register"), "patch_tokens": kinds["patch"]}
    lines = [f"{key} = outputs.{key}  # [1, {number}, {width}]" for key, number in shapes.items() if number]
    lines.append(f"hidden_states = outputs.hidden_states  # {depth + 1}: before the first block and after each")
    options = ", output_hidden_states=True"
    return _transformers_usage(bundle, *imports, name=name, before=before, options=options, lines="\n".join(lines))


def import_lines(*lines: str) -> str:
    """Import statements with those of torch and Pillow."""
    lines = (*lines, "import torch", "from PIL import Image")
    return "\n".join(sorted(lines, key=lambda line: (line.startswith("from"), line.lower())))


def _mode(bundle: ModelBundle) -> str:
    return "L" if bundle.preprocess.input_size[0] == 1 else "RGB"


def _token_kinds(bundle: ModelBundle) -> dict[str, int]:
    """How many tokens of each kind leave the final norm, in their order; patches come last."""
    height, width = bundle.grid
    kinds = {
        "class token": int("cls_token" in bundle.state_dict),
        "distillation token": int("dist_token" in bundle.state_dict),
        "register": bundle.num_registers,
        "patch": height * width,
    }
    return {name: number for name, number in kinds.items() if number}


def _tokens(bundle: ModelBundle) -> str:
    """The shape of all tokens, and what they are."""
    kinds = _token_kinds(bundle)
    words = ", ".join(name if name.endswith("token") else count(number, name) for name, number in kinds.items())
    return f"[1, {sum(kinds.values())}, {bundle.embed_dim}]: {words}"


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
    number, kinds = bundle.num_registers, _token_kinds(bundle)
    prefix = sum(kinds.values()) - kinds["patch"]
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
    names = bundle.label_names or ()
    told = f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if names else ""
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
