"""Everything that takes a tensor of a device, on one that has no float64; and which device auto takes."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from ztsnr import extras
from ztsnr.checkpoints import load_pipeline
from ztsnr.checkpoints.vae import load_vae
from ztsnr.cli import main
from ztsnr.data.latent_cache import LatentCache
from ztsnr.diagnostics import GaussianCanvas, LatentMeanRecorder, leak_run
from ztsnr.diagnostics.ideal_models import GaussianMixture, GaussianModes, PictureSet, v_network
from ztsnr.samplers import SOLVERS, NoiseSchedule, ZTSNRScheduler, sample, step_schedule
from ztsnr.samplers.devices import send, to_float64, widest_float
from ztsnr.training.decoder.reconstruction import evaluate
from ztsnr.training.objective import Objective, ObjectiveSettings
from ztsnr.world import describe_device, find_device

from .float32_device import NAME
from .tiny_pipelines import make_tiny_sdxl
from .training.tiny_run import losses, make_content, metrics, train, write_pictures

pytestmark = pytest.mark.xdist_group("float32 device")
OWN_PROCESS = "ZTSNR_TEST_OF_ITS_OWN"


@pytest.fixture(scope="session")  # a worker that does other tests in between would run it again
def passed_together(request):
    """Runs all tests that want a process of their own in one; torch looks for devices once, before a backward pass."""
    names = [f"{item.path}::{item.name}" for item in request.session.items if "own_process" in item.fixturenames]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *dict.fromkeys(names)]
    done = subprocess.run(command, env=os.environ | {OWN_PROCESS: "1"}, capture_output=True, text=True)
    return done.stdout[-3000:] if done.returncode else None


@pytest.fixture
def own_process(request):
    """Run the test in a process of its own, with others that want the same."""
    if OWN_PROCESS not in os.environ:
        trouble = request.getfixturevalue("passed_together")
        assert trouble is None, trouble
        pytest.skip("passed in a process of its own")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny SDXL, and pictures."""
    folder = tmp_path_factory.mktemp("float32_device")
    make_tiny_sdxl(folder / "tiny")
    write_pictures(folder / "pictures", 12)
    return folder


def command(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


# ----------------------------------------------------------------------------------------------------------------------
# The stand-in


@pytest.mark.parametrize(
    "refused",
    [
        lambda x: x.double(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: torch.as_tensor(x, dtype=torch.float64),
        lambda x: torch.zeros(3, dtype=torch.float64, device=x.device),
        lambda x: torch.ones(3, dtype=torch.float64).to(x.device),
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        lambda x: x + torch.ones(3),
        lambda x: torch.randn(3, generator=torch.Generator(), device=x.device),
        lambda x: x.numpy(),
    ],
)
def test_the_stand_in_refuses(float32_device, refused):
    with pytest.raises((TypeError, RuntimeError)):
        refused(torch.ones(3, device=float32_device))


def test_the_stand_in_calculates(own_process, float32_device):
    network = torch.nn.Conv2d(4, 2, 3)
    x = torch.randn(1, 4, 5, 5)
    expected = network(x)
    expected.square().sum().backward()
    gradient, network.weight.grad = network.weight.grad, None
    found = network.to(float32_device)(x.to(float32_device))
    found.square().sum().backward()
    assert found.device == network.weight.grad.device == float32_device
    assert torch.equal(found.detach().cpu(), expected)
    assert torch.equal(network.weight.grad.cpu(), gradient)


# ----------------------------------------------------------------------------------------------------------------------
# Devices


def test_float64_is_where_it_can_be(float32_device):
    x = torch.arange(3.0)
    assert to_float64(x.to(float32_device)).tolist() == [0, 1, 2]
    assert to_float64(x.to(float32_device)).device.type == "cpu"
    assert to_float64(0.1).item() == 0.1
    assert (widest_float(float32_device), widest_float(torch.device("cpu"))) == (torch.float32, torch.float64)
    assert send(x, float32_device).device == float32_device


@pytest.fixture
def machine(monkeypatch):
    """machine("xpu", "mps") has these kinds of GPUs, one of each."""

    def make(*kinds):
        for kind in ("cuda", "xpu"):
            monkeypatch.setattr(getattr(torch, kind), "is_available", lambda kind=kind: kind in kinds)
            monkeypatch.setattr(getattr(torch, kind), "device_count", lambda kind=kind: int(kind in kinds))
            monkeypatch.setattr(getattr(torch, kind), "get_device_name", lambda device, kind=kind: f"the {kind} card")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)

    return make


@pytest.mark.parametrize(
    ("kinds", "processes", "taken", "words"),
    [
        ((), 1, "cpu", "cpu"),
        (("mps",), 1, "mps", "mps (Metal)"),
        (("xpu",), 1, "xpu:0", "xpu:0 (the xpu card)"),
        (("cuda", "xpu"), 1, "cuda:0", "cuda:0 (the cuda card)"),
        (("mps",), 2, "cpu", "cpu"),
        (("cuda",), 2, "cuda:0", "cuda:0 (the cuda card)"),
    ],
)
def test_what_auto_takes(machine, kinds, processes, taken, words):
    machine(*kinds)
    device = find_device("auto", processes=processes, local_rank=0)
    assert str(device) == taken
    assert describe_device(device) == words


@pytest.mark.parametrize(
    ("kinds", "name", "processes", "sentence"),
    [
        ((), "gpu", 1, "--device = 'gpu' is not a device: give auto, cpu, cuda, xpu, mps, or a number as in cuda:1"),
        ((), "cuda", 1, "the device cuda cannot be used: there is no CUDA here"),
        ((), "xpu", 1, "the device xpu cannot be used: there is no Intel GPU here"),
        ((), "mps", 1, "the device mps cannot be used: there is no Metal here"),
        (("xpu",), "xpu:1", 1, "the device xpu:1 cannot be used: this machine has 1 GPUs, numbered from 0"),
        (("mps",), "mps", 2, "--device = 'mps' works for one process only, not for 2: give cuda or cpu"),
    ],
)
def test_devices_that_are_not_there(machine, kinds, name, processes, sentence):
    machine(*kinds)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        find_device(name, setting="--device", processes=processes)


# ----------------------------------------------------------------------------------------------------------------------
# The mathematics


def test_a_schedule(float32_device):
    schedule = NoiseSchedule.sdxl()
    t = torch.tensor([0.0, 0.5, 998.7, 999.0])
    sigmas = schedule.sigma(t.to(float32_device))
    assert torch.equal(sigmas, schedule.sigma(t))
    assert torch.equal(schedule.timestep(sigmas.float().to(float32_device)), schedule.timestep(sigmas.float()))
    of_the_device = NoiseSchedule(schedule.alphas_cumprod.float()[:-1].to(float32_device))
    assert torch.equal(of_the_device.alphas_cumprod, schedule.alphas_cumprod.float()[:-1].double())
    assert NoiseSchedule.from_betas(schedule.betas[:-1].float().to(float32_device), True).zero_terminal_snr


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cfg_pp", [False, True])
def test_solvers(float32_device, solver, cfg_pp):
    """The same numbers as on the CPU, with noise from a generator of the CPU."""
    model = GaussianCanvas()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = step_schedule(NoiseSchedule.sdxl(), 4, latent_size=(8, 8))

    def denoise(x, sigma):
        return (model(x, sigma), 0.9 * model(x, sigma)) if cfg_pp else model(x, sigma)

    def run(device):
        generator = torch.Generator().manual_seed(1)
        return sample(denoise, noise.to(device), sigmas, solver, generator=generator, cfg_pp=cfg_pp)

    found = run(float32_device)
    assert found.device == float32_device
    torch.testing.assert_close(found.cpu(), run("cpu"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        GaussianModes(0.5, torch.tensor([[[1.0]], [[2.0]]])),
        GaussianCanvas(),
        GaussianMixture(torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), stds=[0.1, 0.2, 0.3]),
        PictureSet(torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), std=0.1, brightness_std=0.2),
    ],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.parametrize("sigma", [float("inf"), 2.0, 0.0])
def test_ideal_models(float32_device, model, sigma):
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    found = model(x.to(float32_device), sigma)
    assert found.device == float32_device
    torch.testing.assert_close(found.cpu(), model(x, sigma), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.exact(x.to(float32_device)).cpu(), model.exact(x), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# diffusers


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scheduler(float32_device, solver):
    network = v_network(GaussianCanvas(), NoiseSchedule.sdxl())
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def run(device):
        scheduler = ZTSNRScheduler(solver=solver, latent_size=(8, 8))
        scheduler.set_timesteps(4, device=device)
        x, generator = noise.to(device), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            v = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(v, t, x, generator=generator).prev_sample
        return x

    found = run(float32_device)
    assert found.device == float32_device
    torch.testing.assert_close(found.cpu(), run("cpu"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler", [ZTSNRScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_a_pipeline_and_what_a_recorder_sees(float32_device, place, scheduler):
    def run(device):
        pipe = load_pipeline(place / "tiny", device=device).pipeline
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        recorder, generator = LatentMeanRecorder(), torch.Generator().manual_seed(0)
        pictures = pipe(
            "a square",
            num_inference_steps=3,
            generator=generator,
            output_type="pt",
            callback_on_step_end=recorder.on(pipe),
            callback_on_step_end_tensor_inputs=["latents"],
        ).images
        return pictures.cpu(), recorder.read()

    (found, seen), (expected, expected_seen) = run(float32_device), run("cpu")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert seen.sigmas == pytest.approx(expected_seen.sigmas, rel=1e-5)
    assert seen.denoised_mean == pytest.approx(expected_seen.denoised_mean, rel=1e-3, abs=1e-3)


def test_what_training_asks_of_the_scheduler(float32_device):
    scheduler = ZTSNRScheduler()
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0, 500, 999])
    there = [tensor.to(float32_device) for tensor in (x0, noise, t)]
    assert torch.equal(scheduler.add_noise(*there).cpu(), scheduler.add_noise(x0, noise, t))
    assert torch.equal(scheduler.get_velocity(*there).cpu(), scheduler.get_velocity(x0, noise, t))


# ----------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.slow
def test_leak(float32_device, place, tmp_path, monkeypatch):
    """Every number of the report is that of the CPU."""
    monkeypatch.setattr(leak_run, "SHEET_STEPS", 3)
    monkeypatch.setattr(extras, "find_spec", lambda name: None)  # without figures, which are drawn on the CPU

    def report(device):
        out = tmp_path / device
        options = ("--seeds", 2, "--steps", 3, "--reference-steps", 10, "--prompt", "a", "--device", device)
        command("leak", place / "tiny", *options, "--out", out)
        return numbers_of(json.loads((out / "report.json").read_text()))

    found, expected = report(NAME), report("cpu")
    assert len(expected) > 100
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-3)


def numbers_of(content):
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return [number for part in content for number in numbers_of(part)]
    return [float(content)] if isinstance(content, (int, float)) else []


def test_the_latent_cache(float32_device, place, tmp_path):
    for device in ("cpu", NAME):
        options = ("--vae", place / "tiny", "--area", "32x32", "--step", 16, "--workers", 0, "--device", device)
        said = command("cache", place / "pictures", *options, "--out", tmp_path / device, "--verify")
        assert "Cached 12 pictures" in said
    found, expected = (LatentCache(tmp_path / device).statistics for device in (NAME, "cpu"))
    assert found.mean == pytest.approx(expected.mean, rel=1e-5)
    assert found.std == pytest.approx(expected.std, rel=1e-5)


def test_the_command_says_what_auto_took(machine, place, tmp_path):
    machine()
    options = ("--vae", place / "tiny", "--area", "32x32", "--step", 16, "--workers", 0)
    arguments = ["cache", place / "pictures", *options, "--out", tmp_path]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "Device: cpu\n" in result.stderr  # standard output may be read by a program
    assert "Device" not in result.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Training


def test_fine_tuning(own_process, float32_device, place, tmp_path):
    """Steps, averages, validation, previews, states and the export; from pixels, whose VAE runs there too."""
    changes = {
        "steps": 3,
        "model__text_encoders": True,
        "objective__weighting": "learned",
        "average__decay": 0.9,
        "data__validation_share": 0.2,
        "watch__validate_every": 3,
        "watch__preview_every": 3,
        "watch__prompts": ["a square"],
    }
    for device in (NAME, "cpu"):
        exported = train(make_content(place, tmp_path / device, speed__device=device, **changes))
        assert exported
        load_pipeline(exported[0])
    assert losses(tmp_path / NAME) == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)
    found, expected = (metrics(tmp_path / device)[-1] for device in (NAME, "cpu"))
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_run_says_what_auto_took(machine, place, tmp_path):
    machine()
    said = []
    train(make_content(place, tmp_path / "run", steps=1, speed__device="auto"), say=said.append)
    assert said[0] == "Device: cpu"


def test_half_precision_training(own_process, float32_device, place, tmp_path):
    changes = {"steps": 2, "model__dtype": "float16"}
    for device in (NAME, "cpu"):
        train(make_content(place, tmp_path / device, speed__device=device, **changes))
    assert losses(tmp_path / NAME) == pytest.approx(losses(tmp_path / "cpu"), rel=1e-2)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_the_objective(float32_device, prediction_type):
    settings = ObjectiveSettings(prediction_type=prediction_type, zero_terminal_snr=prediction_type != "epsilon")
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0, 500, 999])
    expected = Objective(settings).losses(noise, x0, noise, t)
    there = (tensor.to(float32_device) for tensor in (noise, x0, noise, t))
    found = Objective(settings, device=float32_device).losses(*there)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


def test_reconstructions(float32_device, place):
    examples = torch.rand(3, 4, 32, 32, generator=torch.Generator().manual_seed(0)).round()
    found, shown = evaluate(load_vae(place / "tiny", device=float32_device), examples, None, 2)
    expected, expected_shown = evaluate(load_vae(place / "tiny"), examples, None, 2)
    assert vars(found) == pytest.approx(vars(expected))
    torch.testing.assert_close(shown, expected_shown)
