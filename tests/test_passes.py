"""One pass over images: what meters are shown, on one process and on two."""

import pickle

import pytest
import timm
import torch
from models import randomised
from pictures import picture
from torch import distributed
from torchvision.transforms.functional import to_tensor

from vitreg_hub.errors import DataError
from vitreg_hub.images.source import open_images
from vitreg_hub.passes import Needs, PerImage, run_pass
from vitreg_hub.tokens import observe

IMAGES = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network():
    return randomised(timm.create_model("vit_nano_reg4", depth=2, num_classes=0))


class Sum:
    """A meter that adds up norms; what it was shown it keeps to itself."""

    needs = Needs(norms=True)

    def __init__(self):
        self.total, self.shown = 0.0, []

    def update(self, seen, batch):
        assert (len(seen.normed.patches), len(seen.embedded), seen.tokens, seen.attention.keys()) == (0, 0, {}, {1})
        self.total += seen.norms.double().sum().item()
        self.shown += batch.indices.tolist()

    def merge(self, other):
        self.total += other.total
        self.shown += other.shown

    def result(self):
        return self.total, sorted(self.shown)


def rows(model, source, **options):
    """First channel of the registers of every image, and its attention on itself."""

    def read(seen, batch):
        return {"registers": seen.tokens[0].registers[:, :, 0], "itself": seen.attention[1].weights[:, :, 0, 0]}

    kept = PerImage(read, needs=Needs(blocks=(0,), attention=(1,)))
    (kept,) = run_pass(model, source, [kept], **options)
    return kept.result()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_meter_is_shown_every_image_once(batch_size):
    model, forwards = network(), []
    model.patch_embed.register_forward_hook(lambda module, args, output: forwards.append(len(args[0])))
    kept = PerImage(lambda seen, batch: {"weights": seen.attention[1].weights}, needs=Needs(attention=(1,)))
    total, kept = run_pass(model, open_images(IMAGES), [Sum(), kept], transform=None, batch_size=batch_size)
    assert sum(forwards) == 9  # both meters look at one forward pass
    assert len(forwards) == -(-9 // batch_size)
    whole = observe(model, IMAGES, norms=True, attention=(1,))
    assert total.result() == (pytest.approx(whole.norms.double().sum().item()), list(range(9)))
    assert torch.allclose(kept.result()["weights"], whole.attention[1].weights, atol=1e-6)


def test_the_network_does_not_run_for_meters_that_need_nothing():
    model = network()
    model.patch_embed.register_forward_hook(lambda *call: pytest.fail("it runs"))
    (kept,) = run_pass(model, open_images(IMAGES), [PerImage(lambda seen, batch: {"x": batch.images})], transform=None)
    assert torch.equal(kept.result()["x"], IMAGES)


def test_rows_are_in_the_order_of_images_and_travel_without_their_reader():
    source, parts = open_images(IMAGES), []
    for rank in range(3):
        kept = PerImage(lambda seen, batch: {"x": batch.images[:, 0, 0, 0]})
        for batch in source.batches(None, batch_size=2, rank=rank, world_size=3):
            kept.update(None, batch)
        parts.append(pickle.loads(pickle.dumps(kept)))
    first, *others = parts[::-1]
    for other in others:
        first.merge(other)
    assert first.result()["indices"].tolist() == list(range(9))
    assert torch.equal(first.result()["x"], IMAGES[:, 0, 0, 0])
    assert PerImage(lambda seen, batch: {}).result() == {}


def two_processes(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    here = {"rank": rank, "world_size": 2, "batch_size": 2}
    torch.save(rows(network(), open_images(IMAGES), transform=None, **here), f"{folder}/{rank}.pt")
    try:  # the second process alone reads the broken image
        rows(network(), open_images(f"{folder}/broken"), transform=to_tensor, **here)
    except DataError as error:
        torch.save(str(error), f"{folder}/error{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_find_the_same_and_fail_together(tmp_path):
    (tmp_path / "broken").mkdir()
    picture(0, size=(32, 32)).save(tmp_path / "broken" / "a.png")
    (tmp_path / "broken" / "b.png").write_bytes(b"no picture")
    torch.multiprocessing.spawn(two_processes, args=(str(tmp_path),), nprocs=2)
    alone = rows(network(), open_images(IMAGES), transform=None)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["indices"].tolist() == list(range(9))
        for name, values in alone.items():
            assert torch.allclose(found[name], values, atol=1e-6)
        assert "image 1 of" in torch.load(tmp_path / f"error{rank}.pt")
