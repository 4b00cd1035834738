"""Train, convert, check and publish Vision Transformers with registers."""

import fnmatch
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from json import dumps as to_json
from pathlib import Path
from typing import Any

import huggingface_hub as hf
import timm
import torch
from accelerate import PartialState
from jsonargparse import ArgumentParser

from vitreg_hub import conversion
from vitreg_hub import hub as publishing
from vitreg_hub.analysis.many import analyze_all
from vitreg_hub.analysis.report.write import REPORT_PAGE, draw_attention, write_report
from vitreg_hub.analysis.wording import names, verdict
from vitreg_hub.arch import ARCHS
from vitreg_hub.bundle import doors
from vitreg_hub.bundle.config import read_config
from vitreg_hub.bundle.info import describe
from vitreg_hub.console import console
from vitreg_hub.conversion.exporter import EXPORTS
from vitreg_hub.conversion.formats.detect import FORMATS
from vitreg_hub.conversion.report import ConversionReport
from vitreg_hub.errors import VitregError
from vitreg_hub.files import CONFIG_FILE, TOWER_SUFFIX, require_absent
from vitreg_hub.model_cards.artifacts import record
from vitreg_hub.training import command as train_command
from vitreg_hub.training import quickstart as quickstart_run

TRAIN = "train"

EXAMPLES = """examples:
  vitreg quickstart                          train a register ViT on real digits, bundle, verify, draw (about 2 minutes)
  vitreg list 'vit_*_reg4*'                  architectures with four registers
  vitreg info hf-hub:org/name                what a model is and where it came from; also a folder, or a name of `list`
  vitreg train supervised_digits --registers 0 --out plain   any recipe; run it again and it goes on where it stopped
  vitreg train dinov2_vitl14 --help          its settings; `vitreg train --help` lists the recipes
  vitreg train deit3_base --config mine.yaml --optim.lr 2e-3 --out runs/base --push org/name
  vitreg verify quickstart/model             open a bundle through timm and transformers, with and without vitreg_hub
  vitreg convert dinov2_vitl14_pretrain.pth vitl --license apache-2.0   or of DINO, DeiT, OpenCLIP, transformers, timm
  vitreg convert hf-hub:org/name folder --registers 4 --verify
  vitreg export folder dinov2.pth --format dinov2    and back
  vitreg analyze quickstart/model --images digits    are there high-norm artifacts? report.html, figures, numbers
  vitreg analyze vit_small_reg0 vit_small_reg4 runs/vitl --out report   side by side, and over a run's checkpoints
  vitreg attention quickstart/model cat.png  what the class token and each register attend to
  vitreg push quickstart/model org/name      publish it in one commit; --dry-run lists what would be sent
  vitreg list --hub 'org/*'                  published models
  vitreg pull org/name folder                fetch a published bundle
"""


def list_archs(pattern: str, hub: bool) -> None:
    """Print the table of architectures, or the published models."""
    if hub:
        _list_published(pattern)
        return
    chosen = [spec for name, spec in ARCHS.items() if fnmatch.fnmatch(name, pattern)]
    if not chosen:
        raise VitregError(f"no architecture matches {pattern!r}; `vitreg list` prints all {len(ARCHS)}.")
    rows = [("name", "params", "width/depth/heads", "patch", "size", "tags")]
    for spec in chosen:
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{spec.name}.*")]
        shape = f"{spec.embed_dim}/{spec.depth}/{spec.num_heads}"
        params = f"{spec.num_params / 1e6:.1f}M"
        rows.append((spec.name, params, shape, str(spec.patch_size), str(spec.img_size), ", ".join(tags)))
    _print_table(rows)


def _list_published(pattern: str) -> None:
    models = publishing.list_models()
    chosen = [m for m in models if any(fnmatch.fnmatch(n, pattern) for n in (m.repo_id, m.repo_id.split("/")[-1]))]
    if not chosen:
        raise VitregError(f"none of the {len(models)} published models matches {pattern!r}.")
    rows = [("repository", "architecture", "license", "downloads", "likes", "updated")]
    for model in chosen:
        arch = next((tag for tag in model.tags if tag in ARCHS), "?")
        updated = f"{model.last_modified:%Y-%m-%d}" if model.last_modified else "?"
        row = (model.repo_id, arch, model.license or "unknown", str(model.downloads), str(model.likes), updated)
        rows.append(row if not model.private else (*row[:-1], f"{updated} (private)"))
    _print_table(rows)


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip())


def info(model: str, json: bool) -> None:
    """Tell what a model is and where it came from, without its weights."""
    described = describe(model)
    print(to_json(asdict(described), indent=2) if json else described)


def quickstart(out: str, push: str | None) -> None:
    """Train a small register ViT on real digits, bundle it, verify it and draw its tokens."""
    result = quickstart_run.quickstart(out, push_to=push)
    print(f"\nheld-out accuracy {result.accuracy:.3f}")
    print(f"model    {result.model}")
    _print_doors(result.doors)
    print(f"figure   {result.figure}")
    if result.commit:
        print(f"pushed   {result.commit} (loaded back: equal)")
    print(f"""
next:
  python -c "import timm; print(timm.create_model('local-dir:{result.model}', pretrained=True))"
  python -c "import vitreg_hub; from transformers import AutoModel; print(AutoModel.from_pretrained('{result.model}'))"
  vitreg push {result.model} your-name/vit_nano_reg4.digits""")


def verify(folder: str) -> None:
    """Open a bundle in timm and in transformers, with and without vitreg_hub, and compare all outputs."""
    _print_doors(doors.verify(folder))


def convert(
    source: str,
    out: str,
    format: str,
    arch: str | None,
    img_size: str | None,
    registers: int | None,
    num_heads: int | None,
    act: str | None,
    license: str | None,
    text_tower: bool,
    verify: bool,
) -> None:
    """Convert a checkpoint of another lineage to a bundle, exactly, or say why not."""
    bundle = conversion.convert(
        source,
        out,
        format=format,
        arch=arch,
        img_size=_image_size(img_size),
        num_registers=registers,
        num_heads=num_heads,
        act=act,
        license=license,
        text_tower=text_tower,
        verify=verify,
    )
    print(ConversionReport.of(bundle))
    print(f"bundle       {out}")
    if text_tower:
        print(f"both towers  {out.rstrip('/')}{TOWER_SUFFIX}")


def _image_size(given: str | None) -> tuple[int, int] | None:
    if given is None:
        return None
    sides = given.split(",")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise VitregError(f"--img-size takes a side, or height and width, in pixels (224 or 224,336), not {given!r}.")
    return int(sides[0]), int(sides[-1])


def export(bundle: str, out: str, format: str) -> None:
    """Write a bundle in the form of a lineage that can hold it."""
    print(conversion.export(bundle, out, format=format))


def analyze(models: list[str], images: str, out: str, card: bool, dtype: str, **options: Any) -> None:
    """Measure high-norm artifacts of one or more ViTs as the paper does, and write a report."""
    require_absent(Path(out))
    for model in models if card else ():
        if not Path(model, CONFIG_FILE).is_file():
            raise VitregError(f"--card records results in bundles' folders, but {model} is none: leave --card out.")
        read_config(Path(model), called=model)
    options |= {"img_size": _image_size(options["img_size"]), "dtype": DTYPES[dtype], "progress": sys.stderr.isatty()}
    reports = analyze_all(models, images, **options)
    if not PartialState().is_main_process:
        return
    write_report(reports, out)
    for name, report in zip(names(reports), reports, strict=True):
        print(f"{name}: {verdict(report)}")
        for note in report.notes:
            print(f"  {note}")
    print(f"report   {Path(out, REPORT_PAGE)}")
    for model, report in zip(models, reports, strict=True) if card else ():
        told = "recorded in the bundle and its card" if record(model, report) else "recorded; its card is an author's"
        print(f"card     {model}: {told}")


def attention(model: str, images: list[str], out: str, heads: bool, dtype: str, **options: Any) -> None:
    """Draw what the class token and each register attend to in an image."""
    options |= {"img_size": _image_size(options["img_size"]), "dtype": DTYPES[dtype], "progress": sys.stderr.isatty()}
    print(draw_attention(model, images, out, heads=heads, **options))


def push(folder: str, repo: str, dry_run: bool, **options: Any) -> None:
    """Verify a bundle and publish it in one commit."""
    _show_progress()
    if dry_run:
        _print_plan(publishing.plan(folder, repo, **options))
        return
    pushed = publishing.push(folder, repo, **options)
    for done in filter(None, (pushed.text_tower, pushed)):  # the bundle's address is the last line
        did = (*done.sent, *(f"deleted {name}" for name in done.deleted))
        print(f"{done.repo_id}: {', '.join(did) or 'nothing had changed'}")
        if done.pull_request:
            print(f"pull request {done.pull_request}")
        print(done.url)


def _print_plan(plan: publishing.PushPlan) -> None:
    made = " (new)" if plan.makes_repository else " (new branch)" if plan.makes_branch else ""
    print(f"{plan.repo_id}, branch {plan.branch}{made}, license {plan.license or 'unknown'}")
    for file in plan.files:
        print(f"  {file.state.ljust(9)}  {file.size:>13,} bytes  {file.name}")
    if plan.left_out:
        print(f"  left out: {', '.join(plan.left_out)}")
    if plan.text_tower:
        _print_plan(plan.text_tower)


def pull(repo: str, folder: str) -> None:
    """Fetch a published bundle into a new folder."""
    _show_progress()
    print(publishing.pull(repo, folder))


def _show_progress() -> None:
    """Show the Hub's bars, which go with transformers' when those are turned off, where someone can see them."""
    if sys.stderr.isatty() and hf.constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        hf.utils.enable_progress_bars()


def _print_doors(differences: dict[str, float]) -> None:
    for door, difference in differences.items():
        print(f"opens    in {door.ljust(24)} largest difference {difference:g}")


FOLDER = ("folder", {"help": "folder of a bundle, or the name of weights in this package"})

CONVERT = [
    ("source", {"help": "weights file, folder, or hf-hub:org/name[@revision]"}),
    ("out", {"help": "new folder for the bundle"}),
    ("--format", {"default": "auto", "help": f"auto, {', '.join(FORMATS)}"}),
    ("--arch", {"help": "row of `vitreg list` that the checkpoint must be; tells heads and activation"}),
    ("--img-size", {"metavar": "N or H,W", "help": "bake the position table for images of this size in"}),
    ("--registers", {"type": int, "metavar": "N", "help": "add untrained registers to a checkpoint that has none"}),
    ("--num-heads", {"type": int, "metavar": "N", "help": "attention heads, where nothing else tells"}),
    ("--act", {"help": "gelu or quick_gelu, where nothing else tells"}),
    (
        "--license",
        {"metavar": "ID", "help": "where the source tells none, or one that does not allow every use; or unknown"},
    ),
    ("--text-tower", {"action": "store_true", "help": "keep OpenCLIP's whole model beside the bundle"}),
    ("--verify", {"action": "store_true", "help": "measure the difference to a reference implementation"}),
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL_HELP = "bundle's folder, hf-hub:org/name, an architecture with or without weights, or any ViT of timm"
BLOCK = ("--block", {"type": int, "default": -1, "help": "block whose outliers count, from 0, or from the end"})
IMG_SIZE = ("--img-size", {"metavar": "N or H,W", "help": "size of the images, if not the model's own"})
DTYPE = ("--dtype", {"choices": list(DTYPES), "default": "float32", "help": "number type of the model"})
DEVICE = ("--device", {"help": "cpu, cuda, cuda:1, ...; a GPU if there is one"})

ANALYZE = [
    (
        "models",
        {
            "nargs": "+",
            "metavar": "MODEL",
            "help": f"{MODEL_HELP}; a run's folder of checkpoints; an earlier report.json",
        },
    ),
    ("--images", {"default": "photos", "help": "folder, photos, digits, or org/name[:split] on the Hub"}),
    ("--out", {"default": "analysis", "help": "new folder for report.html, report.json and the figures"}),
    ("--cutoff", {"type": float, "metavar": "NORM", "help": "norm above which a patch token is an outlier"}),
    BLOCK,
    IMG_SIZE,
    ("--max-images", {"type": int, "metavar": "N", "help": "use no more: a random choice of them"}),
    ("--batch-size", {"type": int, "default": 8, "metavar": "N", "help": "images at a time, in each process"}),
    ("--num-workers", {"type": int, "default": 0, "metavar": "N", "help": "processes that decode images"}),
    DEVICE,
    DTYPE,
    ("--seed", {"type": int, "default": 0, "help": "decides what is drawn where not all is used"}),
    (
        "--card",
        {"action": "store_true", "help": "also record the result in the models, which must be bundles' folders"},
    ),
]

COMMANDS: dict[str, tuple[Callable[..., None], list[tuple[str, dict[str, Any]]]]] = {
    "quickstart": (
        quickstart,
        [
            ("--out", {"default": "quickstart", "help": "new folder for the results"}),
            ("--push", {"metavar": "ORG/NAME", "help": "publish to the Hub that HF_ENDPOINT names, and load back"}),
        ],
    ),
    "list": (
        list_archs,
        [
            ("pattern", {"nargs": "?", "default": "*", "help": "shell-style pattern of names"}),
            ("--hub", {"action": "store_true", "help": "published models instead of architectures"}),
        ],
    ),
    "info": (
        info,
        [
            ("model", {"help": "an architecture with or without the tag of its weights, folder, or hf-hub:org/name"}),
            ("--json", {"action": "store_true", "help": "print the same as JSON"}),
        ],
    ),
    "verify": (verify, [FOLDER]),
    "convert": (convert, CONVERT),
    "export": (
        export,
        [
            ("bundle", {"help": "folder, hf-hub:org/name, or an architecture with weights"}),
            ("out", {"help": "new folder for hf-... formats, new .pth or .safetensors file for others"}),
            ("--format", {"required": True, "help": ", ".join(EXPORTS)}),
        ],
    ),
    "analyze": (analyze, ANALYZE),
    "attention": (
        attention,
        [
            ("model", {"help": MODEL_HELP}),
            ("images", {"nargs": "+", "metavar": "IMAGE", "help": "image files, one row each"}),
            ("--out", {"default": "attention.png", "help": "new PNG file"}),
            ("--heads", {"action": "store_true", "help": "every head, not their mean"}),
            BLOCK,
            IMG_SIZE,
            DEVICE,
            DTYPE,
        ],
    ),
    "push": (
        push,
        [
            FOLDER,
            ("repo", {"help": "org/name; made if it does not exist"}),
            ("--private", {"action": "store_true", "help": "a new repository can be seen by its owner alone"}),
            ("--branch", {"default": "main", "help": "where the commit goes; a new one starts from main"}),
            ("--create-pr", {"action": "store_true", "help": "open a pull request instead"}),
            ("--tag", {"help": "name for the commit, such as v1"}),
            (
                "--license",
                {"help": "of the weights, where the bundle does not tell, or a non-commercial one to agree to"},
            ),
            ("--dry-run", {"action": "store_true", "help": "check everything, list what would be sent, send nothing"}),
        ],
    ),
    "pull": (pull, [("repo", {"help": "org/name or org/name@revision"}), ("folder", {"help": "must not exist"})]),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    A user's mistake ends in one sentence on stderr and exit status 1; wrong arguments in usage and status 2. What
    `train` takes depends on the recipe, so it reads its own arguments.
    """
    args = sys.argv[1:] if args is None else args
    if args[:1] == [TRAIN]:
        with console():
            train_command.run_command(args[1:])
        return
    parser = ArgumentParser(
        prog="vitreg", description=__doc__, epilog=EXAMPLES, formatter_class=train_command.HelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"vitreg_hub {version('vitreg_hub')}")
    subcommands = parser.add_subcommands(required=True, dest="command")
    subcommands.add_subcommand(TRAIN, ArgumentParser(), help=train_command.SUMMARY)  # to be seen in the help
    for name, (function, arguments) in COMMANDS.items():
        command = ArgumentParser(description=function.__doc__)
        for argument, settings in arguments:
            command.add_argument(argument, **settings)
        subcommands.add_subcommand(name, command, help=function.__doc__)
    given = parser.parse_args(args)
    with console():
        COMMANDS[given.command][0](**given[given.command].as_dict())
