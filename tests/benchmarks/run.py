"""Print what importing, loading and running our models costs against their peers. Run by hand."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from interleaved import medians, table
from transformers import AutoModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, TimmWrapperModel, logging

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.hf_models import VitRegModel


def importing(rounds: int) -> str:
    """Fresh interpreters: all of the models against the two libraries that its users import anyway."""

    def fresh(code: str):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    contestants = {
        "import vitreg_hub.hf_models": fresh("import vitreg_hub.hf_models"),
        "import timm; from transformers import PreTrainedModel": fresh(
            "import timm; from transformers import PreTrainedModel"
        ),
    }
    return table("import", medians(contestants, rounds=rounds))


def loading(rounds: int) -> str:
    """ViT-L with four registers, 1.2 GB, from a folder in the page cache, until every weight was read once."""
    with tempfile.TemporaryDirectory() as scratch:
        model = timm.create_model("vit_large_reg4", img_size=224)
        origin = Provenance(origin="random weights")
        folder = str(
            ModelBundle.from_timm(model, arch="vit_large_reg4", provenance=origin).save(Path(scratch, "bundle"))
        )
        del model
        contestants = {
            "ModelBundle.load(folder).build()": lambda: ModelBundle.load(folder).build(),
            "timm.create_model('local-dir:...')": lambda: timm.create_model(f"local-dir:{folder}", pretrained=True),
            "transformers TimmWrapperModel": lambda: TimmWrapperModel.from_pretrained(folder),
            "AutoModel with vitreg_hub": lambda: AutoModel.from_pretrained(folder),
        }
        load = table("load ViT-L", medians(contestants, rounds=rounds))
        touched = {name: lambda call=call: read_all(call()) for name, call in contestants.items()}
        return load + "\n\n" + table("load ViT-L and read every weight", medians(touched, rounds=rounds))


@torch.inference_mode()
def read_all(model: torch.nn.Module) -> float:
    return sum(parameter.sum().item() for parameter in model.parameters())


def forward(rounds: int) -> str:
    """ViT-S with four registers, 8 images of 224 pixels, float32."""
    images = torch.randn(8, 3, 224, 224)
    ours = timm.create_model("vit_small_reg4", img_size=224).eval()
    timms = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=224).eval()
    bundle = ModelBundle.from_timm(ours, arch="vit_small_reg4", provenance=Provenance(origin="random weights"))
    with tempfile.TemporaryDirectory() as scratch:
        wrapped = VitRegModel.from_pretrained(str(bundle.save(Path(scratch, "bundle")))).eval()
    shape = Dinov2WithRegistersConfig(hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14)
    theirs = Dinov2WithRegistersModel(shape).eval()
    with torch.inference_mode():
        contestants = {
            "vit_small_reg4": lambda: ours.forward_features(images),
            "timm vit_small_patch14_reg4_dinov2": lambda: timms.forward_features(images),
            "VitRegModel": lambda: wrapped(images),
            "transformers Dinov2WithRegistersModel": lambda: theirs(images),
        }
        return table("forward ViT-S", medians(contestants, rounds=rounds, warmup=3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    logging.disable_progress_bar()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}\n")
    for benchmark in (importing, loading, forward):
        print(benchmark(rounds), flush=True)
        print()


if __name__ == "__main__":
    main()
