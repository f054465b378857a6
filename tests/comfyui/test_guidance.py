"""ZTSNR Guidance in a real ComfyUI, against ``samplers.exposure_true_guidance`` on the same network by hand."""

import math

import numpy as np
import pytest
import torch

from ztsnr.diagnostics import GaussianModes
from ztsnr.samplers import exposure_true, exposure_true_guidance, sample
from ztsnr.samplers.prediction import alpha_s

from .guidance_inside import painting

pytestmark = pytest.mark.comfyui

SIZE, SPREAD, INFINITE = (16, 24), 0.5, 4518.0
DEFAULTS = {"exposure": 0.9, "contrast": 0.8, "interval_start": 0.0, "interval_end": 0.0}
ASKED, USUAL, OTHER = [-0.6, 0.8, 0.5], [0.2, 0.3, -0.4], [0.1, -0.5, 0.3]
TWO = {"positive": ASKED, "negative": USUAL, "cfg": 5.0}
TOLERANCE = 1e-4


def ours(**settings) -> list:
    return ["ZTSNRGuidance", DEFAULTS | settings]


@pytest.fixture
def run(inside, tmp_path):
    def run(chain=(), guider="CFGGuider", inputs=TWO, **options):
        """The network's calls, and noise, sigmas, picture and what ZTSNR Guidance took and made."""
        path = tmp_path / "run.npz"
        calls = inside("guidance_inside.picture", path=str(path), chain=list(chain), guider=guider, inputs=inputs,
                       spread=SPREAD, **options)  # fmt: skip
        found = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
        found["levels"] = [math.inf if sigma >= INFINITE else sigma for sigma in found["sigmas"].tolist()]
        return calls, found

    return run


def model_of(numbers, size=SIZE, spread=SPREAD) -> GaussianModes:
    """The denoiser of a prompt."""
    return GaussianModes(painting(numbers, *size), spread)


def by_hand(found, guide, *prompts) -> torch.Tensor:
    """Euler's steps with ``guide(sigma, *x0)``, by this package's own loop."""
    models = [model_of(numbers, found["noise"].shape[-2:]) for numbers in prompts]
    return sample(
        lambda x, sigma: guide(sigma, *(model(x, sigma) for model in models)),
        found["noise"],
        found["levels"],
        "euler",
    )


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


# ----------------------------------------------------------------------------------------------------------------------
# The formula


@pytest.mark.parametrize("settings", [{}, {"exposure": 0.3, "contrast": 1.0}, {"exposure": 1.0, "contrast": 0.0}])
def test_a_run_is_the_formula(run, settings):
    shares = {name: (DEFAULTS | settings)[name] for name in ("exposure", "contrast")}
    _, found = run([ours(**settings)], batch=3)
    close(found["picture"], by_hand(found, lambda _, *x0: exposure_true_guidance(*x0, 5.0, **shares), ASKED, USUAL))


def test_without_shares_it_is_cfg(run):
    _, plain = run()
    _, found = run([ours(exposure=0.0, contrast=0.0)])
    close(found["picture"], plain["picture"])
    _, default = run([ours()])
    assert (default["picture"] - plain["picture"]).abs().max() > 1


@pytest.mark.parametrize("size", [(16, 24), (24, 48)])
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.05), (0.5, 0.0), (0.5, 0.05)])
def test_outside_of_the_interval_is_the_prompt_alone(run, start, end, size):
    """The canvas's own length is the unit, and infinity lies above every start that is not off."""
    _, found = run([ours(interval_start=start, interval_end=end)], size=size)
    length = math.sqrt(size[0] * size[1])
    acts = [end * length < sigma <= (start or math.inf) * length for sigma in found["levels"][:-1]]
    assert 0 < sum(acts) < len(acts)
    assert acts[0] == (start == 0)

    def guide(sigma, cond, uncond):
        inside = end * length < sigma <= (start or math.inf) * length
        return exposure_true_guidance(cond, uncond, 5.0) if inside else cond

    close(found["picture"], by_hand(found, guide, ASKED, USUAL))


def test_a_batch_is_its_single_runs(run):
    _, together = run([ours()], batch=3)
    close(together["picture"], by_hand(together, lambda _, *x0: exposure_true_guidance(*x0, 5.0), ASKED, USUAL))
    _, first = run([ours()], batch=1)
    close(together["picture"][:1], first["picture"])


@pytest.mark.parametrize(
    ("guider", "inputs"),
    [("CFGGuider", TWO | {"cfg": 1.0}), ("BasicGuider", {"conditioning": ASKED})],
)
def test_without_guidance_nothing_changes_and_nothing_more_is_called(run, guider, inputs):
    calls, plain = run(guider=guider, inputs=inputs)
    for settings in ({}, {"interval_start": 0.5, "interval_end": 0.1}):
        calls_now, found = run([ours(**settings)], guider=guider, inputs=inputs)
        assert torch.equal(found["picture"], plain["picture"])
        assert calls_now == calls
        assert {rows for _, rows, _ in calls_now} == {1}


# ----------------------------------------------------------------------------------------------------------------------
# With the other nodes of guidance

OTHERS = {
    "RescaleCFG": ["RescaleCFG", {"multiplier": 0.7}],
    "CFGZeroStar": ["CFGZeroStar", {}],
    "CFGNorm": ["CFGNorm", {"strength": 1.0}],
    "CFGNorm, before CFG": ["CFGNorm", {"strength": 1.0, "pre_cfg": True}],
    "TCFG": ["TCFG", {}],
    "Mahiro": ["Mahiro", {}],
    "APG": ["APG", {"eta": 0.5, "norm_threshold": 15.0, "momentum": 0.0}],
    "PAG": ["PerturbedAttentionGuidance", {"scale": 3.0}],
    "ZTSNRGuidanceRescale": ["ZTSNRGuidanceRescale", {"phi": 0.7}],
}
ADDS_AFTERWARDS = ("CFGZeroStar", "CFGNorm", "Mahiro", "ZTSNRGuidanceRescale")  # in the order of the nodes


def skip_what_this_core_lacks(inside, name):
    node, settings = OTHERS[name]
    if not inside("guidance_inside.has", node=node, inputs=list(settings)):
        pytest.skip(f"this ComfyUI has no {node}, or not with {', '.join(settings)}")


@pytest.mark.parametrize("name", OTHERS)
def test_behind_another_node_it_takes_exposure_out_of_what_that_made(inside, run, name):
    skip_what_this_core_lacks(inside, name)
    _, found = run([OTHERS[name], ours()])
    _, plain = run([ours(exposure=0.0, contrast=0.0)])
    cond, before, after = found["cond"], found["before"], found["after"]
    assert found["picture"].isfinite().all()
    if name != "PAG":  # this network has no attention to perturb
        assert (before - plain["before"]).abs().max() > 0.01
    for made, prompt, direction in zip(after, cond, before - cond, strict=True):
        close(made, prompt + exposure_true(direction, prompt))
    mean = (after - cond).mean((-2, -1))
    close(mean, 0.1 * (before - cond).mean((-2, -1)))


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in (*ADDS_AFTERWARDS, "PAG")])
def test_nodes_that_replace_cfg_come_first_wherever_they_stand(inside, run, name):
    skip_what_this_core_lacks(inside, name)
    _, behind = run([OTHERS[name], ours()])
    _, in_front = run([ours(), OTHERS[name]])
    assert torch.equal(behind["picture"], in_front["picture"])


@pytest.mark.parametrize(("name", "share"), [("CFGZeroStar", 0.7), ("Mahiro", 1.0)])
def test_nodes_that_add_guidance_move_brightness_again_behind_it(run, name, share):
    _, alone = run(inputs=TWO | {"cfg": 1.0})

    def moved(chain) -> float:
        _, found = run(chain)
        return (found["picture"] - alone["picture"]).mean((-2, -1)).abs().max().item()

    assert moved([OTHERS[name], ours()]) < share * moved([ours(), OTHERS[name]])


# ----------------------------------------------------------------------------------------------------------------------
# Samplers, guiders and conditions


def test_cfg_plus_plus_renoises_with_an_unconditional_prediction_of_the_prompts_exposure(run):
    """Chung et al., arXiv 2406.08070, with uncond' = cond - T(cond - uncond); at infinity the noise is the state."""
    scale = 1.6
    _, found = run([ours()], inputs=TWO | {"cfg": scale}, sampler="euler_cfg_pp")
    cond, uncond = model_of(ASKED), model_of(USUAL)
    x = found["noise"].double()  # of variance 1, as the models take it
    for sigma, following in zip(found["levels"], found["levels"][1:], strict=False):
        alpha, s = alpha_s(sigma)
        prompt = cond(x, sigma)
        without = prompt - exposure_true(prompt - uncond(x, sigma), prompt)
        x0 = without + scale * (prompt - without)
        alpha_next, s_next = alpha_s(following)
        x = alpha_next * x0.double() + s_next * (x - alpha * without.double()) / s
    close(found["picture"], x.float())


def exposure_true_x0(guided: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    return cond + exposure_true(guided - cond, cond)


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg_has_one_of_its_two_guidances_tamed(run, style):
    """What Dual CFG Guider adds after all functions, none of them sees."""
    inputs = {"cond1": ASKED, "cond2": OTHER, "negative": USUAL, "cfg_conds": 3.0, "cfg_cond2_negative": 2.0}

    def guide(_, first, second, negative):
        if style == "regular":
            return exposure_true_guidance(second, negative, 2.0) + 3.0 * (first - second)
        return torch.lerp(negative, exposure_true_guidance(first, second, 3.0).to(negative.dtype), 2.0)

    _, found = run([ours()], "DualCFGGuider", inputs | {"style": style})
    close(found["picture"], by_hand(found, guide, ASKED, OTHER, USUAL))


@pytest.mark.parametrize("neg_scale", [0.0, 1.0])
def test_perp_neg(run, neg_scale):
    inputs = {"positive": ASKED, "negative": OTHER, "empty_conditioning": USUAL, "cfg": 5.0, "neg_scale": neg_scale}

    def guide(_, cond, negative, empty):
        wanted, unwanted = cond - empty, negative - empty
        across = unwanted - (unwanted * wanted).sum() / wanted.norm() ** 2 * wanted
        return exposure_true_x0(empty + 5.0 * (wanted - neg_scale * across), cond)

    _, found = run([ours()], "PerpNegGuider", inputs)
    close(found["picture"], by_hand(found, guide, ASKED, OTHER, USUAL))


def test_regional_prompts_keep_the_brightness_of_each(run, inside, tmp_path):
    """Two flat halves of means a and b over a mean c: guidance is brightness and contrast, and nothing else."""
    a, b, c, scale = 0.9, -0.5, 0.2, 5.0
    inputs = {"positive": [[a, 0, 0], [b, 0, 0]], "negative": [c, 0, 0], "cfg": scale}
    _, found = run([ours()], inputs=inputs)
    brightness, contrast = (a + b) / 2 - c, (a - b) / 2
    middle = (a + b) / 2 + (scale - 1) * 0.1 * brightness
    # the first step's prediction has no noise in it: the halves as they were asked for
    halves = found["after"][0].view(1, 4, SIZE[0], 2, SIZE[1] // 2).mean((0, 2, 4))
    half = contrast + (scale - 1) * 0.2 * contrast
    expected = painting([1, 0, 0], 1, 1).view(4, 1) * torch.tensor([middle + half, middle - half])
    close(halves, expected.float())
    for made, prompt, guided in zip(found["after"], found["cond"], found["before"], strict=True):
        close(made, exposure_true_x0(guided, prompt))


def test_control_nets(run):
    """It adds the same to both predictions: a shift of the picture and no guidance."""
    shift = 0.25
    calls, found = run([ours()], control=shift)
    assert all(on for _, _, on in calls)
    models = [GaussianModes(painting(numbers, *SIZE) + shift, SPREAD) for numbers in (ASKED, USUAL)]
    expected = sample(
        lambda x, sigma: exposure_true_guidance(*(model(x, sigma) for model in models), 5.0),
        found["noise"],
        found["levels"],
        "euler",
    )
    close(found["picture"], expected)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("flow", "This model has no table of noise levels"),
        ("edm", "This model has no table of noise levels"),
        ("interval", "Guidance from 0.1 down to 0.3 canvas lengths never acts"),
        ("video", "guidance of exposure is for pictures (B, C, H, W), not for shape (1, 4, 5, 8, 8)"),
        ("share", "exposure must lie in [0, 1], not 1.5"),
    ],
)
def test_bad_input_is_told_in_a_sentence(inside, case, words):
    told, shown, outputs = inside("guidance_inside.refusals")[case]
    assert words in told
    assert shown == told
    assert outputs == 1
