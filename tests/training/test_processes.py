"""Two processes learn what one with the same global batch learns, whatever they share and however."""

import pytest
import torch
from safetensors.torch import load_file
from training_runs import STEPS, TINY, in_processes, lines, losses, train

from vitreg_hub.training.run.measured import read_best

pytestmark = pytest.mark.long

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs in one process, in folders of their names."""
    folder = tmp_path_factory.mktemp("alone")
    for name, recipe in TINY.items():
        train(recipe, folder / name)
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def together(request, tmp_path_factory, warm_python):
    """The same runs in two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    in_processes(2, TINY, folder, python=warm_python.executable, sharding=request.param)
    return folder


@pytest.mark.parametrize("name", TINY)
def test_two_processes_learn_as_one(name, alone, together):
    one, two = losses(alone / name), losses(together / name)
    assert len(one) == len(two) == STEPS
    assert two == pytest.approx(one, abs=TOLERANCE)
    assert one[0] != pytest.approx(one[-1], abs=100 * TOLERANCE)  # there was something to learn
    first, second = (load_file(run / name / "model" / "model.safetensors") for run in (alone, together))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], atol=2e-3, rtol=0)  # Adam takes the sign of tiny gradients


@pytest.mark.parametrize("name", TINY)
def test_evaluation_is_the_same(name, alone, together):
    one, two = ({k: v for line in lines(run / name) for k, v in line.items() if "/" in k} for run in (alone, together))
    assert one.keys() == two.keys()
    assert any(key.startswith("artifacts/block_0/") for key in one)
    assert two["eval/knn_accuracy"] == pytest.approx(one["eval/knn_accuracy"], abs=1.5 / 32)  # one image may flip


@pytest.mark.parametrize("name", TINY)
def test_best_model_is_that_of_one_process(name, alone, together):
    first, second = (load_file(run / name / "best" / "model.safetensors") for run in (alone, together))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], atol=2e-3, rtol=0)  # Adam takes the sign of tiny gradients
    one, two = (read_best(run / name, TINY[name]) for run in (alone, together))
    assert (two.name, two.step) == (one.name, one.step) == (one.name, STEPS)
    assert two.score == pytest.approx(one.score, abs=1.5 / 32)  # one image may flip


@pytest.mark.parametrize("name", TINY)
def test_one_process_goes_on_where_two_were(name, alone, together, tmp_path):
    """Checkpoints know of no processes: neither weights nor optimiser nor the place in the data."""
    train(TINY[name], tmp_path / "on", resume=str(together / name / "checkpoints" / "step_0000002"))
    assert losses(tmp_path / "on") == pytest.approx(losses(alone / name)[2:], abs=TOLERANCE)
