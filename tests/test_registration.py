"""`import vitreg_hub` costs next to nothing, and all names are found in whatever order things are imported."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitreg_hub
from vitreg_hub.hf_models import VitRegConfig, VitRegModel

FOLDER = Path(vitreg_hub.__file__).parent / "weights/vit_nano_reg4.digits"

HELPERS = """
import sys

def waiting():
    return [finder for finder in sys.meta_path if type(finder).__module__.startswith("vitreg_hub")]
"""

IN_TIMM = """
import timm
assert timm.is_model("vit_small_reg4")
assert "vit_large_reg4.dinov2_lvd142m" in timm.list_pretrained("vit_large_reg4*")
assert timm.create_model("vit_nano_reg4").reg_token.shape[1] == 4
"""

IN_TRANSFORMERS = """
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert type(AutoConfig.from_pretrained(sys.argv[1])).__name__ == "VitRegConfig"
assert type(AutoModel.from_pretrained(sys.argv[1])).__name__ == "VitRegModel"
assert not waiting()
"""


def python(code: str, *arguments: object, file: Path | None = None) -> None:
    """Run code in a fresh interpreter: given by word, or from a file whose classes other processes can import."""
    start = ["-c", HELPERS + code]
    if file is not None:
        file.write_text(HELPERS + code)
        start = [str(file)]
    command = [sys.executable, *start, str(FOLDER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_import_is_light():
    python("""if True:
        import importlib, vitreg_hub
        assert vitreg_hub.__version__[0].isdigit()
        importlib.reload(vitreg_hub)
        heavy = {"numpy", "torch", "torchvision", "timm", "transformers", "huggingface_hub", "datasets", "accelerate"}
        assert not heavy & sys.modules.keys()
        assert waiting()
        assert not hasattr(vitreg_hub, "no_such_module")
    """)


IMPORTS = {
    "the package first, one name of each": """
import vitreg_hub
from timm import create_model
create_model("vit_small_reg4", depth=1)
from transformers import AutoConfig
assert not waiting()
assert "vitreg_hub.hf_models" not in sys.modules  # before anybody reads a configuration
assert AutoConfig.for_model("timm_wrapper", architecture="resnet18").__module__.startswith("transformers.")
""",
    "the package last": """
from timm import create_model
from transformers import AutoConfig, AutoModel, BertConfig
AutoModel.from_config(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
import vitreg_hub
assert not waiting()
create_model("vit_small_reg4", depth=1)
""",
    "transformers first, its names later": """
import transformers
import vitreg_hub
from transformers import AutoBackbone, AutoImageProcessor, AutoModelForImageClassification, pipeline
assert type(AutoImageProcessor.from_pretrained(sys.argv[1])).__name__ == "TimmWrapperImageProcessor"
model = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1])
assert type(model).__name__ == "VitRegForImageClassification"
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
assert type(AutoBackbone.from_config(config)).__name__ == "VitRegBackbone"
import torch
from PIL import Image
assert len(pipeline("image-classification", model=sys.argv[1])(Image.new("RGB", (32, 32)))) == 5
""",
    "parts of the package": """
from vitreg_hub.timm_models import SHIPPED_WEIGHTS
import vitreg_hub
assert vitreg_hub.hf_models.VitRegBackbone
""",
}


@pytest.mark.parametrize("order", IMPORTS)
def test_all_names_are_found(order):
    python(IMPORTS[order] + IN_TIMM + IN_TRANSFORMERS)


ENTRIES = [
    "import timm",
    "import timm.models",
    "from timm.models.vision_transformer import VisionTransformer",
    "from transformers import AutoConfig",
    "from transformers import AutoModel",
    "from transformers import AutoBackbone",
    "from transformers import AutoImageProcessor",
    "from transformers import AutoModelForImageClassification",
    "from transformers import AutoTokenizer, AutoProcessor",
    "from transformers import CLIPModel",
    "from transformers import PreTrainedModel",
    "from transformers import TimmWrapperConfig",
    "from transformers import TimmWrapperModel",
    "from transformers import Trainer",
    "from transformers import pipeline",
    "from transformers.models import auto",
    "import transformers.models.auto",
    "import transformers.models.auto.modeling_auto",
    "from transformers.models.auto.image_processing_auto import AutoImageProcessor",
    "from transformers.models.llava.configuration_llava import LlavaConfig",
    "import transformers.modeling_layers",
    "import transformers.quantizers.auto",
    "import vitreg_hub.bundle",
    "import vitreg_hub.hf_models",
]


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("first", [True, False])
def test_all_names_are_found_from_every_entry(entry, first):
    entries = ["import vitreg_hub", entry] if first else [entry, "import vitreg_hub"]
    python("\n".join(entries) + IN_TRANSFORMERS + IN_TIMM)


def test_pickled_models_are_read_by_fresh_processes(tmp_path):
    torch.save(VitRegModel(VitRegConfig(arch="vit_nano_reg2")), tmp_path / "model.pt")
    python(
        """if True:
        import torch
        model = torch.load(sys.argv[2], weights_only=False)
        assert model(torch.zeros(1, 3, 32, 32)).register_tokens.shape[1] == 2
        from transformers import AutoModel
        assert type(AutoModel.from_config(model.config)) is type(model)
        """
        + IN_TIMM
        + IN_TRANSFORMERS,
        tmp_path / "model.pt",
    )


def test_threads_that_import_at_the_same_time():
    python(
        """if True:
        import threading
        import torchvision  # whose own modules import each other in circles, which threads cannot

        ready, errors = threading.Barrier(4), []

        def run(*lines):
            ready.wait()
            try:
                exec("\\n".join(lines), {})
            except BaseException as error:
                errors.append((lines, repr(error)))

        model = 'assert timm.is_model("vit_small_reg4")'
        threads = [
            threading.Thread(target=run, args=lines)
            for lines in (
                ("import vitreg_hub", "import timm", model),
                ("import timm", "import vitreg_hub", model),
                ("import timm", "from vitreg_hub.timm_models import SHIPPED_WEIGHTS", model),
                ("import vitreg_hub", "from transformers import AutoModel"),  # one: its lazy imports bear no two
            )
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        """
        + IN_TIMM
        + IN_TRANSFORMERS
    )


def test_workers_of_a_data_loader(tmp_path):
    python(
        """
import torch
from torch.utils.data import DataLoader, Dataset
import vitreg_hub

class Registers(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        import timm
        from transformers import AutoConfig
        return timm.create_model("vit_nano_reg4").num_reg_tokens + AutoConfig.from_pretrained(sys.argv[1]).num_labels

if __name__ == "__main__":
    for start in "fork", "spawn":
        loader = DataLoader(Registers(), num_workers=1, multiprocessing_context=start)
        assert [batch.tolist() for batch in loader] == [[14]]
    assert "timm" not in sys.modules
""",
        file=tmp_path / "script.py",
    )
