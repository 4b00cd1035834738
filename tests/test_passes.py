"""One pass over images: what is seen of them, on one process and on two."""

import pytest
import timm
import torch
from models import randomised
from pictures import picture
from processes import run_in_two
from torch import distributed
from torchvision.transforms.functional import to_tensor

from vitreg_hub.errors import DataError
from vitreg_hub.images.source import open_images
from vitreg_hub.passes import Needs, failing_together, gathered, in_order, observed
from vitreg_hub.tokens import observe

IMAGES = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network():
    return randomised(timm.create_model("vit_nano_reg4", depth=2, num_classes=0))


def rows(model, source, *, rank=0, world_size=1, batch_size=8, transform=None):
    """First channel of the registers of every image, and its attention on itself."""
    parts = []
    batches = source.batches(transform, batch_size=batch_size, rank=rank, world_size=world_size)
    with failing_together(world_size=world_size):
        for seen, batch in observed(model, batches, Needs(normed_blocks=(0,), attention=(1,))):
            registers, itself = seen.normed_blocks[0].registers[:, :, 0], seen.attention[1].weights[:, :, 0, 0]
            parts.append({"indices": batch.indices, "registers": registers, "itself": itself})
    return in_order(part for share in gathered(parts, world_size=world_size) for part in share)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_image_is_seen_once(batch_size):
    model, forwards, total, shown, weights = network(), [], 0.0, [], []
    model.patch_embed.register_forward_hook(lambda module, args, output: forwards.append(len(args[0])))
    batches = open_images(IMAGES).batches(None, batch_size=batch_size)
    for seen, batch in observed(model, batches, Needs(norms=True) | Needs(attention=(1,))):
        assert (len(seen.normed.patches), len(seen.embedded), seen.tokens, seen.attention.keys()) == (0, 0, {}, {1})
        total += seen.norms.double().sum().item()
        shown += batch.indices.tolist()
        weights.append(seen.attention[1].weights)
    assert sum(forwards) == 9
    assert len(forwards) == -(-9 // batch_size)
    whole = observe(model, IMAGES, norms=True, attention=(1,))
    assert (total, shown) == (pytest.approx(whole.norms.double().sum().item()), list(range(9)))
    assert torch.allclose(torch.cat(weights), whole.attention[1].weights, atol=1e-6)


def test_the_network_does_not_run_where_nothing_is_to_be_seen():
    model = network()
    model.patch_embed.register_forward_hook(lambda *call: pytest.fail("it runs"))
    batches = open_images(IMAGES).batches(None, batch_size=8)
    assert torch.equal(torch.cat([batch.images for _, batch in observed(model, batches, Needs())]), IMAGES)


def test_rows_are_in_the_order_of_images():
    source, parts = open_images(IMAGES), []
    for rank in (2, 1, 0):
        for batch in source.batches(None, batch_size=2, rank=rank, world_size=3):
            parts.append({"indices": batch.indices, "x": batch.images[:, 0, 0, 0]})
    found = in_order(parts)
    assert found["indices"].tolist() == list(range(9))
    assert torch.equal(found["x"], IMAGES[:, 0, 0, 0])
    assert in_order([]) == {}


def two_processes(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    here = {"rank": rank, "world_size": 2, "batch_size": 2}
    torch.save(rows(network(), open_images(IMAGES), **here), f"{folder}/{rank}.pt")
    try:  # the second process alone reads the broken image
        rows(network(), open_images(f"{folder}/broken"), transform=to_tensor, **here)
    except DataError as error:
        torch.save(str(error), f"{folder}/error{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_find_the_same_and_fail_together(tmp_path):
    (tmp_path / "broken").mkdir()
    picture(0, size=(32, 32)).save(tmp_path / "broken" / "a.png")
    (tmp_path / "broken" / "b.png").write_bytes(b"no picture")
    run_in_two(two_processes, str(tmp_path))
    alone = rows(network(), open_images(IMAGES))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["indices"].tolist() == list(range(9))
        for name, values in alone.items():
            assert torch.allclose(found[name], values, atol=1e-6)
        assert "image 1 of" in torch.load(tmp_path / f"error{rank}.pt")
