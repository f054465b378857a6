"""Steps without a finite gradient are left out, whatever takes them."""

import math
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ztsnr.data.dataset import Batch
from ztsnr.data.tokens import TokenBatch
from ztsnr.training.guard import StepGuard
from ztsnr.training.optimizers import clip_grad_norm, make_optimizer
from ztsnr.world import World

from ..samplers.conftest import NoHostReads

WORLD = World(0, 1, 1, torch.device("cpu"))


def make_batch(size=2):
    return Batch(
        data=torch.arange(size * 12.0).reshape(size, 3, 2, 2),
        captions=["a", "ü"][:size],
        tokens=TokenBatch((torch.zeros(size, 77, dtype=torch.long),), torch.arange(size)[:, None]),
        time_ids=torch.zeros(size, 6),
        weights=torch.ones(size),
        pictures=torch.arange(size) + 40,
        planned=torch.arange(size) + 40,
        bucket=0,
        epoch=0,
        step=7,
    )


def make(name="adamw"):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(64, 80)), torch.nn.Parameter(torch.randn(3))]
    return parameters, make_optimizer(name, [{"params": parameters}], lr=0.1)


def take(guard, parameters, optimizer, step, value=1.0):
    """A step with a gradient of which one number is ``value``."""
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.01 * (step + 1))
    parameters[0].grad[0, 0] = value
    norm = clip_grad_norm(parameters, 1.0)
    return guard.step(optimizer, norm, make_batch(), torch.tensor([999, 3]), step)


def everything(parameters, optimizer):
    tensors = [parameter.detach() for parameter in parameters]
    for parameter in parameters:
        tensors += [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_such_a_step_changes_nothing(tmp_path, name, value):
    """Neither weights nor moments nor counts; and the steps behind it are those of a run without it."""
    parameters, optimizer = make(name)
    guard = StepGuard(tmp_path, 10, WORLD)
    assert take(guard, parameters, optimizer, 0) == 0
    before = everything(parameters, optimizer)
    assert take(guard, parameters, optimizer, 1, value) == 1
    assert all(map(torch.equal, before, everything(parameters, optimizer)))
    take(guard, parameters, optimizer, 2)
    assert not any(map(torch.equal, before[:2], parameters))

    others, plain = make(name)
    for step in (0, 2):
        take(StepGuard(tmp_path / "plain", 10, WORLD), others, plain, step)
    assert all(map(torch.equal, everything(parameters, optimizer), everything(others, plain)))
    assert guard.read()["steps left out"] == 1


def test_nothing_is_read_on_the_host(tmp_path):
    parameters, optimizer = make()
    guard = StepGuard(tmp_path, 10, WORLD)
    with NoHostReads():
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, math.nan)
        guard.step(optimizer, clip_grad_norm(parameters, 1.0), make_batch(), torch.tensor([999, 3]), 0)
    assert not list(tmp_path.iterdir())
    guard.look()
    assert guard.state() == {"last_bad": 0, "in_a_row": 1, "skipped": 1}


def test_the_batch_is_written_down(tmp_path):
    parameters, optimizer = make()
    guard = StepGuard(tmp_path / "bad", 10, WORLD)
    take(guard, parameters, optimizer, 3)
    take(guard, parameters, optimizer, 4, math.nan)
    guard.look()
    (path,) = (tmp_path / "bad").iterdir()
    assert path.name == "step-00000004-rank-0.safetensors"
    found = load_file(path)
    assert torch.equal(found["data"], make_batch().data)
    assert found["pictures"].tolist() == [40, 41]
    assert found["timesteps"].tolist() == [999, 3]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"captions": '["a", "ü"]', "norm": "nan"}


def test_too_many_in_a_row(tmp_path):
    """Not three with a good one between them, but three in a row; a resume between them changes nothing."""
    parameters, optimizer = make()
    guard = StepGuard(tmp_path, 3, WORLD)
    for step, value in enumerate([math.nan, math.nan, 1.0, math.nan, math.nan]):
        take(guard, parameters, optimizer, step, value)
        guard.look()
    resumed = StepGuard(tmp_path, 3, WORLD)
    resumed.load(guard.state())
    take(resumed, parameters, optimizer, 5, math.nan)
    sentence = f"in 3 steps in a row, up to step 5, .*{re.escape(str(tmp_path))}/step-00000005-rank-0.safetensors"
    with pytest.raises(ValueError, match=sentence):
        resumed.look()


def test_a_batch_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "bad").touch()
    parameters, optimizer = make()
    guard = StepGuard(tmp_path / "bad", 2, WORLD)
    take(guard, parameters, optimizer, 0, math.nan)
    assert guard.read()["steps left out"] == 1
    take(guard, parameters, optimizer, 1, math.nan)
    with pytest.raises(ValueError, match=r"up to step 1, .*; the last batch could not be written: lower"):
        guard.look()


@pytest.mark.parametrize("what", ["network", "picture", "gradient", "later"])
def test_a_first_step_without_numbers_tells_of_the_network(tmp_path, what):
    """Unless a picture has none, or only the gradient; or the network had numbers before."""
    parameters, optimizer = make()
    guard = StepGuard(tmp_path, 10, WORLD)
    batch = make_batch()
    if what == "picture":
        batch.data[0, 0, 0, 0] = math.nan
    parameters[0].grad = torch.full_like(parameters[0], math.nan)
    errors = torch.tensor([1.0, math.nan]) if what != "gradient" else torch.ones(2)
    t, norm = torch.tensor([999, 3]), clip_grad_norm(parameters[:1], 1.0)
    guard.step(optimizer, norm, batch, t, int(what == "later"), errors)
    if what == "network":
        with pytest.raises(ValueError, match=r"^the network gives numbers that are not finite in the first step"):
            guard.look()
    else:
        guard.look()
