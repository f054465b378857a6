"""Averages against their sums in float64, and averages made of snapshots against those that were tracked."""

import math
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ztsnr.training.ema import WIDEST, ConstantDecay, Ema, PowerFunction, combine, gamma_of, post_hoc

PROFILES = (PowerFunction(0.05), PowerFunction(0.10), ConstantDecay(0.97))


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv.weight": (8, 4, 3, 3), "norm.bias": (8,), "scale": ()}
    return {name: torch.randn(shape, generator=generator).to(dtype).requires_grad_() for name, shape in shapes.items()}


def train(named, ema, steps, first=1):
    """Random steps of the parameters; returns the path of each as (steps, ...) float64."""
    path = {name: [] for name in named}
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in named.items():
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
            path[name].append(parameter.detach().double())
        ema.update(step)
    return {name: torch.stack(values) for name, values in path.items()}


def shares(profile, steps):
    """What share of an average each step has, from the definition of its profile and not by recursion."""
    tau = np.arange(1, steps + 1)
    if isinstance(profile, ConstantDecay):
        weights = profile.decay ** (steps - tau)
        return torch.from_numpy(weights / weights.sum())
    # the integral of (g + 1) u^g / t^(g + 1) over (tau - 1, tau), by Gauss and Legendre's rule
    gamma = gamma_of(profile.sigma_rel)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    times = tau[:, None] - 0.5 + nodes / 2
    return torch.from_numpy(((gamma + 1) * (times / steps) ** gamma / steps) @ (weights / 2))


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


# ----------------------------------------------------------------------------------------------------------------------
# During training


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
@pytest.mark.parametrize("steps", [1, 2, 150])
def test_average_is_the_weighted_sum(profile, steps):
    named = parameters()
    ema = Ema(named, [profile])
    path = train(named, ema, steps)
    weights = shares(profile, steps)
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    for name, average in ema.tensors(profile).items():
        expected = torch.tensordot(weights, path[name], dims=1)
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_updates_every_few_steps_hold_the_weights_meanwhile(profile):
    named = parameters()
    ema = Ema(named, [profile], every=5)
    path = train(named, ema, 62)
    weights = shares(profile, 60).view(12, 5).sum(1)
    assert ema.step == 60
    for name, average in ema.tensors(profile).items():
        expected = torch.tensordot(weights, path[name][4:60:5], dims=1)
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=2e-6)


def test_parameters_in_bfloat16_are_averaged_in_float32():
    named = parameters(torch.bfloat16)
    ema = Ema(named, PROFILES)
    path = train(named, ema, 30)
    for profile in PROFILES:
        average = ema.tensors(profile)["conv.weight"]
        expected = torch.tensordot(shares(profile, 30), path["conv.weight"], dims=1)
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_in_main_memory_it_is_the_same(dtype):
    left, right = parameters(dtype), parameters(dtype)
    here, there = Ema(left, PROFILES, every=2), Ema(right, PROFILES, device="cpu", every=2)
    train(left, here, 21)
    train(right, there, 21)
    for profile in PROFILES:
        assert same(here.tensors(profile), there.tensors(profile))


def test_copies_lie_in_memory_as_the_parameters_do():
    """Else a device would have to sort each tensor anew before it is sent."""
    weight = torch.rand(4, 3, 3, 3).to(memory_format=torch.channels_last)
    ema = Ema({"weight": weight}, PROFILES, device="cpu")
    ema.update(1)
    assert [copy.stride() for copy in ema._copies.receive()] == [weight.stride()]
    for profile in PROFILES:
        average = ema.tensors(profile)["weight"]
        assert average.stride() == weight.stride()
        assert torch.equal(average, weight)


class OnCuda(torch.Tensor):
    is_cuda = True


def test_copies_are_sent_beside_the_next_step_and_before_the_parameters_change(monkeypatch):
    """With a stand-in for CUDA's streams."""
    said, now, real = [], ["main"], torch.empty_like

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            said.append(f"{self.name} waits for event of {event.of}")

    class Event:
        def record(self, stream):
            self.of = stream.name
            said.append("event")

        def synchronize(self):
            said.append("host waits")

    @contextmanager
    def on(stream):
        now[0] = stream.name
        yield
        now[0] = "main"

    class Buffer(torch.Tensor):
        def copy_(self, source, non_blocking):
            said.append(f"copied on {now[0]}, {'not ' * (not non_blocking)}in passing")
            return super().copy_(source.as_subclass(torch.Tensor))

    def pinned(tensor, device, pin_memory):
        assert (device, pin_memory) == ("cpu", True)
        return real(tensor.as_subclass(torch.Tensor)).as_subclass(Buffer)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch, "empty_like", pinned)
    monkeypatch.setattr(Ema, "_lerp", lambda *_: said.append("average"))
    ema = Ema({"weight": torch.ones(3).as_subclass(OnCuda)}, [ConstantDecay(0.5)], device="cpu")
    ema.update(1)
    assert said == ["side waits for main", "copied on side, in passing", "event"]
    ema.settle()
    assert said[3:] == ["main waits for event of side"]
    ema.update(2)
    assert said[4:] == ["host waits", "average", *said[:3]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_main_memory_of_a_device():
    named = {name: parameter.detach().cuda() for name, parameter in parameters().items()}
    on_device, in_memory = Ema(named, PROFILES), Ema(named, PROFILES, device="cpu")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 20):
            in_memory.settle()
            for parameter in named.values():
                parameter.mul_(0.9).add_(0.01 * step)
            on_device.update(step)
            in_memory.update(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for profile in PROFILES:
        for name, average in in_memory.tensors(profile).items():
            assert average.device.type == "cpu"
            torch.testing.assert_close(average, on_device.tensors(profile)[name].cpu(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_and_back(dtype):
    named = parameters(dtype)
    ema = Ema(named, PROFILES)
    train(named, ema, 10)
    weights, averages = clones(named), clones(ema.tensors(PROFILES[1]))
    addresses = [parameter.data_ptr() for parameter in named.values()]
    with suppress(KeyboardInterrupt), ema.applied(PROFILES[1]):
        assert all(torch.equal(named[name], averages[name].to(dtype)) for name in named)
        assert not same(named, weights)
        raise KeyboardInterrupt
    assert same(named, weights)
    assert same(ema.tensors(PROFILES[1]), averages)
    assert addresses == [parameter.data_ptr() for parameter in named.values()]  # optimizers and FSDP hold on to them


@pytest.mark.parametrize("device", [None, "cpu"])
def test_resumed_it_is_the_same(device):
    named = parameters()
    ema = Ema(named, PROFILES, device=device)
    train(named, ema, 7)
    saved, weights = clones(ema.state_tensors()), clones(named)
    train(named, ema, 5, first=8)

    resumed = {name: weight.detach().clone() for name, weight in weights.items()}
    again = Ema(resumed, PROFILES, device=device)
    again.load_state_tensors(saved)
    assert again.step == 7
    train(resumed, again, 5, first=8)
    for profile in PROFILES:
        assert same(again.tensors(profile), ema.tensors(profile))


def test_state_can_be_loaded_in_place():
    """As torch.distributed.checkpoint does."""
    named = parameters()
    ema, other = Ema(named, PROFILES), Ema(named, PROFILES)
    train(named, ema, 7)
    state = other.state_tensors()
    for name, tensor in ema.state_tensors().items():
        state[name].copy_(tensor)
    other.load_state_tensors(state)
    assert other.step == 7
    assert same(other.state_tensors(), ema.state_tensors())


# ----------------------------------------------------------------------------------------------------------------------
# Power functions


@pytest.mark.parametrize("sigma_rel", [0.001, 0.01, 0.05, 0.075, 0.10, 0.25, WIDEST])
def test_gamma_gives_sigma_rel(sigma_rel):
    gamma = gamma_of(sigma_rel)
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(sigma_rel, rel=1e-12)
    # and it is the standard deviation of the profile
    edges = np.linspace(0, 1, 20001)
    weights = np.diff(edges ** (gamma + 1))
    middles = (edges[1:] + edges[:-1]) / 2
    deviation = math.sqrt(weights @ middles**2 - (weights @ middles) ** 2)
    assert deviation == pytest.approx(sigma_rel, rel=1e-3)


def test_gammas_of_the_paper():
    """EDM2 prints gamma = 16.97 for 5 % and 6.94 for 10 %."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


# ----------------------------------------------------------------------------------------------------------------------
# Afterwards


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """2000 steps of 4096 random walks that are drawn back; snapshots of two profiles every 250, and others tracked."""
    folder = tmp_path_factory.mktemp("snapshots")
    generator = torch.Generator().manual_seed(1)
    weights = {"a.weight": torch.randn(64, 60, generator=generator), "b.bias": torch.randn(256, generator=generator)}
    start = clones(weights)
    tracked = [PowerFunction(sigma) for sigma in (0.05, 0.075, 0.10, 0.15)]
    ema, files = Ema(weights, tracked), []
    middle = {}
    for step in range(1, 2001):
        for weight in weights.values():
            weight.mul_(0.999).add_(0.05 * torch.randn(weight.shape, generator=generator))
        ema.update(step)
        if step % 250 == 0:
            for profile in (tracked[0], tracked[2]):
                files.append(folder / f"{profile.name}-{step}.safetensors")
                ema.save_snapshot(files[-1], profile)
        if step == 1100:
            middle = {profile.sigma_rel: clones(ema.tensors(profile)) for profile in tracked}
    assert len(files) == 16
    final = {profile.sigma_rel: clones(ema.tensors(profile)) for profile in tracked}
    return {"start": start, "files": files, 1100: middle, 2000: final, "weights": clones(weights)}


def relative_error(found, expected, reference):
    """Of what training changed."""
    flat = [torch.cat([tensors[name].double().flatten() for name in expected]) for tensors in (found, expected)]
    origin = torch.cat([reference[name].double().flatten() for name in expected])
    return float((flat[0] - flat[1]).norm() / (flat[1] - origin).norm())


@pytest.mark.parametrize(
    ("sigma_rel", "step", "reached"),
    [
        (0.05, 2000, 1e-6),  # which is among the snapshots, like the next
        (0.10, 2000, 1e-6),
        (0.075, 2000, 1.5e-3),  # 1.1e-3
        (0.15, 2000, 3e-3),  # 2.1e-3
        (0.075, 1100, 0.12),  # 0.095: between snapshots only those behind know of the last steps
    ],
)
def test_post_hoc_is_what_was_tracked(synthetic, sigma_rel, step, reached):
    """The error is a share of what training changed, of which the weights without any average are off by 0.25 to 1."""
    found = post_hoc(synthetic["files"], sigma_rel, step=step)
    expected = synthetic[step][sigma_rel]
    assert relative_error(found, expected, synthetic["start"]) < reached
    assert relative_error(synthetic["weights"], expected, synthetic["start"]) > 0.2


def test_coefficients_are_the_constrained_least_squares():
    """Against a fit of the profiles themselves, step by step."""
    steps = np.repeat([250, 500, 750, 1000], 2)
    sigmas = np.tile([0.05, 0.10], 4)
    columns = np.zeros((1000, 8))
    for column, (step, sigma) in enumerate(zip(steps, sigmas, strict=True)):
        columns[:step, column] = shares(PowerFunction(sigma), int(step))
    target = shares(PowerFunction(0.08), 1000).numpy()
    found = combine(
        [(step, gamma_of(sigma)) for step, sigma in zip(steps, sigmas, strict=True)], (1000, gamma_of(0.08))
    )
    assert found.sum() == pytest.approx(1, abs=1e-12)
    # the last coefficient is 1 minus the others
    free = np.linalg.lstsq(columns[:, :-1] - columns[:, -1:], target - columns[:, -1])[0]
    np.testing.assert_allclose(found[:-1], free, atol=2e-3)
    best = np.linalg.norm(columns @ np.append(free, 1 - free.sum()) - target)
    assert np.linalg.norm(columns @ found - target) < best * (1 + 1e-5)


def test_what_all_snapshots_share_comes_out_as_it_is(tmp_path):
    weights = {"a": torch.randn(1000)}
    ema, files = Ema(weights), []
    for step in range(1, 9):
        ema.update(step)
        for profile in ema.profiles:
            files.append(tmp_path / f"{profile.name}-{step}.safetensors")
            ema.save_snapshot(files[-1], profile)
    torch.testing.assert_close(post_hoc(files, 0.02)["a"], weights["a"], rtol=2e-6, atol=0)


def test_snapshot_holds_the_average(tmp_path):
    named = parameters()
    ema = Ema(named, PROFILES)
    train(named, ema, 9)
    for profile in PROFILES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            ema.save_snapshot(tmp_path / "snapshot.safetensors", profile, dtype=dtype)
            with safe_open(tmp_path / "snapshot.safetensors", "pt") as file:
                assert file.metadata()["ztsnr.ema"] == profile.name
                assert file.metadata()["ztsnr.ema_step"] == "9"
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert same(found, {name: tensor.to(dtype) for name, tensor in ema.tensors(profile).items()})


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PowerFunction(0), "sigma_rel must be above 0"),
        (lambda: PowerFunction(0.3), "sigma_rel must be above 0"),
        (lambda: ConstantDecay(1), "between 0 and 1"),
        (lambda: Ema(parameters(), [PowerFunction(0.1), PowerFunction(0.1)]), "two averages have the same profile"),
        (lambda: post_hoc([], 0.1), "no snapshots"),
    ],
)
def test_mistakes_end_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_mistakes_with_files_end_in_a_sentence(tmp_path):
    named = parameters()
    ema = Ema(named, PROFILES)
    train(named, ema, 2)
    with pytest.raises(ValueError, match="give a later step than 2"):
        ema.update(2)
    power, constant = tmp_path / "power.safetensors", tmp_path / "constant.safetensors"
    ema.save_snapshot(power, PROFILES[0])
    ema.save_snapshot(constant, PROFILES[2])
    with pytest.raises(ValueError, match=r"constant.safetensors is not a snapshot of a power-function average"):
        post_hoc([power, constant], 0.1)
    with pytest.raises(ValueError, match="step must be from 1 to 2, the last snapshot's, not 3"):
        post_hoc([power], 0.1, step=3)
    del named["scale"]
    smaller = Ema(named, PROFILES)
    with pytest.raises(ValueError, match="no average before the first update"):
        smaller.save_snapshot(constant, PROFILES[0])
    smaller.update(1)
    smaller.save_snapshot(constant, PROFILES[0])
    with pytest.raises(ValueError, match="only some of them have scale"):
        post_hoc([power, constant], 0.1)
    with pytest.raises(ValueError, match=r"such as \S+\.scale"):
        Ema(named, PROFILES).load_state_tensors(ema.state_tensors())
