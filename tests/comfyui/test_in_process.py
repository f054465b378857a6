"""The nodes inside a real ComfyUI: its own samplers, schedulers and nodes on a model whose exact answer is known."""

import itertools
import math
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ztsnr.diagnostics import GaussianCanvas, v_network
from ztsnr.samplers import SOLVERS, SPACINGS, NoiseSchedule, ZTSNRScheduler, ZTSNRWarning, step_schedule
from ztsnr.samplers.sampling import evaluation_sigmas

from .worker import Inside

pytestmark = pytest.mark.comfyui

# every schedule that reaches t = T, stock and ours
SCHEDULERS = [
    "simple", "sgm_uniform", "karras", "exponential", "beta", "normal", "linear_quadratic", "kl_optimal",
    "ztsnr_trailing", "ztsnr_spectral",
]  # fmt: skip
# of both supported versions; a name that a core does not have is skipped, one that is missing here fails a test
SAMPLERS = [
    "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "exp_heun_2_x0",
    "exp_heun_2_x0_sde", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral",
    "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde",
    "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm",
    "ipndm", "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "er_sde", "seeds_2",
    "seeds_3", "sa_solver", "sa_solver_pece", "ddim", "uni_pc", "uni_pc_bh2",
]  # fmt: skip


STAND_IN = 8192.0  # for infinity


def as_comfyui_writes(sigmas):
    return [min(sigma, STAND_IN) for sigma in sigmas]


def numbers(texts):
    return [float(text) for text in texts]  # JSON has no infinity: it travels as text


# ----------------------------------------------------------------------------------------------------------------------
# The pack


def test_the_pack_brings_its_nodes_and_schedulers(about):
    nodes = {"ZTSNRModelSampling", "ZTSNRScheduler", "ZTSNRSampler", "ZTSNRGuidance", "ZTSNRGuidanceRescale",
             "ZTSNRCheckpointLoader", "ZTSNRBucketLatent", "LatentMeanDiagnostic", "LatentMeanProbe",
             "LatentMeanReport"}  # fmt: skip
    assert set(about["nodes"]) == nodes
    assert about["schedulers"][-2:] == ["ztsnr_trailing", "ztsnr_spectral"]
    assert len(set(about["schedulers"])) == len(about["schedulers"])


def test_no_stock_sampler_is_left_out(about):
    assert set(about["samplers"]) <= set(SAMPLERS)
    assert set(about["schedulers"]) - set(SCHEDULERS) == {"ddim_uniform"}


def test_start_up_is_cheap_and_without_diffusers(comfyui_python, comfyui_path):
    program = f"""
import sys
sys.path.insert(0, {str(comfyui_path)!r})
import comfy.cli_args
comfy.cli_args.args.cpu = True
import asyncio, nodes, comfy_api.latest, comfy_extras.nodes_custom_sampler, time
import pydantic_settings  # with which ComfyUI reads the pyproject.toml of every pack
before = set(sys.modules)
start = time.process_time()
assert asyncio.run(nodes.load_custom_node({str(Path(__file__).resolve().parents[2])!r}))
took = time.process_time() - start
loaded = {{name.split('.')[0] for name in set(sys.modules) - before}}
print(took, sorted(loaded & {{'diffusers', 'matplotlib', 'skimage', 'transformers'}}))
"""
    outcomes = [
        subprocess.run([comfyui_python, "-c", program], capture_output=True, text=True, check=True).stdout.split(" ", 1)
        for _ in range(3)
    ]
    assert all(loaded.strip() == "[]" for _, loaded in outcomes)
    assert min(float(took) for took, _ in outcomes) < 0.1


# ----------------------------------------------------------------------------------------------------------------------
# The process that these tests ask


@pytest.mark.parametrize("broken", ["too slow", "dead"])
def test_a_call_that_fails_leaves_a_process_for_the_next(comfyui_python, comfyui_path, tmp_path, broken):
    inside = Inside(comfyui_python, comfyui_path, tmp_path / "log.txt")
    try:
        if broken == "dead":
            inside.process.kill()
            inside.process.wait()
        else:
            with pytest.raises(TimeoutError, match="still runs after"):
                inside("wait", timeout=0.1, seconds=60)
        assert inside("wait", seconds=0) is None
    finally:
        inside.close()


# ----------------------------------------------------------------------------------------------------------------------
# Every stock sampler


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_unbiased_from_infinity(inside, about, sampler):
    if sampler not in about["samplers"]:
        pytest.skip(f"ComfyUI {about['version']} has no sampler {sampler}")
    for scheduler, found in inside("bias", sampler=sampler, schedulers=SCHEDULERS).items():
        assert found["first_t"] == 999, scheduler
        assert found["levels"] is not None, f"{scheduler}: not finite"
        assert abs(found["levels"]) <= 0.1, scheduler


def test_the_bias_check_can_fail(inside):
    """ddim_uniform never runs t = T, and no sampler can help it."""
    (found,) = inside("bias", sampler="euler", schedulers=["ddim_uniform"]).values()
    assert found["first_t"] < 960
    assert found["levels"] > 5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_survives_few_steps(inside, about, sampler):
    if sampler not in about["samplers"]:
        pytest.skip(f"ComfyUI {about['version']} has no sampler {sampler}")
    assert inside("few_steps", sampler=sampler, schedulers=[*SCHEDULERS, "ddim_uniform"]) == []


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_every_scheduler_begins_at_infinity(inside, scheduler, steps):
    sigmas = numbers(inside("stock_sigmas", scheduler=scheduler, steps=steps))
    assert len(sigmas) == steps + 1
    assert sigmas[0] == STAND_IN
    assert sigmas[-1] == 0
    assert all(after < before for before, after in itertools.pairwise(sigmas))


def test_stock_ranges_begin_where_noise_hides_the_canvas(inside):
    """karras and exponential are this package's own of the same name."""
    for scheduler in ("karras", "exponential"):
        for steps, shift in ((5, 1.0), (12, 1.0), (12, 1.5), (28, 1.5)):
            side = round(128 * shift)
            schedule = NoiseSchedule.sdxl().shifted(shift)
            expected = step_schedule(schedule, steps, scheduler, latent_size=(side, side)).tolist()
            found = numbers(inside("stock_sigmas", scheduler=scheduler, steps=steps, canvas_shift=shift))
            assert found == pytest.approx(as_comfyui_writes(expected), rel=1e-4)
    for scheduler in ("kl_optimal", "linear_quadratic"):
        assert numbers(inside("stock_sigmas", scheduler=scheduler, steps=28))[1] == pytest.approx(128, rel=1e-5)
        shifted = numbers(inside("stock_sigmas", scheduler=scheduler, steps=28, canvas_shift=1.5))
        assert shifted[1] == pytest.approx(192, rel=1e-5)


@pytest.mark.parametrize("cfg", [None, 1.0, 7.5])
def test_our_scheduler_in_ksamplers_list_is_told_the_cfg_by_the_model(inside, cfg):
    """A graph of version 0.1.0 has no cfg, and gets the default."""
    told = {} if cfg is None else {"cfg": cfg}
    guidance = {} if cfg is None else {"guidance": cfg}
    for shift in (1.0, 1.5):
        side = round(128 * shift)
        expected = step_schedule(NoiseSchedule.sdxl().shifted(shift), 12, latent_size=(side, side), **guidance)
        found = inside("stock_sigmas", scheduler="ztsnr_spectral", steps=12, canvas_shift=shift, **told)
        assert numbers(found) == pytest.approx(as_comfyui_writes(expected.tolist()), rel=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_scheduler_node_is_told_cfg_and_start(inside, spacing):
    """Graphs of version 0.1.0 have neither, and get the defaults."""
    choices = [({}, {}), ({"cfg": 1.0, "sigma_start": 0.0}, {"guidance": 1.0}), ({"cfg": 7.5}, {"guidance": 7.5})]
    if spacing in ("spectral", "karras", "exponential", "polyexponential", "kl_optimal"):
        choices.append(({"cfg": 3.0, "sigma_start": 99.0}, {"guidance": 3.0, "sigma_start": 99.0}))
    for settings, arguments in choices:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ZTSNRWarning)  # of leading
            expected = step_schedule(NoiseSchedule.sdxl(), 9, spacing, latent_size=(96, 160), **arguments)
        found = numbers(inside("our_sigmas", steps=9, spacing=spacing, size=(96, 160), **settings))
        assert found == pytest.approx(as_comfyui_writes(expected.tolist()), rel=1e-6)


def test_the_cfg_is_told_where_the_first_step_is_comfyuis(inside):
    stock = {"scheduler": "ztsnr_spectral", "steps": 12, "first_step": "as ComfyUI does it"}
    plain, default, told = (numbers(inside("stock_sigmas", **stock, **cfg)) for cfg in ({"cfg": 1.0}, {}, {"cfg": 5.0}))
    assert plain[0] == told[0] == pytest.approx(4518.76, rel=1e-5)
    assert told == default != plain


def test_stock_schedulers_are_untouched_elsewhere(inside):
    """Karras et al., eq. 5, on the finite schedule that ComfyUI itself makes."""
    sigmas = numbers(inside("stock_sigmas", scheduler="karras", steps=5, first_step="as ComfyUI does it"))
    low, high = 0.0291672 ** (1 / 7), 4518.7637 ** (1 / 7)
    assert sigmas[:-1] == pytest.approx([(high + i / 4 * (low - high)) ** 7 for i in range(5)], rel=1e-4)


def test_tables_are_the_noise_schedule(inside):
    found = inside("tables")
    asked = torch.tensor([0.0291672, 1.0, 57.87, 136.17, 2254.2], dtype=torch.float64)
    for name, schedule in {
        "exact": NoiseSchedule.sdxl(),
        "as trained": NoiseSchedule.sdxl(zero_terminal_snr=False),
        "shifted": NoiseSchedule.sdxl().shifted(2),
    }.items():
        table = found[name]
        expected = schedule.sigma(torch.tensor([0, 500, 900, 998, 999])).tolist()
        assert numbers(table["sigmas"]) == pytest.approx(as_comfyui_writes(expected), rel=1e-6)
        assert table["timesteps"][:-3] == pytest.approx(schedule.timestep(asked).tolist(), abs=1e-2)
        assert table["timesteps"][-3:] == [999] * 3  # ComfyUI's, the stand-in, and infinity
        assert table["one"] == table["timesteps"][2]
        expected = schedule.sigma(torch.tensor([0, 500.5, 998.5, 999])).tolist()
        assert numbers(table["back"]) == pytest.approx(as_comfyui_writes(expected), rel=1e-6)
        percents = [math.inf, math.inf, schedule.sigma(0.75 * 999), 0, 0]
        assert numbers(table["percents"]) == pytest.approx(percents)


# ----------------------------------------------------------------------------------------------------------------------
# Our sampler, and the diffusers door


@pytest.mark.parametrize(
    ("solver", "spacing", "settings"),
    [
        *((solver, "trailing", {}) for solver in SOLVERS),
        ("spectral", "spectral", {}),
        ("euler_ancestral", "karras", {"eta": 0.5, "s_noise": 0.9}),
        ("dpmpp_sde", "trailing", {"s_noise": 1.05}),
    ],
)
def test_our_sampler_takes_the_steps_of_the_diffusers_scheduler(inside, tmp_path, solver, spacing, settings):
    settings, steps, size, seed = {"eta": 1.0, "s_noise": 1.0} | settings, 7, (12, 20), 7
    calls = inside("ours", path=str(tmp_path / "states.npz"), solver=solver, spacing=spacing, steps=steps, size=size,
                   seed=seed, **settings)  # fmt: skip
    found = {name: torch.from_numpy(array) for name, array in np.load(tmp_path / "states.npz").items()}

    scheduler = ZTSNRScheduler(solver=solver, spacing=spacing, latent_size=size, **settings)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    torch.testing.assert_close(found["sigmas"].double(), scheduler.sigmas.clamp(max=STAND_IN), rtol=1e-6, atol=0)
    network = v_network(GaussianCanvas(-2.4, 0.3, 0.6), NoiseSchedule.sdxl())
    generator = torch.Generator().manual_seed(seed + 1)
    evaluations = evaluation_sigmas(solver, scheduler.sigmas.tolist(), settings["eta"])
    assert calls == len(scheduler.timesteps) == len(evaluations)

    x = found["noise"]
    for i, (t, sigma) in enumerate(zip(scheduler.timesteps, evaluations, strict=True)):
        theirs = found["states"][i] / math.hypot(1, min(sigma, STAND_IN))
        torch.testing.assert_close(theirs, x, rtol=0, atol=2e-5)
        x, x0 = scheduler.step(network(x, t), t, x, generator=generator, return_dict=False)
        torch.testing.assert_close(found["denoised"][i], x0, rtol=0, atol=5e-5)
    torch.testing.assert_close(found["picture"], x, rtol=0, atol=5e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The rest of ComfyUI


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("scheduler", ["simple", "karras"])
def test_two_stages_are_one_run(inside, scheduler, split):
    found = inside("two_stages", sampler="euler", scheduler=scheduler, split=split)
    assert found["difference"] < 1e-5 * found["size"]
    assert found["between"] > 1  # the first stage left its noise in


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_sde"])
def test_custom_sampling_is_ksampler(inside, sampler):
    found = inside("custom_advanced", sampler=sampler, scheduler="simple")
    assert found == {"difference": 0, "sigmas_kept": True}


def test_the_callers_sigmas_are_kept_from_samplers_that_write_to_them(inside):
    assert inside("custom_advanced", sampler="uni_pc", scheduler="simple")["sigmas_kept"]
    assert inside("custom_advanced", sampler="uni_pc_bh2", scheduler="karras")["sigmas_kept"]


def test_noise_may_be_added_beforehand(inside):
    assert inside("noise_added_before") < 1e-4


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "lcm"])
def test_inpainting_keeps_what_is_not_masked(inside, sampler):
    found = inside("inpainting", sampler=sampler, scheduler="simple")
    assert found["kept"] < 1e-5
    if sampler not in ("dpmpp_2m_sde", "lcm"):  # which draw other fresh noise: one step less of it
        assert found["difference"] < 0.02 * found["painted"]  # ComfyUI's own start is near, and not the same


@pytest.mark.parametrize("differential", [False, True])
def test_soft_masks(inside, differential):
    found = inside("inpainting", sampler="euler", scheduler="simple", soft=True, differential=differential)
    assert found["kept"] < 1e-5
    assert found["difference"] < 0.02 * found["painted"]


def test_image_to_image_is_stock(inside):
    found = inside("image_to_image")
    assert found["first_t"] == pytest.approx(499, abs=1e-3)
    assert found["difference"] < 1e-4 * found["std"]


def test_conditions_from_the_start_are_on_at_infinity(inside):
    timesteps = [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    for call, expected in (
        (("condition_windows", 0.0, 0.35), [True] * 4 + [False] * 6),
        (("condition_windows", 0.05, 1.0), [False] + [True] * 9),
        (("control_net", 0.0, 0.5), [True] * 5 + [False] * 5),
        (("control_net", 0.05, 1.0), [False] + [True] * 9),
    ):
        name, start, end = call
        found = inside(name, start=start, end=end)
        assert [t for t, _ in found] == pytest.approx(timesteps, abs=1e-3)
        assert [on for _, on in found] == expected, call


def test_lora_hooks_follow_their_keyframes(inside):
    assert [weight for _, weight in inside("lora_hooks")] == [1] * 5 + [0] * 5


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc"])
def test_a_batch_is_its_single_runs(inside, sampler):
    assert inside("batch", sampler=sampler) < 1e-4


def test_regional_prompts(inside):
    assert inside("regional_prompts") == pytest.approx([2, -2], abs=1e-4)


@pytest.mark.parametrize("sampler", ["euler", "heun", "uni_pc", "dpmpp_2m_sde"])
def test_previews_count_all_steps(inside, sampler):
    told = inside("previews", sampler=sampler)
    assert [step for step, _, _ in told][:6] == list(range(6))
    assert all(total == told[0][1] and finite for _, total, finite in told)


@pytest.mark.parametrize("step", [0, 3])
def test_interruption(inside, step):
    found = inside("interruption", step=step)
    assert found == {"error": "InterruptProcessingException", "calls": step + 1, "again": True}


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


@pytest.fixture(scope="session")
def guidance(inside):
    return inside("guidance_functions")


def test_guidance_nodes_see_finite_numbers_and_the_limit(guidance):
    """What other packs' functions make of the first step is what they make of it at a large finite sigma, exactly."""
    for name, found in guidance.items():
        assert np.isfinite(found["exact"]["picture"]).all(), name
        if name != "Epsilon Scaling":  # has no limit: it adds noise in proportion to sigma
            # TCFG takes singular vectors of x - x0, in float32
            assert found["exact"]["first"] == pytest.approx(found["stock"]["first"], rel=5e-3), name
            # CFGNorm has some in its limit; rounding makes some where x - x0 is formed, of x 8192 times the noise
            assert found["exact"]["noise in first"] == pytest.approx(found["stock"]["noise in first"], abs=0.02), name


def test_rescale_at_infinity_is_the_papers(guidance):
    """Lin et al., Algorithm 2, on v = -x0: conditional means -0.4, unconditional -1.2, guidance 5, by hand."""
    guided = -1.2 + 5 * 0.8
    factor = 0.7 * 0.4 / guided + 0.3
    expected = [guided * factor * channel for channel in (1.0, -1.0, 0.5, 2.0)]
    assert guidance["nothing"]["exact"]["first"] == pytest.approx([guided, -guided, guided / 2, guided * 2], rel=1e-5)
    assert guidance["ours, by the paper"]["exact"]["first"] == pytest.approx(expected, rel=1e-5)
    # the core's node forms x - x0 in float32, where x is 8192 times the noise
    assert guidance["RescaleCFG"]["exact"]["first"] == pytest.approx(expected, rel=1e-3)
    twice = [value * (0.7 * 0.4 / (guided * factor) + 0.3) for value in expected]
    assert guidance["both rescales"]["exact"]["first"] == pytest.approx(twice, rel=1e-3)


def test_our_rescale_keeps_the_prompts_mean(guidance):
    """At infinity the predictions are flat: there is nothing but their mean, which goes back to the conditional one."""
    guided, prompt = -1.2 + 5 * 0.8, -0.4
    expected = [(0.3 * guided + 0.7 * prompt) * channel for channel in (1.0, -1.0, 0.5, 2.0)]
    assert guidance["ZTSNRGuidanceRescale"]["exact"]["first"] == pytest.approx(expected, rel=1e-5)


def test_epsilon_scaling_no_longer_breaks_the_first_step(guidance):
    found = guidance["Epsilon Scaling"]
    assert found["stock"]["noise in first"] > 10
    assert found["exact"]["noise in first"] < 0.05
    assert found["exact"]["first"] == pytest.approx(guidance["nothing"]["exact"]["first"], rel=0.01)


@pytest.mark.parametrize("sigma", [0.1, 1, 14.6, 200])
def test_rescale_is_the_cores_at_finite_sigma(inside, sigma):
    assert inside("rescale_against_core", sigma=sigma) < 2e-6 * max(sigma, 1)


# ----------------------------------------------------------------------------------------------------------------------
# What is patched, and what is said


def test_the_input_model_is_unchanged(inside):
    assert inside("input_model_unchanged") == {"same": True, "difference": 0}


def test_patching_twice_is_patching_once(inside):
    found = inside("patched_twice")
    assert found["calls"] == 5
    assert found["middle"] == pytest.approx(2 * 1.774557, rel=1e-5)


def test_auto_keeps_what_an_earlier_node_was_told(inside):
    """The checkpoint loader knows more about a file than ComfyUI; ZTSNR Model behind it must not forget that."""
    found = inside("auto_after_told")
    assert found == "v-prediction, zero terminal SNR, exact first step from infinity; every sigma times 1.5."


@pytest.mark.parametrize(
    ("settings", "marks"),
    [({}, ["v_pred", "ztsnr"]), ({"schedule": "as trained"}, ["v_pred"])],
)
def test_save_checkpoint_marks_the_file(inside, tmp_path, settings, marks):
    assert inside("saved_marks", folder=str(tmp_path), **settings) == marks


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("flow", "not for a BaseModel (FLOW) model"),
        ("edm", "not for a BaseModel (EDM) model"),
        ("refiner", "This is the SDXL refiner"),
        ("epsilon", "An epsilon model cannot run with zero terminal SNR"),
        ("patched", "has already replaced this model's schedule"),
        ("video", "The latent has 5 dimensions, (1, 4, 5, 8, 8)"),
        ("flow schedule", "no table of noise levels"),
        ("flow guidance", "no table of noise levels"),
        ("steps", "steps must be a whole number of at least 1, not 0"),
        ("start", "sigma_start must be finite and in (0.02917, inf], not 0.01"),
    ],
)
def test_bad_input_blocks_its_branch_with_a_sentence(inside, case, words):
    blocked, shown, outputs = inside("refusals")[case]
    assert words in blocked
    assert shown == blocked
    assert outputs == 1  # a node without any output would not block, but break, what follows


def test_runs_that_cannot_work_end_in_a_sentence(inside):
    found = inside("errors")
    assert found["nan"].startswith("These sigmas cannot be sampled: nan, nan, 0.")
    assert found["flipped"].startswith("These sigmas cannot be sampled: 0.03, 1, inf.")
    assert "put ZTSNR Model (v-prediction) before the sampler" in found["unpatched"]


def test_warnings_where_the_schedule_misses_the_start(inside):
    found = inside("warnings")
    for case, words in {
        "ddim_uniform": "never run t = 999",
        "half": "never run t = 999",
        "leading": "never runs t = 999",
        "unpatched": "comes without ZTSNR Model",
        "unpatched list": "comes without ZTSNR Model",
    }.items():
        (warning,) = found.pop(case)
        assert words in warning, case
    assert found == {"stock by choice": [], "good": [], "image to image": [], "not zero SNR": []}


def test_reports(inside):
    found = inside("reports")
    exact = "v-prediction, zero terminal SNR, exact first step from infinity"
    assert found["marked"] == found["v told"] == f"{exact}."
    assert found["forced"] == f"{exact}; every sigma times 1.5."
    assert found["stock"] == "v-prediction, zero terminal SNR, starting at sigma 4518.76 as ComfyUI does."
    assert found["epsilon"] == "epsilon, schedule as trained, up to sigma 14.61."
    assert "it never starts from pure noise now" in found["as trained"]
    assert "set schedule to 'zero terminal SNR'" in found["v only"]
