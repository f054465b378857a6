"""What is planned is what networks, optimizers and steps of the same sizes take, byte by byte."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile, record_function

from tests.full_size import UNETS
from ztsnr.training.checkpointing import MODES, apply_checkpointing
from ztsnr.training.fake_step import FakeStep
from ztsnr.training.memory_plan import (
    GIB,
    LiveBytes,
    measure_activations,
    measure_encoding,
    plan,
    shard_units,
    state_bytes,
)
from ztsnr.training.optimizers import OPTIMIZERS, make_optimizer, optimizer_tensors
from ztsnr.training.precision import MixedPrecision

BATCH, LATENT, TEXT = 2, (32, 24), 7
PLANNED = {"batch": BATCH, "buckets": [(64, 64), (192, 256), (128, 128)], "text_length": TEXT, "dtype": torch.float32}


def make_unet(device="cpu"):
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=48,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            norm_num_groups=8,
            layers_per_block=1,
        )


def pieces(unet):
    """Parts that checkpointing computes again."""
    return sum(type(module).__name__ in ("ResnetBlock2D", "BasicTransformerBlock") for module in unet.modules())


def real_step(unet):
    """A function that is the forward pass, and its tensors."""
    given = [torch.randn(BATCH, 4, *LATENT), torch.zeros(BATCH), torch.randn(BATCH, TEXT, 48)]
    target = torch.randn(BATCH, 4, *LATENT)
    return lambda: torch.nn.functional.mse_loss(unet(*given).sample.float(), target), [*given, target]


def planned(unet, mode, **settings):
    settings = {"batch": BATCH, "latent": LATENT, "text_length": TEXT, "dtype": torch.float32} | settings
    return measure_activations(FakeStep(unet, checkpointing=mode, **settings))


# ----------------------------------------------------------------------------------------------------------------------
# Activations


def test_saved_bytes_are_those_that_autograd_saves():
    unet = make_unet()
    forward, given = real_step(unet)
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    known = {tensor.untyped_storage().data_ptr() for tensor in [*unet.parameters(), *given]}
    saved = sum(storage.nbytes() for place, storage in storages.items() if place not in known)
    assert loss.requires_grad
    assert planned(unet, "off").saved == saved


@pytest.mark.parametrize("mode", MODES)
def test_bytes_are_those_that_the_allocator_gives(mode):
    unet = make_unet()
    found = planned(unet, mode)
    apply_checkpointing(unet, mode)
    forward, _ = real_step(unet)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward()
        with record_function("backward pass"):
            loss.backward()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    (border,) = (event.start_ns() for event in events if event.name() == "backward pass")
    live = peak = saved = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
            if event.start_ns() < border:
                saved = live
    # the CPU's mse_loss makes its mean in place of the squares; checkpointing keeps the state of random numbers
    saved -= BATCH * 4 * LATENT[0] * LATENT[1] * 4
    saved -= pieces(unet) * torch.get_rng_state().nbytes if mode != "off" else 0
    assert found.saved == pytest.approx(saved, rel=1e-3)
    assert found.peak_with_gradients <= peak <= 1.06 * found.peak_with_gradients  # it has workspaces


def test_modes_keep_less_and_less():
    off, selective, full = (planned(make_unet("meta"), mode) for mode in MODES)
    assert full.saved < 0.5 * selective.saved < 0.25 * off.saved
    assert full.peak < selective.peak < off.peak


def test_activations_follow_batch_and_width():
    unet = make_unet("meta")
    one = planned(unet, "off", batch=1).saved
    assert planned(unet, "off", batch=5).saved == pytest.approx(5 * one, rel=1e-3)
    assert planned(unet, "off", batch=1, dtype=torch.bfloat16).saved == pytest.approx(one / 2, rel=0.02)


def test_gradients_are_added_as_they_come():
    unet = make_unet("meta")
    size = sum(parameter.nbytes for parameter in unet.parameters())
    for mode in MODES:
        found = planned(unet, mode, batch=1, latent=(2, 2), text_length=1)
        assert size < found.peak_with_gradients < size + found.peak
    last = planned(unet, "off", trained=["conv_out.bias"])
    assert last.peak_with_gradients < planned(unet, "off").peak + 4 * 4 + 1


def test_tensors_without_memory_leave_the_network_alone():
    unet = make_unet()
    apply_checkpointing(unet, "full")
    before = {name: tensor.data_ptr() for name, tensor in unet.state_dict().items()}
    planned(unet, "off", trained=["conv_in.weight"])
    assert {name: tensor.data_ptr() for name, tensor in unet.state_dict().items()} == before
    assert unet.is_gradient_checkpointing
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_live_bytes_of_a_few_tensors():
    known = torch.zeros(100)
    with LiveBytes([known]) as counted:
        a = torch.zeros(10)
        view, other = a[2:], known[5:]
        assert counted.live == 40
        del a
        assert counted.live == 40
        b = view + other[:8]
        assert counted.live == 72
        del view
        assert counted.live == 32
        b += 1
    assert (counted.live, counted.peak) == (32, 72)


def test_encoding_is_what_the_allocator_gives():
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    pictures = torch.zeros(2, 3, 96, 64)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        vae.encode(pictures)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live = peak = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert measure_encoding(vae, 2, (64, 96)) == pytest.approx(peak, rel=0.05)


# ----------------------------------------------------------------------------------------------------------------------
# State


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_that_of_real_tensors(name):
    if name in ("adamw8bit", "adamw4bit"):
        pytest.importorskip("torchao")
    if name == "bnb_adamw8bit":
        pytest.importorskip("bitsandbytes")
    unet = make_unet()
    trained = [name for name, _ in unet.named_parameters() if "attn" in name or "conv1" in name or "norm" in name]
    expected = state_bytes(unet, optimizer=name, ema_profiles=2, trained=trained)

    wrapped = MixedPrecision(unet, torch.bfloat16, trained)
    optimizer = make_optimizer(name, [{"params": list(wrapped.parameter_list)}], lr=1e-4)
    tensors = optimizer_tensors(optimizer, wrapped.masters)
    masters = sum(parameter.nbytes for parameter in wrapped.parameter_list)
    network = dict(wrapped.network.named_parameters())
    casts = sum(network[key].nbytes for key in trained)
    assert expected == {
        "trained parameters": masters,
        f"{name} state": sum(tensor.nbytes for key, tensor in tensors.items() if not key.endswith(".step")),
        "averages": 2 * masters,
        "frozen parameters": sum(tensor.nbytes for tensor in network.values()) - casts,
        "gradients": masters,
        "their casts": casts,
        "other networks": 0,
    }


def test_an_optimizer_that_is_none():
    with pytest.raises(ValueError, match="no optimizer 'sgd': choose one of adamw, "):
        state_bytes(make_unet("meta"), optimizer="sgd")


def test_other_networks_count_as_they_are():
    unet, frozen, trained = make_unet("meta"), torch.nn.Linear(9, 8).half().requires_grad_(False), torch.nn.Linear(5, 4)
    alone, both = state_bytes(unet), state_bytes(unet, others=[frozen, trained])
    assert both["other networks"] == 2 * 80
    assert both["trained parameters"] - alone["trained parameters"] == 4 * 24
    assert both["adamw state"] - alone["adamw state"] == 8 * 24
    assert both["their casts"] - alone["their casts"] == 2 * 24


def test_float32_has_no_casts():
    assert state_bytes(make_unet("meta"), dtype=torch.float32)["their casts"] == 0


def test_sharding_divides_all_but_the_gathered_block():
    unet = make_unet("meta")
    whole, parts = state_bytes(unet, ema_profiles=1), state_bytes(unet, ema_profiles=1, shards=4)
    for part in ("trained parameters", "adamw state", "averages", "gradients"):
        assert parts[part] == pytest.approx(whole[part] / 4, abs=1)
    assert "their casts" not in parts
    largest = max(sum(parameter.numel() for parameter in unit.parameters()) for unit in shard_units(unet))
    assert parts["gathered blocks"] == 8 * largest


# ----------------------------------------------------------------------------------------------------------------------
# The plan


def test_the_fastest_that_fits_is_chosen():
    found = plan(make_unet("meta"), memory=2**40, reserve=100, **PLANNED)
    assert found.totals["off"] > found.totals["selective"] > found.totals["full"]
    for mode, total in found.totals.items():
        assert replace(found, memory=total + 100).mode == mode
        assert replace(found, memory=total + 99).mode != mode
    assert replace(found, memory=found.totals["full"]).mode is None


def test_totals_are_sums_of_the_parts():
    unet = make_unet("meta")
    found = plan(unet, memory=2**40, ema_profiles=1, **PLANNED)
    assert found.bucket == (192, 256)
    assert found.activations["off"] == planned(unet, "off")
    state = state_bytes(unet, dtype=torch.float32, ema_profiles=1)
    without = sum(state.values()) - state["gradients"]
    kept = plan(unet, memory=2**40, ema_profiles=1, gradients_kept=True, **PLANNED)
    for mode in MODES:
        assert found.totals[mode] == without + found.activations[mode].peak_with_gradients
        assert kept.totals[mode] == sum(state.values()) + found.activations[mode].peak
        assert found.totals[mode] <= kept.totals[mode]
    assert plan(unet, memory=2**40, encoding=GIB, modes=["full"], **PLANNED).totals["full"] > GIB


def test_a_compiled_backward_pass_has_all_gradients_at_once():
    """Where they are small beside what is kept of the forward pass, as in the first case, it is of no matter."""
    unet = make_unet("meta")
    count = sum(parameter.numel() for parameter in unet.parameters())
    small = {**PLANNED, "batch": 1, "buckets": [(64, 64)], "modes": ["full"], "memory": 2**40}
    for settings in ({**PLANNED, "memory": 2**40}, {**small, "gradients_kept": False}, {**small, "shards": 2}):
        assert plan(unet, compiled=True, **settings).totals == plan(unet, **settings).totals
    state = state_bytes(unet, dtype=torch.float32)
    kept = {**small, "gradients_kept": True}
    assert plan(unet, compiled=True, **kept).totals["full"] == sum(state.values()) + 4 * count
    assert plan(unet, **kept).totals["full"] < sum(state.values()) + 4 * count


def test_a_table_is_printed():
    text = str(plan(make_unet("meta"), memory=2**40, **PLANNED))
    assert text.startswith("GiB, 2 x 192 x 256")
    assert text.endswith("\ngradient checkpointing: off")
    assert "averages" not in text
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1


def test_advice_is_a_batch_that_fits():
    unet, settings = make_unet("meta"), {**PLANNED, "batch": 16, "modes": ["full"]}
    found = plan(unet, memory=2**40, reserve=0, **settings)
    found = replace(found, memory=int(0.7 * found.totals["full"]))
    assert found.mode is None
    assert str(found).endswith(found.advice)
    words = found.advice.rpartition("compute ")[2].split()
    smaller, times = int(words[0]), int(words[7])
    assert smaller * times >= 16
    for batch, mode in ((smaller, "full"), (smaller + 1, None)):
        again = plan(unet, memory=found.memory, reserve=0, gradients_kept=True, **{**settings, "batch": batch})
        assert again.mode == mode


def test_advice_where_the_state_is_too_much():
    found = plan(make_unet("meta"), memory=1000, reserve=0, ema_profiles=1, modes=["full"], **PLANNED)
    assert found.mode is None
    for way in ("averages", "adamw8bit", "among devices (fsdp)", "LoRA"):
        assert way in found.advice


@pytest.mark.slow
def test_sdxl():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS["SDXL base"])
    found = plan(unet, batch=1, buckets=[(1024, 1024)], memory=80 * GIB, ema_profiles=1)
    assert found.state["trained parameters"] == 4 * 2_567_463_684
    saved = {mode: activations.saved / GIB for mode, activations in found.activations.items()}
    assert saved["off"] == pytest.approx(6.4, rel=0.01)
    assert saved["full"] == pytest.approx(0.55, rel=0.01)
    assert saved["selective"] == pytest.approx(2.36, rel=0.01)
