"""Optimizers against their papers in float64; their state through files, and on two ranks that train one model."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import fully_shard

from ztsnr.training.ema import Ema, PowerFunction
from ztsnr.training.learning_rate import lr_factor, set_lr
from ztsnr.training.optimizers import (
    ENTRIES,
    LOW_BIT,
    OPTIMIZERS,
    clip_grad_norm,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)

from .forked_ranks import run_ranks

LIBRARIES = {name: entry.library for name, entry in ENTRIES.items() if entry.library}
SHAPES = {"linear.weight": (64, 80), "conv.weight": (32, 16, 3, 3), "norm.bias": (32,), "scale": ()}
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _uncompiled():
    """torchao compiles its step, which takes 10 s and more a shape and does the same; see the slow test."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(params=OPTIMIZERS)
def name(request):
    if request.param in LIBRARIES:
        pytest.importorskip(LIBRARIES[request.param])
    return request.param


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def gradient(name, step):
    generator = torch.Generator().manual_seed(1000 * step + len(name))
    return torch.randn(SHAPES[name], generator=generator) * 10.0 ** -(len(name) % 3)


def take_steps(optimizer, named, steps):
    for step in steps:
        for name, parameter in named.items():
            parameter.grad = gradient(name, step).to(parameter.dtype)
        set_lr(optimizer, lr_factor(step, warmup_steps=4))
        torch.manual_seed(step)  # of stochastic rounding
        optimizer.step()


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def clones(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def relative_error(found, expected, start):
    return float((found.double() - expected).norm() / (expected - start.double()).norm())


# ----------------------------------------------------------------------------------------------------------------------
# Against the papers


def adamw(start, gradients, lrs):
    """AdamW, algorithm 2 of arXiv 1711.05101."""
    (beta1, beta2), m, v, theta = SETTINGS["betas"], 0, 0, start.double()
    for t, (g, lr) in enumerate(zip(gradients, lrs, strict=True), 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        step = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + SETTINGS["eps"])
        theta = theta - lr * (step + SETTINGS["weight_decay"] * theta)
    return theta


def adafactor(start, gradients, lrs):
    """Adafactor, algorithms 4 and 5 of arXiv 1804.04235, with a given step size."""
    theta, row, column = start.double(), 0, 0
    for t, (g, lr) in enumerate(zip(gradients, lrs, strict=True), 1):
        beta, squares = 1 - t**-0.8, g**2 + 1e-30
        if g.ndim < 2:
            row = second = beta * row + (1 - beta) * squares
        else:
            row = beta * row + (1 - beta) * squares.sum(-1, keepdim=True)
            column = beta * column + (1 - beta) * squares.sum(-2, keepdim=True)
            second = row * column / row.sum(-2, keepdim=True)
        u = g / second.sqrt()
        u = u / max(1.0, u.square().mean().sqrt())
        theta = theta - lr * (u + SETTINGS["weight_decay"] * theta)
    return theta


@pytest.mark.parametrize("algorithm", [adamw, adafactor], ids=lambda algorithm: algorithm.__name__)
def test_three_steps_in_float64(algorithm):
    named = parameters()
    start = clones(named)
    take_steps(make_optimizer(algorithm.__name__, [{"params": list(named.values())}], **SETTINGS), named, range(3))
    for name, parameter in named.items():
        gradients = [gradient(name, step).double() for step in range(3)]
        expected = algorithm(start[name], gradients, [0.25e-3, 0.5e-3, 0.75e-3])
        assert relative_error(parameter.detach(), expected, start[name]) < 3e-4  # of 1e-3, in numbers of 6e-8
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "most"), [("adamw8bit", 0.03), ("adamw4bit", 0.3), ("bnb_adamw8bit", 0.03)])
def test_low_bits_come_near(name, most):
    """Moments of large parameters are quantised, which shows, and small ones are as exact as AdamW's."""
    pytest.importorskip(LIBRARIES[name])
    named = parameters()
    start = clones(named)
    take_steps(make_optimizer(name, [{"params": list(named.values())}], **SETTINGS), named, range(3))
    for name_, parameter in named.items():
        gradients = [gradient(name_, step).double() for step in range(3)]
        expected = adamw(start[name_], gradients, [0.25e-3, 0.5e-3, 0.75e-3])
        error = relative_error(parameter.detach(), expected, start[name_])
        assert error < (most if parameter.numel() >= 4096 else 3e-4)
        assert (error > 1e-3) == (parameter.numel() >= 4096)


def test_fused_is_what_the_plain_loop_is_and_always_the_same():
    results = []
    for make in (
        lambda groups: make_optimizer("adamw", groups, **SETTINGS),
        lambda groups: make_optimizer("adamw", groups, **SETTINGS),
        lambda groups: torch.optim.AdamW([{**groups[0], "initial_lr": 1e-3}], **SETTINGS, foreach=False, fused=False),
    ):
        named = parameters()
        optimizer = make([{"params": list(named.values())}])
        take_steps(optimizer, named, range(20))
        results.append(clones(named))
    assert optimizer.defaults["fused"] is False
    assert same(results[0], results[1])
    for name in SHAPES:
        torch.testing.assert_close(results[0][name], results[2][name], rtol=0, atol=1e-6)


def test_first_steps_are_those_of_optimizers_that_create_their_own_state(name):
    """What ``make_optimizer`` adds changes nothing."""
    named, others = parameters(), parameters()
    optimizer = make_optimizer(name, [{"params": list(named.values())}], **SETTINGS)
    other = make_optimizer(name, [{"params": list(others.values())}], **SETTINGS)
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in optimizer_tensors(optimizer, named).items()}
    other.state.clear()
    take_steps(optimizer, named, range(3))
    take_steps(other, others, range(3))
    assert same(named, others)
    assert shapes == {key: (tensor.shape, tensor.dtype) for key, tensor in optimizer_tensors(optimizer, named).items()}


def test_groups_have_their_own_learning_rates(name):
    named = {key: nn.Parameter(torch.ones(4096)) for key in ("a", "b")}
    groups = [{"params": [named["a"]]}, {"params": [named["b"]], "lr": 2e-3, "weight_decay": 0.0}]
    optimizer = make_optimizer(name, groups, **SETTINGS)
    for parameter in named.values():
        parameter.grad = torch.zeros(4096)
    set_lr(optimizer, 0.5)
    optimizer.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.5e-3, 1e-3])
    # without a gradient only weight decay is left
    torch.testing.assert_close(named["a"].detach(), torch.full((4096,), 1 - 0.5e-3 * 0.1), rtol=0, atol=1e-7)
    assert torch.equal(named["b"].detach(), torch.ones(4096))


@pytest.mark.parametrize("name", LOW_BIT)
def test_stochastic_rounding_is_right_in_the_mean(name):
    """Updates of a quarter of the step between bfloat16 numbers: lost without, and kept in the mean."""
    pytest.importorskip("torchao")
    count, lr = 2**16, 2.0**-10
    for rounds in (False, True):
        parameter = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
        optimizer = make_optimizer(
            name, [{"params": [parameter]}], lr=lr, weight_decay=0.0, eps=0.0, bf16_stochastic_round=True
        )
        optimizer.bf16_stochastic_round = rounds
        parameter.grad = torch.ones(count, dtype=torch.bfloat16)
        torch.manual_seed(0)
        optimizer.step()
        values, counts = parameter.detach().unique(return_counts=True)
        if not rounds:
            assert values.tolist() == [1.0]
            continue
        assert values.tolist() == [1 - 2.0**-8, 1.0]
        share = counts[0].item() / count
        assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / count))


@pytest.mark.parametrize("name", LOW_BIT)
def test_second_moments_of_small_parameters_decay_in_bfloat16_too(name):
    """By 0.1 % a step, which the 8 bits of a bfloat16 moment would round away."""
    pytest.importorskip("torchao")
    parameter = nn.Parameter(torch.zeros(32, dtype=torch.bfloat16))
    optimizer = make_optimizer(name, [{"params": [parameter]}], lr=1e-3, betas=(0.9, 0.999), bf16_stochastic_round=True)
    for step in range(100):
        parameter.grad = torch.full((32,), 1.0 if step == 0 else 0.0, dtype=torch.bfloat16)
        optimizer.step()
    moment = optimizer_tensors(optimizer, {"p": parameter})["p.exp_avg_sq"]
    torch.testing.assert_close(moment, torch.full((32,), 0.001 * 0.999**99), rtol=1e-5, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Learning rates


def test_schedules_are_their_formulas():
    steps = np.arange(1200)
    ramp = np.minimum((steps + 1) / 100, 1)
    constant = [lr_factor(int(step), warmup_steps=100) for step in steps]
    np.testing.assert_allclose(constant, ramp)
    cosine = [
        lr_factor(int(step), schedule="cosine", warmup_steps=100, total_steps=1000, final_share=0.1) for step in steps
    ]
    angle = np.clip((steps - 100) / 900, 0, 1) * np.pi
    np.testing.assert_allclose(cosine, ramp * (0.1 + 0.9 * np.cos(angle / 2) ** 2))
    assert cosine[550] == pytest.approx(0.55)
    assert cosine[1000:] == pytest.approx([0.1] * 200)
    rsqrt = [lr_factor(int(step), schedule="rsqrt", warmup_steps=100, reference_steps=300) for step in steps]
    np.testing.assert_allclose(rsqrt[:300], ramp[:300])
    np.testing.assert_allclose(np.array(rsqrt[300:]) ** -2, steps[300:] / 300)
    assert [lr_factor(step, schedule="constant") for step in (0, 10**9)] == [1, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Clipping


@pytest.mark.parametrize(("max_norm", "is_scaled"), [(1.0, True), (1e4, False), (None, False)])
def test_clipping(max_norm, is_scaled):
    named = parameters()
    for name, parameter in named.items():
        parameter.grad = gradient(name, 0)
    named["unused"] = nn.Parameter(torch.ones(3))
    gradients = np.concatenate([gradient(name, 0).double().flatten().numpy() for name in SHAPES])
    norm = clip_grad_norm(named.values(), max_norm)
    assert norm.shape == ()
    assert float(norm) == pytest.approx(math.sqrt(math.fsum(gradients**2)), rel=1e-6)
    clipped = np.concatenate([named[name].grad.double().flatten().numpy() for name in SHAPES])
    expected = gradients * (max_norm / np.linalg.norm(gradients)) if is_scaled else gradients
    np.testing.assert_allclose(clipped, expected, rtol=2e-6)


# ----------------------------------------------------------------------------------------------------------------------
# State


def resume_bit_for_bit(name, folder, dtype=torch.float32):
    settings = SETTINGS | {"bf16_stochastic_round": dtype == torch.bfloat16}
    named = parameters(dtype)
    optimizer = make_optimizer(name, [{"params": list(named.values())}], **settings)
    take_steps(optimizer, named, range(3))
    state = optimizer_tensors(optimizer, named)
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder)), no_dist=True)
    weights = clones(named)
    take_steps(optimizer, named, range(3, 6))

    resumed = {key: nn.Parameter(weight) for key, weight in weights.items()}
    other = make_optimizer(name, [{"params": list(resumed.values())}], **settings)
    loaded = clones(optimizer_tensors(other, resumed))  # on two ranks, below, in place
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    load_optimizer_tensors(other, resumed, loaded)
    assert all(torch.equal(resumed[key], weights[key]) for key in resumed)
    take_steps(other, resumed, range(3, 6))
    assert same(resumed, named)
    assert same(optimizer_tensors(other, resumed), optimizer_tensors(optimizer, named))
    return optimizer_tensors(optimizer, named)


def test_resumed_it_is_the_same(name, tmp_path):
    state = resume_bit_for_bit(name, tmp_path)
    quantised = [key for key, tensor in state.items() if tensor.dtype == torch.uint8]
    assert len(quantised) == (4 if name in LIBRARIES else 0)
    assert {float(tensor) for key, tensor in state.items() if key.endswith(".step")} == {6}


@pytest.mark.parametrize("name", LOW_BIT)
def test_resumed_with_stochastic_rounding_it_is_the_same(name, tmp_path):
    pytest.importorskip("torchao")
    resume_bit_for_bit(name, tmp_path, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOW_BIT)
def test_resumed_and_compiled_it_is_the_same(name, tmp_path):
    pytest.importorskip("torchao")
    torch.compiler.set_stance("default")
    resume_bit_for_bit(name, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Sharded parameters


def small_model():
    """A model whose first layer's rows divide among two ranks, and the second's do not."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 65))


def whole(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def train_model(model, optimizer, ema, steps):
    norms = []
    for step in steps:
        optimizer.zero_grad()
        inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().mul(100).backward()
        norms.append(clip_grad_norm(model.parameters(), 1.0))
        optimizer.step()
        ema.update(step + 1)
    return torch.stack(norms)


# float32 sums come in another order, and low-bit optimizers quantise nothing where the rows are uneven
NEAR = {"adamw": 1e-5, "adafactor": 1e-5, "adamw8bit": 2e-3, "adamw4bit": 2e-2}


def train_as_a_rank(place, names):
    """On two ranks, and alone for comparison; what differs ends the process."""
    torch.compiler.set_stance("force_eager")
    dist.init_process_group("gloo")
    profile = PowerFunction(0.1)
    for name in names:
        runs = []
        for is_sharded in (False, True):
            model = small_model()
            if is_sharded:
                fully_shard(model)
            named = dict(model.named_parameters())
            optimizer = make_optimizer(name, [{"params": list(named.values())}], **SETTINGS)
            ema = Ema(named, [profile])
            norms = train_model(model, optimizer, ema, range(3))
            with ema.applied(profile):
                output = model(torch.ones(1, 64)).detach()
                if is_sharded:
                    model.reshard()
            averages = {key: whole(average) for key, average in ema.tensors(profile).items()}
            runs.append({"norms": norms, "output": output, **averages})
        for key, expected in runs[0].items():
            torch.testing.assert_close(runs[1][key], expected, rtol=NEAR[name], atol=NEAR[name])
        ema.save_snapshot(place / f"{name}.safetensors", profile)

        # and through a checkpoint
        saved = optimizer_tensors(optimizer, named) | {f"ema.{k}": v for k, v in ema.state_tensors().items()}
        dcp.save(saved, storage_writer=HuggingFaceStorageWriter(str(place / name), save_distributed=True))
        weights = {key: parameter.detach().clone() for key, parameter in named.items()}
        train_model(model, optimizer, ema, range(3, 5))
        expected = [whole(tensor) for tensor in (*named.values(), *ema.state_tensors().values())]
        with torch.no_grad():
            for key, parameter in named.items():
                parameter.copy_(weights[key])
        optimizer = make_optimizer(name, [{"params": list(named.values())}], **SETTINGS)
        ema = Ema(named, [profile])
        of_optimizer, of_ema = optimizer_tensors(optimizer, named), ema.state_tensors()
        loaded = of_optimizer | {f"ema.{key}": tensor for key, tensor in of_ema.items()}
        dcp.load(loaded, storage_reader=HuggingFaceStorageReader(str(place / name)))
        load_optimizer_tensors(optimizer, named, {key: loaded[key] for key in of_optimizer})
        ema.load_state_tensors({key: loaded[f"ema.{key}"] for key in of_ema})
        train_model(model, optimizer, ema, range(3, 5))
        found = [whole(tensor) for tensor in (*named.values(), *ema.state_tensors().values())]
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), name
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "names", [["adamw", "adamw8bit"], pytest.param(list(NEAR), marks=pytest.mark.slow)], ids="-".join
)
def test_two_ranks_train_as_one(names, tmp_path):
    pytest.importorskip("torchao")
    run_ranks(train_as_a_rank, tmp_path, names, log=tmp_path / "said.log")
    assert len(list(tmp_path.glob("*.safetensors"))) == len(names)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("name", "dtype", "changes", "sentence"),
    [
        ("adam", torch.float32, {}, "no optimizer 'adam'"),
        ("adamw", torch.float32, {"bf16_stochastic_round": True}, "does not round stochastically"),
        ("adamw", torch.bfloat16, {}, "small updates are lost"),
        ("adamw8bit", torch.float16, {"bf16_stochastic_round": True}, "small updates are lost"),
    ],
)
def test_mistakes_end_in_a_sentence(name, dtype, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_optimizer(name, [{"params": list(parameters(dtype).values())}], lr=1e-3, **changes)


@pytest.mark.parametrize("name", LIBRARIES)
def test_missing_libraries_end_in_a_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    monkeypatch.setitem(sys.modules, f"{LIBRARIES[name]}.optim", None)
    with pytest.raises(ValueError, match=f"needs {LIBRARIES[name]}: pip install"):
        make_optimizer(name, [{"params": list(parameters().values())}], lr=1e-3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"schedule": "linear"}, "no learning-rate schedule 'linear'"),
        ({"schedule": "cosine"}, "needs total_steps above the 0"),
        ({"schedule": "cosine", "warmup_steps": 9, "total_steps": 9}, "needs total_steps above the 9"),
        ({"schedule": "rsqrt"}, "needs reference_steps"),
    ],
)
def test_mistakes_in_schedules_end_in_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        lr_factor(0, **arguments)


def test_state_of_another_optimizer_ends_in_a_sentence():
    named = parameters()
    state = clones(optimizer_tensors(make_optimizer("adamw", [{"params": list(named.values())}], lr=1e-3), named))
    other = make_optimizer("adafactor", [{"params": list(named.values())}], lr=1e-3)
    with pytest.raises(ValueError, match=r"the saved state has .*: resume with the optimizer"):
        load_optimizer_tensors(other, named, state)
    state["scale.exp_avg"] = torch.zeros(2)
    adamw_ = make_optimizer("adamw", [{"params": list(named.values())}], lr=1e-3)
    with pytest.raises(ValueError, match=r"the saved scale.exp_avg is \(2,\)"):
        load_optimizer_tensors(adamw_, named, state)
