"""Compiling once a bucket, the plan before the first step, and what is measured."""

import json
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ztsnr.data.epoch_plan import EpochPlan
from ztsnr.data.tokens import TokenBatch
from ztsnr.training.config import FinetuneSettings
from ztsnr.training.flops import unet_flops
from ztsnr.training.networks import load_networks
from ztsnr.training.settings_file import parse_settings
from ztsnr.training.speed import Speed, choose_attention
from ztsnr.world import World

from .tiny_run import make_content, train, write_pictures


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from tests.tiny_pipelines import make_tiny_sdxl

    place = tmp_path_factory.mktemp("speed")
    make_tiny_sdxl(place / "tiny", prediction_type="epsilon", zero_snr=False)
    write_pictures(place / "pictures")
    return place


def make_speed(place, world=None, said=None, **changes) -> tuple[Speed, torch.nn.Module]:
    settings = parse_settings(FinetuneSettings, make_content(place, place / "run", **changes))
    networks = load_networks(place / "tiny")
    plan = EpochPlan(torch.arange(12).numpy() % 2, [(32, 32), (48, 32)], batch_size=settings.data.batch_size)
    trained = [name for name, _ in networks.unet.named_parameters()]
    world = world or World(0, 1, 1, torch.device("cpu"))
    say = (lambda line: None) if said is None else said.append
    return Speed(settings, networks, plan, trained, True, world, say), networks.unet


def test_mfu(place, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ztsnr.training.speed.peak_flops", lambda name: 1e9)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    speed, unet = make_speed(place, World(0, 2, 2, torch.device("cpu")))
    speed.start_interval()
    speed.count(12)
    now[0] += 4.0
    each = [unet_flops(unet.requires_grad_(True), 1, latent) for latent in ((16, 16), (16, 24))]
    assert speed.read()["MFU"] == pytest.approx(3 / 2 * sum(each) / 2 / 1e9, rel=1e-12)  # six pictures of each


def test_without_a_known_peak_there_is_no_mfu(place):
    assert "MFU" not in make_speed(place)[0].read()


def test_parts_of_a_step(place):
    assert make_speed(place, data__batch_size=6)[0].micro_batch == 6
    assert make_speed(place, data__batch_size=6, optimizer__accumulation=4)[0].micro_batch == 2
    world = World(0, 2, 2, torch.device("cpu"))
    assert make_speed(place, world, data__batch_size=6, optimizer__accumulation=2)[0].micro_batch == 2


def test_the_plan_is_said_and_decides(place):
    said = []
    speed, unet = make_speed(place, said=said, speed__checkpointing="auto")
    assert "gradient checkpointing: off" in said[-1]
    speed.prepare(unet, 2)
    assert not unet.is_gradient_checkpointing
    speed, unet = make_speed(place, speed__checkpointing="full")
    speed.prepare(unet, 2)
    assert unet.is_gradient_checkpointing


def test_what_does_not_fit_is_said(place, monkeypatch):
    monkeypatch.setattr("ztsnr.training.speed._main_memory", lambda: 2**20)
    speed, unet = make_speed(place, speed__checkpointing="auto")
    with pytest.raises(ValueError, match="does not fit into the device's memory"):
        speed.prepare(unet, 2)


def test_pictures_a_second(place, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    speed, _ = make_speed(place)
    speed.start_interval()
    speed.count(6)
    now[0] += 2.0
    with speed.paused():
        now[0] += 50.0
    speed.count(6)
    now[0] += 1.0
    assert speed.read()["pictures a second"] == 4.0


def test_prompts_of_any_length_become_one_length_where_it_is_compiled(place):
    rows = torch.tensor([[0, 1], [2, 2]])
    tokens = TokenBatch((torch.zeros(3, 77),), rows)
    assert make_speed(place)[0].of_one_length(tokens) is tokens
    speed, _ = make_speed(place, speed__compile=True)
    longer = speed.of_one_length(tokens).rows
    assert longer.tolist() == [[0, 1] * 3, [2, 2] * 3]  # of at most three chunks: lcm(1, 2, 3) = 6


class AnySize(torch.nn.Module):
    """A stand-in for the U-Net, which takes no time."""

    def forward(self, x):
        return 2 * x


def test_graphs_behind_the_warm_up_are_counted_and_none_else(place, monkeypatch):
    monkeypatch.setattr("ztsnr.training.speed.compile_fx", lambda graph, inputs: graph.forward)
    monkeypatch.setattr("ztsnr.training.speed.apply_checkpointing", lambda unet, mode: None)
    torch._dynamo.reset()
    speed, _ = make_speed(place, speed__compile=True)
    unet = AnySize()
    speed.prepare(unet, 2)

    def ask(width, height):
        unet(torch.zeros(1, 4, height, width))

    speed.warm_up(lambda size, batch: ask(size[0] // 2, size[1] // 2))
    assert (speed._graphs, speed.recompiled) == (2, 0)
    ask(16, 16)
    torch.compile(torch.sin, backend="eager")(torch.zeros(3))  # as torchao compiles its step
    assert speed.recompiled == 0
    for count in range(1, 10):  # behind eight torch would stop by itself, and count no more
        ask(16, 16 + 8 * count)
        assert speed.recompiled == count


@pytest.mark.parametrize(
    ("costs", "order"),
    [
        ({"FLASH_ATTENTION": 2, "CUDNN_ATTENTION": 1, "EFFICIENT_ATTENTION": 3}, "CUDNN EFFICIENT MATH"),
        ({"FLASH_ATTENTION": 1, "CUDNN_ATTENTION": 2, "EFFICIENT_ATTENTION": 3}, "FLASH EFFICIENT MATH"),
        ({"FLASH_ATTENTION": 2, "CUDNN_ATTENTION": None, "EFFICIENT_ATTENTION": 1}, "EFFICIENT MATH"),
        ({"FLASH_ATTENTION": None, "CUDNN_ATTENTION": None, "EFFICIENT_ATTENTION": None}, "EFFICIENT MATH"),
    ],
)
def test_the_fastest_attention_comes_first(place, monkeypatch, costs, order):
    """With a stand-in for CUDA's events, and for kernels, of which some do not take the shape."""
    clock, seen = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    def attention(q, k, v):
        (name,) = (name for name in costs if _is_on(name))
        seen.append((q.shape, q.stride()))
        if costs[name] is None:
            raise RuntimeError("No available kernel. Aborting execution.")
        clock[0] += costs[name]
        return q * k * v

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    unet, said = load_networks(place / "tiny").unet, []
    found = choose_attention(unet, 3, (16, 8), torch.float32, said.append)
    assert [backend.name for backend in found] == [
        f"{n}_ATTENTION".replace("MATH_ATTENTION", "MATH") for n in order.split()
    ]
    (shape, stride) = seen[0]
    assert shape[0] == 3
    assert stride[1] == shape[3]  # heads are beside each other, as a linear layer gives them
    for backend, cost in costs.items():
        assert cost is None or f"{backend.lower()} {cost:.3f} ms" in said[0]
    with sdpa_kernel(found, set_priority=True):  # it takes them
        assert torch._C._get_sdp_priority_order()[: len(found)] == [int(backend) for backend in found]


def _is_on(name):
    kind = {"FLASH_ATTENTION": "flash", "CUDNN_ATTENTION": "cudnn", "EFFICIENT_ATTENTION": "mem_efficient"}[name]
    return getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()


def test_attention_that_is_there_is_timed(place, monkeypatch):
    """On the processor flash attention alone is a kernel of its own."""
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: _Clock())
    unet = load_networks(place / "tiny").unet
    found = choose_attention(unet, 1, (16, 16), torch.float32, lambda line: None, runs=2)
    assert found == [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class _Clock:
    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.mark.slow
def test_compiled_once_a_bucket_and_never_again(place, tmp_path):
    compiled = tmp_path / "compiled"
    content = make_content(place, compiled, steps=6, speed__compile=True, watch__validate_every=3)
    content["data"] |= {"buckets": ["32x32,48x32"], "validation_share": 0.2}
    train(content)
    train(content | {"out": str(tmp_path / "eager"), "speed": {"compile": False, "checkpointing": "off"}})
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (compiled, tmp_path / "eager")
    ]
    assert [row["recompiled"] for row in rows[0] if "recompiled" in row] == [0] * 6
    for ours, plain in zip(*rows, strict=True):
        for name in ("loss", "gradient norm", "validation"):
            if name in plain:
                assert ours[name] == pytest.approx(plain[name], rel=1e-4)
