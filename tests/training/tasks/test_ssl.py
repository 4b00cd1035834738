"""Heads, losses, targets and masks of self-supervised training, against the official code and over two processes."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import GOLDEN
from processes import run_in_two
from safetensors.torch import load_file
from skimage.measure import label
from torch import Tensor, distributed

from vitreg_hub.errors import RecipeError
from vitreg_hub.training.distributed import collectives
from vitreg_hub.training.tasks.dinov2.head import DinoHead
from vitreg_hub.training.tasks.dinov2.losses import (
    RunningCentre,
    dino_global_loss,
    dino_local_loss,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
)
from vitreg_hub.training.tasks.dinov2.masks import BlockMasks, masked_indices_and_weights
from vitreg_hub.training.tasks.dinov2.settings import Head

close = torch.testing.assert_close
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def golden(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Inputs, outputs and notes of a recorded case."""
    folder = GOLDEN / case
    inputs = folder / "inputs.safetensors"
    expected = load_file(folder / "expected.safetensors")
    return load_file(inputs) if inputs.exists() else {}, expected, json.loads((folder / "meta.json").read_text())


def with_grad(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


# Heads


@pytest.mark.parametrize("name", ["nlayers3", "nlayers1", "nlayers2_nobias"])
def test_head_is_the_official_one(name):
    inputs, expected, meta = golden("dino_head")
    settings = meta["constructor"][name]
    shape = Head(
        prototypes=settings["out_dim"],
        hidden=settings.get("hidden_dim", 1),
        bottleneck=settings["bottleneck_dim"],
        layers=settings["nlayers"],
    )
    head = DinoHead(settings["in_dim"], shape, bias=settings.get("mlp_bias", True))
    weights = load_file(GOLDEN / "dino_head/checkpoint.safetensors")
    head.load_state_dict({k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")})
    x = with_grad(inputs["x"])
    out = head(x)
    out.backward(inputs[f"{name}.grad_out"])
    close(out, expected[f"{name}.out"], **EXACT)
    close(x.grad, expected[f"{name}.grad_x"], **EXACT)
    for parameter in ("weight_g", "weight_v"):
        close(getattr(head.last_layer, parameter).grad, expected[f"{name}.grad.last_layer.{parameter}"], **EXACT)


def test_head_starts_as_the_official_one():
    head = DinoHead(64, Head(prototypes=300, hidden=128, bottleneck=32))
    assert torch.equal(head.last_layer.weight_g, torch.ones(300, 1))
    assert head.last_layer.weight_g.requires_grad
    linears = [module for module in head.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 3
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not linear.bias.any()
    start = head.last_layer.weight_v.abs()  # an ordinary linear layer's, uniform
    assert start.max().item() == pytest.approx(1 / 32**0.5, rel=1e-2)
    assert start.mean().item() == pytest.approx(0.5 / 32**0.5, rel=2e-2)


def test_head_under_autocast_normalises_in_float32():
    head = DinoHead(24, Head(prototypes=40, hidden=32, bottleneck=16))
    seen = []
    head.last_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        out = head(torch.randn(7, 24))
    assert out.dtype is torch.bfloat16
    close(seen[0].norm(dim=-1), torch.ones(7), atol=1e-6, rtol=0)


def test_copied_head_is_another_one():
    head = DinoHead(24, Head(prototypes=40, hidden=32, bottleneck=16))
    other, x = copy.deepcopy(head), torch.randn(3, 24)
    before = head(x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert torch.equal(head(x), before)
    assert not torch.allclose(other(x), before)


# Losses


@pytest.mark.parametrize("centring", ["centering", "sinkhorn"])
@pytest.mark.parametrize("crops", ["local", "global"])
def test_dino_loss_is_the_official_one(crops, centring):
    inputs, expected, meta = golden("loss_dino")
    teacher = expected["teacher_probs_centering_step0" if centring == "centering" else "teacher_probs_sinkhorn_iters3"]
    student = with_grad(inputs[f"student_{crops}_logits"])
    if crops == "local":
        loss = dino_loss(student.unflatten(0, (meta["n_local"], -1)), teacher.unflatten(0, (meta["n_global"], -1)))
    else:
        loss = dino_loss(student[None], teacher[None])
    loss.backward()
    close(loss, expected[f"loss_{crops}_{centring}"], **EXACT)
    close(student.grad, expected[f"grad_{crops}_{centring}"], **EXACT)


@pytest.mark.parametrize(("num_local", "terms"), [(8, 18), (1, 4), (0, 3)])
def test_dino_terms_are_sums_over_pairs(num_local, terms):
    torch.manual_seed(1)
    student, teacher = torch.randn(2 + num_local, 5, 7), torch.rand(2, 5, 7).softmax(dim=-1)

    def entropy(s: int, t: int) -> Tensor:
        return F.cross_entropy(student[s] / 0.2, teacher[t])

    crossed = (entropy(0, 1) + entropy(1, 0)) / terms
    close(dino_global_loss(student[:2], teacher, num_local=num_local, temperature=0.2), crossed, **EXACT)
    if num_local:
        pairs = sum(entropy(s, t) for s in range(2, 2 + num_local) for t in range(2)) / terms
        close(dino_local_loss(student[2:], teacher, temperature=0.2), pairs, **EXACT)


@pytest.mark.parametrize("centring", ["centering", "sinkhorn"])
def test_ibot_loss_is_the_official_one(centring):
    inputs, expected, meta = golden("loss_ibot")
    indices, weights = masked_indices_and_weights(inputs["masks"])
    teacher = expected["teacher_probs_centering" if centring == "centering" else "teacher_probs_sinkhorn_iters3"]
    student = with_grad(inputs["student_logits_padded"][: meta["n_masked"]])
    loss = ibot_loss(student, teacher, weights, num_crops=len(inputs["masks"]))
    loss.backward()
    close(loss, expected[f"loss_masked_{centring}"], **EXACT)
    close(student.grad, expected[f"grad_masked_{centring}"], **EXACT)
    assert torch.equal(indices, inputs["mask_indices"])
    close(weights, inputs["masks_weight"], **EXACT)


def test_ibot_loss_of_whole_maps_is_the_official_one():
    inputs, expected, _ = golden("loss_ibot")
    indices, weights = masked_indices_and_weights(inputs["masks"])
    student, teacher = (inputs[name].flatten(0, 1)[indices] for name in ("student_full", "teacher_full_probs"))
    close(ibot_loss(student, teacher, weights, num_crops=4), expected["loss_full_forward"], **EXACT)


def test_ibot_loss_without_masked_patches_is_zero():
    student = torch.zeros(0, 5, requires_grad=True)
    loss = ibot_loss(student, torch.zeros(0, 5), torch.zeros(0), num_crops=4)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (0, 5)


@pytest.mark.parametrize("name", ["x_a", "x_b"])
def test_koleo_is_the_official_one(name):
    inputs, expected, _ = golden("loss_koleo")
    x = with_grad(inputs[name])
    loss = koleo_loss(x)
    loss.backward()
    close(loss, expected[f"loss_{name}"], **EXACT)
    close(x.grad, expected[f"grad_{name}"], **EXACT)


@pytest.mark.parametrize("name", ["x_duplicate_rows", "x_parallel_rows"])
def test_koleo_of_equal_directions_is_large_and_finite(name):
    inputs, expected, _ = golden("loss_koleo")
    x = with_grad(inputs[name])
    loss = koleo_loss(x)
    loss.backward()
    close(loss, expected[f"loss_{name}"], rtol=1e-2, atol=0)
    assert x.grad.isfinite().all()


def test_losses_are_computed_in_float32():
    torch.manual_seed(2)
    student, teacher = torch.randn(2, 64, 4).bfloat16(), torch.randn(2, 64, 4).softmax(dim=-1)

    def losses(student: Tensor) -> list[Tensor]:
        return [
            dino_local_loss(student, teacher),
            dino_global_loss(student, teacher, num_local=8),
            ibot_loss(student[0], teacher[0], torch.full((64,), 0.2), num_crops=4),
            koleo_loss(student[0]),  # crowded, so that a rounded product finds another neighbour
            sinkhorn_knopp(student[0], 0.05),
            RunningCentre(4)(student[0], 0.05),
        ]

    plain = losses(student.float())
    assert all(torch.equal(a, b) for a, b in zip(losses(student), plain, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(losses(student.float()), plain, strict=True))


# Targets


@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_sinkhorn_is_the_official_one(iterations):
    inputs, expected, meta = golden("loss_dino")
    found = sinkhorn_knopp(inputs["teacher_logits_step0"], meta["teacher_temp"], iterations=iterations)
    close(found, expected[f"teacher_probs_sinkhorn_iters{iterations}"], **EXACT)


@pytest.mark.parametrize(
    ("name", "rows", "iterations"), [("iters1", 18, 1), ("iters3", 18, 3), ("with_padding_rows", 23, 3)]
)
def test_sinkhorn_of_patches_is_the_official_one(name, rows, iterations):
    inputs, expected, meta = golden("loss_ibot")
    found = sinkhorn_knopp(inputs["teacher_logits_padded"][:rows], meta["teacher_temp"], iterations=iterations)
    # Upstream divides by the number of patches without the padding, and multiplies by it.
    close(found, expected[f"teacher_probs_sinkhorn_{name}"], **EXACT)


def test_sinkhorn_neither_overflows_nor_vanishes():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(3)).bfloat16() * 8
    q = (logits.double() / 0.04).exp()
    for _ in range(3):
        q = q / q.sum(dim=0)
        q = q / q.sum(dim=1, keepdim=True)
    assert (logits.float() / 0.04).exp().isinf().any()
    assert q.isfinite().all()
    found = sinkhorn_knopp(logits, 0.04)
    assert found.dtype is torch.float32
    close(found.double(), q, atol=1e-4, rtol=0)  # logits up to 700 have steps of 6e-5 in float32


def test_running_centre_of_class_tokens_is_the_official_one():
    inputs, expected, meta = golden("loss_dino")
    centre = centre_at(inputs["center_init"])
    probabilities = centre(inputs["teacher_logits_step0"], meta["teacher_temp"])
    close(probabilities, expected["teacher_probs_centering_step0"], **EXACT)
    close(centre.center, expected["center_after_softmax_step0"].flatten(), **EXACT)
    centre.update(inputs["teacher_logits_step0"])
    close(centre.center, expected["center_before_apply"].flatten(), **EXACT)
    probabilities = centre(inputs["teacher_logits_step1"], meta["teacher_temp"])
    close(probabilities, expected["teacher_probs_centering_step1"], **EXACT)
    close(centre.center, expected["center_after_update"].flatten(), **EXACT)


@pytest.mark.parametrize(("name", "rows"), [("masked_rows_only", 18), ("as_training_code", 23)])
def test_running_centre_of_patches_is_the_official_one(name, rows):
    inputs, expected, meta = golden("loss_ibot")
    centre, logits = centre_at(inputs["center_init"]), inputs["teacher_logits_padded"]
    close(centre(logits[:18], meta["teacher_temp"]), expected["teacher_probs_centering"], **EXACT)
    centre.update(logits[:rows])
    close(centre.center, expected["center_before_apply"].flatten(), **EXACT)
    centre(logits[:18], meta["teacher_temp"])
    close(centre.center, expected[f"center_after_update_{name}"].flatten(), **EXACT)


def centre_at(center: Tensor) -> RunningCentre:
    centre = RunningCentre(center.shape[-1])
    centre.load_state_dict({"center": center.flatten(), "next_center": center.flatten()})
    return centre


def test_running_centre_goes_on_from_saved_state():
    first, logits = RunningCentre(5), torch.randn(3, 4, 5)
    first(logits[0], 0.05)
    first.update(logits[0])
    resumed = RunningCentre(5)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(resumed(logits[1], 0.05), first(logits[1], 0.05))
    assert torch.equal(resumed.center, logits[0].mean(dim=0) * (1 - 0.9))
    assert torch.equal(resumed(logits[2], 0.05), first(logits[2], 0.05))  # no second move without an update


def test_running_centre_stays_where_nothing_is_masked():
    centre = centre_at(torch.arange(5.0))
    centre.update(torch.zeros(0, 5))
    assert centre(torch.zeros(0, 5), 0.05).shape == (0, 5)
    assert torch.equal(centre.center, torch.arange(5.0))


# Two processes

SHARES = {"even": (3, 3), "uneven": (5, 1), "nothing in one": (0, 6)}


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict[str, Tensor]]:
    """What each of two processes computes from its share of the rows."""
    folder = tmp_path_factory.mktemp("processes")
    run_in_two(_process, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {name: _computed(*(_share(rank, shares, x) for x in _rows())) for name, shares in SHARES.items()}
    features = _share(rank, SHARES["even"], _rows()[0])
    found |= {"koleo": _koleo(features), "own koleo": _koleo(features, global_batch=False)}
    found |= {"gather": _gathered(rank), "sharded head": _head_step(features, shard=True)}
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def _rows() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(4)
    return torch.randn(6, 8, generator=random), torch.randn(6, 8, generator=random)


def _share(rank: int, shares: tuple[int, int], rows: Tensor) -> Tensor:
    return rows.split(shares)[rank]


def _computed(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    centre = RunningCentre(8)
    centre.update(first)
    centred = centre(second, 0.05)
    centre.update(second)
    return {"sinkhorn": sinkhorn_knopp(first, 0.05), "centred": centred, "centres": centre.next_center[None]}


def _koleo(features: Tensor, **options) -> dict[str, Tensor]:
    features = with_grad(features)
    loss = koleo_loss(features, **options)
    loss.backward()
    return {"loss": loss.detach(), "grad": features.grad}


def _gathered(rank: int) -> dict[str, Tensor]:
    own = with_grad(torch.tensor([[1.0], [2.0]]) + 10 * rank)
    everyone = collectives.all_gather_with_grad(own)
    (everyone * torch.tensor([[1.0], [2.0], [3.0], [4.0]]) * (1 + rank)).sum().backward()
    largest, total = collectives.all_reduce_max(own.detach()), collectives.all_reduce_sum(own.detach())
    return {"rows": everyone.detach(), "grad": own.grad, "own": own.detach(), "largest": largest, "total": total}


def _head_step(x: Tensor, *, shard: bool) -> dict[str, Tensor]:
    torch.manual_seed(5)
    head = DinoHead(8, Head(prototypes=9, hidden=12, bottleneck=7))
    if shard:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
        distributed.fsdp.fully_shard(head, mesh=mesh)
    out = head(x)
    out.square().mean().backward()
    grads = {name: p.grad.full_tensor() if shard else p.grad for name, p in head.named_parameters()}
    return {"out": out.detach(), **grads}


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("name", ["sinkhorn", "centred"])
def test_targets_do_not_depend_on_the_number_of_processes(processes, shares, name):
    one = _computed(*_rows())
    close(torch.cat([found[shares][name] for found in processes]), one[name], atol=1e-6, rtol=1e-5)
    for found in processes:
        close(found[shares]["centres"], one["centres"], atol=1e-6, rtol=1e-5)


def test_koleo_does_not_depend_on_the_number_of_processes(processes):
    one = _koleo(_rows()[0])
    close(sum(found["koleo"]["loss"] for found in processes) / 2, one["loss"], atol=1e-6, rtol=1e-5)
    grads = torch.cat([found["koleo"]["grad"] for found in processes]) / 2  # as DDP averages them
    close(grads, one["grad"], atol=1e-6, rtol=1e-5)


def test_koleo_of_one_process_stays_within_it(processes):
    for rank, found in enumerate(processes):
        one = _koleo(_share(rank, SHARES["even"], _rows()[0]))
        close(found["own koleo"], one, atol=1e-6, rtol=1e-5)
        assert found["koleo"]["loss"] > one["loss"]  # more neighbours are nearer


def test_gathered_rows_are_in_order_and_send_gradients_home(processes):
    for rank, found in enumerate(processes):
        assert found["gather"]["rows"].flatten().tolist() == [1, 2, 11, 12]
        assert found["gather"]["grad"].flatten().tolist() == [[3, 6], [9, 12]][rank]
        assert found["gather"]["largest"].flatten().tolist() == [11, 12]
        assert found["gather"]["total"].flatten().tolist() == [12, 14]
        assert found["gather"]["own"].flatten().tolist() == [1 + 10 * rank, 2 + 10 * rank]


def test_one_process_gathers_nothing():
    x = torch.ones(2, 1)
    assert collectives.world_size() == 1
    assert all(f(x) is x for f in (collectives.all_gather_with_grad, collectives.all_reduce_sum))


def test_sharded_head_computes_the_same(processes):
    one = _head_step(_rows()[0], shard=False)
    close(torch.cat([found["sharded head"].pop("out") for found in processes]), one.pop("out"), **EXACT)
    assert one.keys() == processes[0]["sharded head"].keys()
    for found in processes:
        close(found["sharded head"], one, **EXACT)


# Masks

PLACE = {"seed": 0, "step": 0, "position": 0, "crop": 0}


@pytest.mark.parametrize("target", [0, 8, 26, 64, 115, 128])
def test_mask_sizes_are_distributed_as_the_official_ones(target):
    _, expected, _ = golden("masking_counts")
    official = expected[f"counts_target{target}"].double()
    masks = BlockMasks(grid=(16, 16))
    ours = torch.stack([masks.mask(target, **PLACE | {"position": i}).sum() for i in range(400)]).double()
    assert ours.max() == official.max() == target
    assert ours.min() >= official.min() - 1
    error = math.sqrt((official.var() + ours.var()) / 400)
    assert abs(ours.mean() - official.mean()) <= 3 * error


def test_masks_lie_where_the_official_ones_do():
    _, expected, _ = golden("masking_counts")
    official = expected["occupancy_target30pct"].double()
    masks = BlockMasks(grid=(16, 16))
    drawn = torch.stack([masks.mask(76, **PLACE | {"step": i}) for i in range(1000)]).double()
    ours = drawn.mean(dim=0).view(16, 16)
    for dim in (0, 1):  # 0.1 at the edges, 0.4 in the middle, with a standard error of 0.01
        close(ours.mean(dim=dim), official.mean(dim=dim), atol=0.03, rtol=0)


def sizes(masks: BlockMasks, target: int) -> set[tuple[int, int]]:
    """Rows and columns that masked patches of 300 masks of a grid of 16 by 16 span."""
    drawn = (masks.mask(target, **PLACE | {"position": i}).view(16, 16) for i in range(300))
    return {(int(mask.any(dim=1).sum()), int(mask.any(dim=0).sum())) for mask in drawn}


def test_blocks_are_as_large_and_as_narrow_as_allowed():
    assert sizes(BlockMasks(grid=(16, 16), min_patches=16, min_aspect=1.0), 16) == {(4, 4)}
    narrow = sizes(BlockMasks(grid=(16, 16), min_patches=16, min_aspect=0.25), 16)
    assert {(2, 8), (4, 4), (8, 2)} <= narrow


def test_no_block_is_larger_than_its_share():
    def pieces(max_share: float) -> float:
        masks = BlockMasks(grid=(16, 16), max_share=max_share)
        drawn = [masks.mask(64, **PLACE | {"position": i}).view(16, 16) for i in range(100)]
        return np.mean([label(mask.numpy(), connectivity=1).max() for mask in drawn])

    assert pieces(1 / 64) > 2 * pieces(0.5)  # of 4 patches or fewer


def test_grid_has_rows_and_columns_that_no_block_fills():
    square = {"min_patches": 16, "min_aspect": 1.0}  # blocks of 4 by 4
    sizes = {
        grid: BlockMasks(grid=grid, **square).mask(16, **PLACE).sum().item() for grid in ((4, 40), (5, 40), (40, 4))
    }
    assert sizes == {(4, 40): 0, (5, 40): 16, (40, 4): 0}
    wide = BlockMasks(grid=(5, 40)).mask(100, **PLACE).view(5, 40)
    assert wide.any(dim=0).sum() > 20  # blocks of four rows at most


def test_plan_is_spread_as_the_official_one():
    _, expected, meta = golden("masking_counts")
    official = expected["collate_sorted_counts_per_batch"].double().numpy()
    masks = BlockMasks(grid=(16, 16))
    plans = np.stack([masks.plan(16, seed=0, step=step) for step in range(60)])
    assert ((plans > 0).sum(axis=1) == meta["collate"]["images_masked_per_batch"][0]).all()
    edges = np.linspace(0.1, 0.5, 9) * 256
    ranked = np.sort(plans, axis=1)[:, 8:]
    assert (ranked >= np.floor(edges[:-1])).all()
    assert (ranked <= edges[1:]).all()
    error = np.sqrt(ranked.var(axis=0) / 60 + official[:, 8:].var(axis=0) / 60)
    assert (np.abs(ranked.mean(axis=0) - official[:, 8:].mean(axis=0)) < 4 * error + 0.2).all()
    assert (plans > 0).mean(axis=0).min() > 0.3  # every place is masked about every other time
    assert (plans > 0).mean(axis=0).max() < 0.7


def test_masks_follow_from_their_place_alone():
    masks = BlockMasks(grid=(16, 16))
    assert np.array_equal(masks.plan(10, seed=3, step=4), masks.plan(10, seed=3, step=4))
    assert torch.equal(masks.mask(60, **PLACE), masks.mask(60, **PLACE))
    for name in PLACE:
        assert not torch.equal(masks.mask(60, **PLACE), masks.mask(60, **PLACE | {name: 1})), name
    for other in ({"seed": 3, "step": 5}, {"seed": 4, "step": 4}):
        assert not np.array_equal(masks.plan(10, seed=3, step=4), masks.plan(10, **other))


@pytest.mark.parametrize(("probability", "num_crops", "masked"), [(0.5, 7, 3), (0.0, 4, 0), (1.0, 3, 3)])
def test_number_of_masked_crops_is_exact(probability, num_crops, masked):
    plan = BlockMasks(grid=(8, 8), probability=probability).plan(num_crops, seed=0, step=0)
    assert (plan > 0).sum() == masked


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"probability": 1.5}, "probability"), ({"ratio": (0.5, 0.1)}, "ratio"), ({"min_aspect": 0.0}, "aspect")],
)
def test_masks_out_of_range_are_refused(settings, word):
    with pytest.raises(RecipeError, match=word):
        BlockMasks(grid=(4, 4), **settings)
