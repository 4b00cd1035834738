"""A stranger's config.json makes nothing fetch an address or open a file beside the bundle's own."""

import builtins
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
import timm
import torch
from models import random_bundle
from timm.models import save_for_hf
from transformers import AutoModel

from vitreg_hub.bundle.info import describe
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.rules import source_problems
from vitreg_hub.errors import BundleError


@pytest.fixture
def lures(tmp_path, monkeypatch) -> Iterator[SimpleNamespace]:
    """An address and a file with weights that would fit, and what was asked of them."""
    asked, weights, real = [], tmp_path / "lure.pth", builtins.open
    torch.save(dict(random_bundle().state_dict), weights)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    def watched(file, *args, **kwargs):
        if str(file) == str(weights):
            asked.append(str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(builtins, "open", watched)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/lure.pth", file=str(weights), asked=asked)
        server.shutdown()


LURES = {
    "fetched": ({"pretrained": True}, {"url": "{url}"}),
    "fetched its own way": ({"pretrained": True}, {"url": "{url}", "custom_load": True}),
    "fetched by an overlay": ({"pretrained": True, "pretrained_cfg_overlay": {"url": "{url}"}}, {}),
    "opened": ({"pretrained": True, "pretrained_strict": False}, {"file": "{file}"}),
    "opened by path": ({"checkpoint_path": "{file}"}, {}),
}


@pytest.mark.parametrize("lure", LURES)
@pytest.mark.parametrize("opens", [describe, ModelBundle.load, AutoModel.from_pretrained])
def test_no_other_weights_are_touched(opens, lure, lures, folder):
    random_bundle().save(folder)
    config = json.loads((folder / "config.json").read_text())
    for part, added in zip(("model_args", "pretrained_cfg"), LURES[lure], strict=True):
        told = json.dumps(added).replace("{url}", lures.url).replace("{file}", lures.file)
        config[part] |= json.loads(told)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"model_args holds \[.*\], which do not describe a network") as caught:
        opens(folder)
    assert lures.asked == []
    assert "\n" not in str(caught.value)


def test_the_lures_notice_who_takes_them(lures):
    with pytest.raises(OSError, match="404"):
        torch.hub.load_state_dict_from_url(lures.url, progress=False)
    torch.load(lures.file)
    assert lures.asked == ["/lure.pth", lures.file]


@pytest.mark.parametrize(
    "field",
    [
        {"url": "http://127.0.0.1:1/x.pth"},
        {"file": "/etc/passwd"},
        {"state_dict": {"cls_token": 1}},
        {"hf_hub_id": "lab/other"},
        {"hf_hub_filename": "pytorch_model.bin"},
        {"source": "hf-hub"},
        {"custom_load": "hf"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_bundle_names_no_other_weights(field, folder):
    random_bundle().save(folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= field
    (folder / "config.json").write_text(json.dumps(config))
    says = f"pretrained_cfg holds {list(field)}, but a bundle has no other weights than its model.safetensors"
    with pytest.raises(BundleError) as caught:
        ModelBundle.load(folder)
    assert says in str(caught.value)


def test_what_timm_writes_of_a_bundle_names_no_other_weights(folder, tmp_path):
    model = timm.create_model(f"local-dir:{random_bundle().save(folder)}", pretrained=True)
    assert model.pretrained_cfg["file"] == str(folder)
    save_for_hf(model, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["pretrained_cfg"]["custom_load"] is False
    assert not list(source_problems(config))
