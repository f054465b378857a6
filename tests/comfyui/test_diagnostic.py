"""The diagnostic's nodes inside a real ComfyUI, on models whose answers are known in closed form."""

import itertools
import json
import math
import re
from functools import partial

import numpy as np
import pytest
from scipy import stats

from ztsnr.samplers import NoiseSchedule

from .test_server import node, text_to_image

pytestmark = pytest.mark.comfyui

MEAN, TAU, TEXTURE = -2.4, 0.3, 0.6  # of the ideal models: canvas mean, spread of averages, texture
SIDE = 16  # of most canvases here
DARK, LIGHT = [53.0] * 3, [255.0] * 3


@pytest.fixture(scope="module")
def call(inside):
    """Functions of diagnostic_inside.py."""
    return lambda name, **arguments: inside(f"diagnostic_inside.{name}", **arguments)


@pytest.fixture(scope="module")
def diagnose(call):
    return partial(call, "diagnose")


def numbers(texts):
    return [float(text) for text in texts]  # JSON has no infinity: it travels as text


def values(estimates):
    return [estimate["value"] for estimate in estimates]


def scales(sigma):
    """alpha and s of x = alpha x0 + s eps."""
    return (0.0, 1.0) if math.isinf(sigma) else (1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))


def slope_at(sigma, canvas, tau=TAU):
    """How x0's mean follows that of pure noise, asked at sigma: the posterior mean of a Gaussian canvas."""
    alpha, s = scales(sigma)
    variance = tau**2 * canvas
    return alpha * variance / (alpha**2 * variance + s**2)


def euler(sigmas, canvas, start):
    """Euler's method on the mean of a Gaussian canvas, x = x0 + sigma eps: slope and intercept of the picture's mean.

    ``start`` is what the noise is multiplied with at the first sigma.
    """
    variance = TAU**2 * canvas
    slope, intercept = start, 0.0
    for now, after in itertools.pairwise(sigmas):
        gain = variance / (variance + now**2)
        x0 = gain * slope, MEAN + gain * (intercept - MEAN)
        slope += (after - now) * (slope - x0[0]) / now
        intercept += (after - now) * (intercept - x0[1]) / now
    return slope, intercept


# ----------------------------------------------------------------------------------------------------------------------
# Latent Mean Diagnostic: verdicts and numbers


def test_a_zero_snr_model_sampled_exactly(diagnose):
    found = diagnose(steps=28)
    assert found["text"].startswith("Zero-SNR trained and sampled exactly.\n")
    checkpoint, sampler = found["report"]["checkpoint"], found["report"]["sampler"]
    assert checkpoint["verdict"] == "zero SNR"
    assert found["slope"] == checkpoint["slope"]["value"] == pytest.approx(0, abs=1e-6)
    sigmas = numbers(checkpoint["sigmas"])
    schedule = NoiseSchedule.sdxl()
    assert sigmas == [schedule.sigma(float(t)) for t in (500, 599, 699, 799, 899, 949, 979, 999)]
    for sigma, estimates in zip(sigmas, checkpoint["slopes"], strict=True):
        assert values(estimates) == pytest.approx([slope_at(sigma, SIDE**2)] * 4, rel=1e-4, abs=1e-6)
    assert sampler["verdict"] == "exact"
    assert sampler["start_sigma"] == "infinity"
    assert sampler["reference"] == "ZTSNR Sampler, spectral, 50 steps from infinity"
    for channel in sampler["channels"]:
        assert channel["reference_slope"]["value"] == pytest.approx(TAU * SIDE, rel=1e-3)
        assert channel["reference_intercept"]["value"] == pytest.approx(MEAN, abs=1e-4)
        assert channel["slope"]["value"] == pytest.approx(TAU * SIDE, rel=0.02)
        assert channel["intercept"]["value"] == pytest.approx(MEAN, abs=1e-4)


@pytest.mark.parametrize(("model", "ratio"), [("unpatched", 1), ("stock, shifted", 2)])
def test_a_stock_start_is_told_from_the_exact_flow(diagnose, model, ratio):
    """ComfyUI's euler / simple from 4518.76, and twice that: the slope of Euler's method, computed by hand."""
    found = diagnose(model=model, sampler="euler", scheduler="simple", steps=20, shape=(4, 32, 32))
    sampler = found["report"]["sampler"]
    sigmas = numbers(found["sigmas"])
    assert sampler["start_sigma"] == pytest.approx(4518.76 * ratio, rel=1e-5)
    assert found["report"]["checkpoint"]["verdict"] == "zero SNR"
    if ratio == 1:  # the ideal network knows the unshifted table
        assert found["text"].startswith("Zero-SNR model, but the sampler's steps are too coarse for the brightness")
        slope, intercept = euler(sigmas, 32**2, math.hypot(1, sigmas[0]))
        for channel in sampler["channels"]:
            assert channel["slope"]["value"] == pytest.approx(slope, rel=5e-3)  # ComfyUI rounds timesteps
            assert channel["intercept"]["value"] == pytest.approx(intercept, abs=5e-3)
            assert channel["reference_slope"]["value"] == pytest.approx(TAU * 32, rel=1e-3)


def test_the_reference_keeps_the_canvas_shift(diagnose):
    for model in ("shifted", "stock, shifted"):
        found = diagnose(model=model, sampler="euler", scheduler="simple", steps=3)
        # the same canvas, twice the noise at every timestep: another reference than without the shift
        first = found["report"]["sampler"]["channels"][0]["reference_slope"]["value"]
        assert abs(first - TAU * SIDE) > 0.05
        assert found["report"]["checkpoint"]["slopes"][0][0]["value"] == pytest.approx(
            slope_at(NoiseSchedule.sdxl().sigma(500.0), SIDE**2), rel=1e-4
        )


def test_a_zero_snr_model_under_plain_sigmas(diagnose):
    low, high = 0.0291672 ** (1 / 7), 14.614641 ** (1 / 7)
    karras = [*((high + i / 19 * (low - high)) ** 7 for i in range(20)), 0.0]
    found = diagnose(sampler="euler", scheduler=karras, shape=(4, 64, 64), seeds=4)
    sampler = found["report"]["sampler"]
    assert found["text"].startswith("Zero-SNR model, but the sampler starts at sigma 14.6146: pull toward grey ")
    assert found["report"]["checkpoint"]["verdict"] == "zero SNR"
    assert sampler["verdict"] == "biased"
    slope, intercept = euler(karras, 64**2, karras[0])  # ComfyUI adds no more noise than sigma below the table's end
    for channel in sampler["channels"]:
        assert channel["slope"]["value"] == pytest.approx(slope, rel=5e-3)
        assert channel["intercept"]["value"] == pytest.approx(intercept, abs=5e-3)
        assert channel["reference_intercept"]["value"] == pytest.approx(MEAN, abs=1e-4)


@pytest.mark.parametrize("model", ["plain", "plain, marked"])
def test_a_plain_model(diagnose, model):
    found = diagnose(model=model, sampler="euler", scheduler="simple", shape=(4, 64, 64))
    checkpoint = found["report"]["checkpoint"]
    assert checkpoint["verdict"] == "not zero SNR"
    assert found["text"].startswith("Not zero-SNR trained: x0 at t = T follows the noise mean")
    plain = NoiseSchedule.sdxl(zero_terminal_snr=False)
    # asked with noise alone, it takes a share alpha for signal that is not there
    expected = slope_at(plain.sigma(999.0), 64**2)
    # a marked file has a table that ends at infinity, so x0 is read from v as -v; the network's v is (alpha x - x0) / s
    alpha, s = scales(plain.sigma(999.0))
    expected = (expected - alpha) / s if model == "plain, marked" else expected
    assert found["slope"] == pytest.approx(expected, rel=1e-3)
    assert checkpoint["believed_sigma"] == pytest.approx(14.6, rel=0.05)


def test_a_model_whose_schedule_another_node_replaced(diagnose):
    """By v-prediction with zero SNR, which is what our own node makes of it: the reference is exact."""
    found = diagnose(model="another schedule", sampler="euler", scheduler="simple")
    assert found["report"]["checkpoint"]["verdict"] == "zero SNR"
    assert found["report"]["sampler"]["start_sigma"] == pytest.approx(4518.76, rel=1e-5)
    assert found["report"]["sampler"]["reference"] == "ZTSNR Sampler, spectral, 50 steps from infinity"


@pytest.mark.parametrize(("model", "shape"), [("flow", (16, 16, 16)), ("video", (16, 3, 12, 16))])
def test_flow_matching(diagnose, model, shape):
    found = diagnose(model=model, sampler="euler", scheduler="simple", shape=shape)
    checkpoint, sampler = found["report"]["checkpoint"], found["report"]["sampler"]
    canvas = math.prod(shape[1:])
    times = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
    sigmas = numbers(checkpoint["sigmas"])
    assert sigmas == pytest.approx([*(time / (1 - time) for time in times), math.inf])
    for sigma, estimates in zip(sigmas, checkpoint["slopes"], strict=True):
        assert values(estimates) == pytest.approx([slope_at(sigma, canvas)] * 16, rel=1e-3, abs=1e-6)
    assert sampler["start_sigma"] == "infinity"
    assert sampler["reference"] == "the same sampler with 4 times as many steps"
    for channel in sampler["channels"]:
        assert channel["intercept"]["value"] == pytest.approx(-1, abs=1e-3)
        # Euler's method is of first order: its error at a quarter of the step is a quarter
        exact = TAU * math.sqrt(canvas)
        error, finer = (channel[name]["value"] - exact for name in ("slope", "reference_slope"))
        assert error == pytest.approx(4 * finer, rel=0.2)


def test_other_models_are_asked_about_their_sampler_alone(diagnose):
    found = diagnose(model="edm", sampler="euler", scheduler="simple")
    assert found["report"]["checkpoint"] is None
    assert found["report"]["sampler"]["start_sigma"] == pytest.approx(120)
    sentence = found["text"].splitlines()[-1]
    assert sentence.startswith("The checkpoint was not tested: ")
    assert "BaseModel (V_PREDICTION_EDM)" in sentence
    assert found["slope"] == {"blocked": sentence}


def test_latents_of_other_channels_are_fixed_as_comfyui_does(diagnose):
    found = diagnose(model="flow", sampler="euler", scheduler="simple", steps=3, shape=(4, 8, 8))
    assert len(found["report"]["sampler"]["channels"]) == 16
    found = diagnose(model="video", sampler="euler", scheduler="simple", steps=3, shape=(4, 8, 8))
    assert len(found["report"]["sampler"]["channels"]) == 16


def test_samplers_that_add_noise_get_another_for_each_seed(diagnose):
    found = diagnose(sampler="euler_ancestral", scheduler="simple", steps=6)
    assert found["report"]["sampler"]["channels"][0]["intercept"]["error"] > 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# Latent Mean Diagnostic: guidance


def test_guidance_extrapolates_the_canvas(call):
    """mu_u + w (mu_c - mu_u): at CFG 5 each channel moves by 4 times the difference of the prompts."""
    found = call("diagnose_guided", guidance_shift=True)
    answer = found["report"]["guidance"]
    cfg, ours = answer["shifts"]
    moved = 4 * 0.1 * found["levels"]
    assert abs(moved) > 5
    assert cfg["guidance"] == "CFG 5"
    assert np.array(cfg["changes"]) == pytest.approx(np.full((3, 2), moved), rel=0.02)
    assert ours["guidance"] == "exposure-true guidance"
    assert np.array(ours["changes"]) == pytest.approx(np.full((3, 2), 0.1 * moved), abs=0.02 * abs(moved))
    assert answer["unguided_clipped"] < 0.02
    assert f"Guidance: {answer['sentence']}." in found["text"]
    assert found["report"]["verdict"] == "zero-SNR trained and sampled exactly"
    assert "In the first prediction" not in found["text"]


def test_the_guidance_that_is_asked_about_is_the_models_own(call):
    """ZTSNR Guidance at exposure 1 leaves nothing of it, and another node that halves guidance leaves half."""
    kept, halved = (call("diagnose_guided", guidance_shift=True, node=node) for node in ("ours", "halver"))
    ours = kept["report"]["guidance"]["shifts"][0]
    assert ours["guidance"] == "CFG 5 with guidance nodes"
    assert ours["rms"]["value"] < 0.1
    change = halved["report"]["guidance"]["shifts"][0]["mean"]["value"]
    assert change == pytest.approx(2 * 0.1 * halved["levels"], rel=0.02)


def test_without_asking_the_first_prediction_is_read(call):
    """For nothing: the run has both predictions at hand, and at infinity they are the prompts' means."""
    found = call("diagnose_guided")
    assert found["report"]["guidance"] is None
    (line,) = (line for line in found["text"].splitlines() if line.startswith("In the first prediction guidance moves"))
    by = float(re.search(r"by ([+-][\d.]+) levels", line)[1])
    assert by == pytest.approx(4 * 0.1 * found["levels"], abs=0.06)
    assert "first prediction" not in call("diagnose_guided", cfg=1.0)["text"]


def test_guidance_at_cfg_1_is_none(call):
    found = call("diagnose_guided", cfg=1.0, guidance_shift=True)
    assert found["report"]["guidance"] is None
    assert found["text"].splitlines()[-1] == "Guidance was not measured: at CFG 1 there is none."


def test_guidance_of_a_video_has_no_exposure_true_twin(diagnose):
    found = diagnose(
        model="video", sampler="euler", scheduler="simple", shape=(16, 3, 12, 16), steps=3, cfg=3.0, guidance_shift=True
    )
    assert [shift["guidance"] for shift in found["report"]["guidance"]["shifts"]] == ["CFG 3"]
    # this model does not read its prompt
    assert found["report"]["guidance"]["shifts"][0]["rms"]["value"] == pytest.approx(0, abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Latent Mean Diagnostic: what else it does


@pytest.mark.parametrize(("theme", "paper"), [("dark", DARK), ("light", LIGHT)])
def test_picture(inside, diagnose, theme, paper):
    found = diagnose(steps=3, theme=theme)
    if not inside("diagnostic_inside.installed", module="matplotlib"):
        pytest.skip("ComfyUI's environment has no matplotlib")
    _, height, width, colours = found["picture"]
    assert (width, colours) == (900, 3)
    assert height > 900
    assert found["paper"] == paper
    assert found["contrast"] > 0.05
    assert found["ui"]["images"] == 1
    assert found["shown"] == []  # the picture's headline says it


@pytest.mark.parametrize(("theme", "paper"), [("dark", DARK), ("light", LIGHT)])
def test_without_matplotlib_all_numbers_come(diagnose, theme, paper):
    found, without = (diagnose(steps=3, theme=theme, hide=hide) for hide in (None, "matplotlib"))
    assert {name: without[name] for name in ("text", "slope", "report")} == {
        name: found[name] for name in ("text", "slope", "report")
    }
    assert without["picture"] == [1, 120, 640, 3]
    assert without["paper"] == paper
    assert without["contrast"] > 0.05  # there is something to read
    assert without["shown"] == [without["text"].splitlines()[0]]


def test_colour_asked_for(inside, diagnose):
    """The canvas is a dark red by ComfyUI's factors."""
    found = diagnose(steps=3, asked_colour="black", hide="skimage")
    assert found["text"].endswith("or pip install scikit-image.")
    assert found["report"]["sampler"]["colour_error"] is None
    if not inside("diagnostic_inside.installed", module="skimage"):
        pytest.skip("ComfyUI's environment has no scikit-image")
    errors = {
        name: diagnose(steps=3, asked_colour=name)["report"]["sampler"]["colour_error"]["value"]
        for name in ("black", "red", "white")
    }
    assert errors["red"] < errors["black"] < errors["white"]


@pytest.mark.parametrize(("inputs", "probes"), [({}, 9), ({"guidance_shift": True, "cfg": 3.0}, 15)])
def test_progress_has_a_tick_for_each_probe(call, inputs, probes):
    found = call("progress", **inputs)
    assert found["told"] == [["total", probes], *[["tick", 1]] * probes]
    assert found["error"] is None


@pytest.mark.parametrize(("at", "ticks"), [(5, 0), (40, 2)])
def test_interruption_ends_within_a_probe(call, at, ticks):
    found = call("progress", interrupt_at=at)
    assert found["error"] == "InterruptProcessingException"
    assert found["calls"] == at
    assert found["told"] == [["total", 9], *[["tick", 1]] * ticks]
    assert found["again"]


def test_the_model_and_its_probe_are_left_alone(call):
    assert call("model_left_alone") == {"same": True, "probe": 0}


def test_the_checkpoint_is_asked_without_guidance(call):
    plain, spoiled = call("guidance_left_out")
    assert spoiled == plain


def test_finer_steps_are_even_in_angle(call):
    found = numbers(call("finer", sigmas=["inf", "10", "1", "0"]))
    asked = [math.inf, 10.0, 1.0, 0.0]
    assert found[::4] == asked
    angles = np.arctan(found)
    assert np.diff(angles).reshape(3, 4) == pytest.approx(
        np.repeat(np.diff(np.arctan(asked)) / 4, 4).reshape(3, 4), rel=1e-4
    )


def test_bad_input_ends_in_a_sentence(call):
    found = call("refusals")
    for name, output in found.items():
        assert output["count"] == 3, name
        assert output["shown"] == output["refused"], name
        assert re.fullmatch(r"[A-Z][^\n]+\.", output["refused"]), name
    assert "one step, not 1" in found["one sigma"]["refused"]
    assert "one step, not 0" in found["no sigmas"]["refused"]
    assert "not at 1:" in found["half way"]["refused"]
    assert re.search(r"pure noise at sigma 1\.77.*channel 3", found["nan at T"]["refused"])
    assert re.search(r"Seed 5: .*step 5 of 5 \(sigma 0\.59.*channel 3 of 4 of the pred", found["nan later"]["refused"])
    assert "put ZTSNR Model" in found["infinity without our model"]["refused"]
    assert "at least 2 seeds" in found["one seed"]["refused"]
    assert "The VAE cannot decode" in found["wrong vae"]["refused"]


# ----------------------------------------------------------------------------------------------------------------------
# Latent Mean Probe


def test_every_sampler_is_watched_and_left_as_it_is(call, about):
    for sampler in about["samplers"]:
        found = call("watched_run", sampler=sampler)
        assert found["same"], sampler
        probe, spy = found["probe"], found["spy"]
        states, x0s = (np.array([asked[i][:1] for asked in spy]) for i in (1, 2))  # some also ask without the prompt
        assert len(probe["sigmas"]) == found["predictions"] == len(spy), sampler
        assert probe["sigmas"][0] == "inf", sampler
        assert numbers(probe["sigmas"]) == pytest.approx([float(sigma) for sigma, *_ in spy], rel=1e-3), sampler
        assert np.array(probe["state"]) == pytest.approx(states, abs=1e-5), sampler
        assert np.array(probe["denoised"]) == pytest.approx(x0s, abs=2e-3), sampler
        assert probe["noise"][0] == pytest.approx(found["noise"][0], abs=1e-6), sampler


def test_the_prediction_is_that_of_the_guidance(call):
    """Prompts that agree: guidance changes nothing, and the network is asked twice as much in a batch."""
    found = call("watched_run", sampler="euler", cfg=3.0)
    assert found["same"]
    for guided, (_, _, both) in zip(found["probe"]["denoised"], found["spy"], strict=True):
        assert len(both) == 2
        assert guided[0] == pytest.approx(both[0], abs=1e-4)


def test_the_order_of_nodes_does_not_matter(call):
    before, after = call("probe_before_and_after")
    assert before == after
    assert before["sigmas"][0] == "inf"


def test_stages_are_one_run_and_another_seed_is_another(call):
    found = call("probe_in_two_stages")
    between, two, text = found["two"]
    assert between == 3
    assert text.startswith("8 evaluations of the network, from sigma infinity to ")
    whole = found["whole"]
    assert two["sigmas"] == whole["sigmas"]
    assert two["noise"] == whole["noise"]
    for name in ("state", "denoised"):
        assert np.array(two[name]) == pytest.approx(np.array(whole[name]), abs=1e-5)
    assert found["again"] == found["two"]


def test_inpainting_is_watched(call):
    found = call("watched_inpainting")
    assert found["same"]
    assert found["evaluations"] == 5
    assert "not finite" not in found["text"]


# ----------------------------------------------------------------------------------------------------------------------
# Latent Mean Report


def number_after(text, words):
    return float(re.search(rf"{words} (-?[\d.e-]+)", text).group(1))


@pytest.mark.parametrize(
    ("model", "shape"), [("exact", (4, 4, 16, 16)), ("flow", (4, 16, 8, 8)), ("video", (3, 16, 3, 4, 8))]
)
def test_report_of_a_batch(call, model, shape):
    found = call("report_of_run", model=model, shape=shape)
    lines = found["report"]["text"].splitlines()
    assert lines[0] == "12 evaluations of the network, from sigma infinity to " + lines[0].split(" to ")[1]
    assert lines[0].endswith(f" Means over {shape[0]} pictures:")
    noise, picture = np.array(found["noise"]), np.array(found["picture"])
    predictions = np.array(found["statistics"]["denoised"])
    for channel in range(shape[1]):
        line = lines[1 + channel]
        assert line.startswith(f"Channel {channel + 1}: ")
        assert number_after(line, "noise") == pytest.approx(noise[:, channel].mean(), rel=1e-3, abs=1e-6)
        assert number_after(line, "first prediction") == pytest.approx(predictions[0, :, channel].mean(), rel=1e-3)
        assert number_after(line, "last prediction") == pytest.approx(predictions[-1, :, channel].mean(), rel=1e-3)
        assert number_after(line, "picture") == pytest.approx(picture[:, channel].mean(), rel=1e-3)
        fit = stats.linregress(noise[:, channel], picture[:, channel])
        assert number_after(line, "slope of the pictures' means on the noise's") == pytest.approx(fit.slope, rel=2e-3)
        assert "R^2 1.00" in line
    # latents that were kept in half precision are known again
    assert found["again"]["text"].splitlines()[0] == lines[0]


def test_intervals_of_a_report(call):
    """Fresh noise scatters the pictures' means around the line: Student's interval for a regression's slope."""
    found = call("report_of_run", shape=(6, 4, 16, 16), sampler="euler_ancestral")
    noise, picture = np.array(found["noise"]), np.array(found["picture"])
    for channel, line in enumerate(found["report"]["text"].splitlines()[1:5]):
        slope, error, r_squared = map(float, re.search(r"noise's (\S+) ± (\S+), R\^2 (\S+)\.$", line).groups())
        fit = stats.linregress(noise[:, channel], picture[:, channel])
        assert slope == pytest.approx(fit.slope, abs=0.05 * error)
        assert error == pytest.approx(stats.t(4).ppf(0.995) * fit.stderr, rel=0.06)  # written with two digits
        assert r_squared == pytest.approx(fit.rvalue**2, abs=0.006)


def test_brightness_of_a_run(call):
    """That of ComfyUI's own previews."""
    found = call("report_of_run", shape=(3, 4, 16, 16))
    pattern = r"Brightness ([\d.]+) of 255 \(([\d.]+) to ([\d.]+)\) by the linear latent-to-RGB factors; [\d.]+% of the"
    said = [float(number) for number in re.search(pattern, found["report"]["text"]).groups()]
    expected = found["brightness"]
    assert said == pytest.approx([np.mean(expected), min(expected), max(expected)], abs=0.15)


@pytest.mark.parametrize(("theme", "paper"), [("dark", DARK), ("light", LIGHT)])
def test_picture_of_a_run(inside, call, theme, paper):
    found = call("report_of_run", theme=theme)["report"]
    without = call("report_of_run", theme=theme, hide="matplotlib")["report"]
    assert without["text"] == found["text"]
    assert without["picture"] == [1, 120, 640, 3]
    assert without["paper"] == paper
    if not inside("diagnostic_inside.installed", module="matplotlib"):
        pytest.skip("ComfyUI's environment has no matplotlib")
    assert found["picture"][2:] == [900, 3]
    assert found["paper"] == paper
    assert found["contrast"] > 0.05


def test_latents_of_other_runs_are_refused(call):
    found = call("report_refusals")
    assert found["unseen"]["refused"].startswith("The probe has recorded no run: ")
    for name, shape in (("batch", "(1, 4, 8, 8)"), ("other", "(2, 4, 8, 8)")):
        assert found[name]["refused"].startswith(f"This latent {shape} is not the result of the last probed run")
    assert "The VAE cannot decode" in found["wrong vae"]["refused"]
    assert "refused" not in found["fitting"]
    assert "A batch of at least 3 would show" in found["fitting"]["text"]


def test_unusual_runs(call):
    found = call("unusual_runs")
    nan = found["nan"]["text"].splitlines()
    assert nan[0].startswith("NaN or infinite values began at step 3 of 4 (sigma 1.768), in channel 3 of 4")
    assert nan[3].endswith("last prediction not finite, picture not finite.")
    assert nan[-1].endswith("is not finite.")
    assert "no slope to fit" in found["alike"]["text"]
    assert "no slope to fit" in found["constant"]["text"]
    assert "The noise is constant" in found["constant"]["text"]
    assert "The noise is unknown" in found["no noise"]["text"]
    assert found["no noise"]["text"].startswith("2 evaluations of the network, from sigma 3 to 1.")
    for output in found.values():
        assert "nan" not in re.sub("NaN or infinite values began", "", output["text"]).lower()


# ----------------------------------------------------------------------------------------------------------------------
# In a server


def strict_json(text):
    """JSON as a browser reads it: no NaN, no Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def run(server, prompt):
    """What the nodes of a graph show, from what the server sends of it."""
    sent = json.loads(server.request("/prompt", {"prompt": prompt}))["prompt_id"]
    outputs = server.wait_for(sent)
    assert strict_json(server.request(f"/history/{sent}"))[sent]["outputs"] == outputs
    return outputs


def graph(theme):
    """The diagnostic, and a probed run with its report, as shown text and pictures."""
    prompt = text_to_image()
    common = {"positive": ["positive", 0], "negative": ["negative", 0], "sampler": ["solver", 0],
              "sigmas": ["sigmas", 0]}  # fmt: skip
    del prompt["sampler"], prompt["decode"], prompt["picture"]
    prompt["positive"]["inputs"]["text"] = prompt["negative"]["inputs"]["text"] = ""
    prompt["size"]["inputs"].update(width=64, height=64, batch_size=3)
    return prompt | {
        "exact": node("ZTSNRModelSampling", model=["loader", 0], prediction="auto", schedule="auto",
                      first_step="exact infinity", canvas_shift=1.0),
        "solver": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["exact", 0], scheduler="simple", steps=3, denoise=1.0),
        "diagnostic": node("LatentMeanDiagnostic", model=["exact", 0], latent=["size", 0], vae=["loader", 2], cfg=2.0,
                           seeds=2, first_seed=0, asked_colour="none", theme=theme, **common),
        "probe": node("LatentMeanProbe", model=["exact", 0]),
        "run": node("SamplerCustom", model=["probe", 0], latent_image=["size", 0], add_noise=True, noise_seed=1,
                    cfg=2.0, **common),
        "report": node("LatentMeanReport", probe=["probe", 1], latent=["run", 0], vae=["loader", 2], theme=theme),
        "diagnostic text": node("PreviewAny", source=["diagnostic", 0]),
        "report text": node("PreviewAny", source=["report", 0]),
    }  # fmt: skip


@pytest.mark.parametrize(("theme", "paper"), [("dark", DARK), ("light", LIGHT)])
def test_graph_in_a_server(server, theme, paper):
    outputs = run(server, graph(theme))
    for name in ("diagnostic", "report"):
        picture = server.image(outputs[name]["images"][0])
        assert picture[0, 0].tolist() == paper
        assert picture.std() > 10
    text = outputs["diagnostic text"]["text"][0]
    # an untrained network: whatever it is, it is said in words, with the evidence
    assert re.match(r"[A-Z].+\.\n\nCheckpoint: .+\n\nSampler: .+\nReference: ZTSNR Sampler, spectral, 50 steps", text)
    assert "Brightness through the VAE." in text
    text = outputs["report text"]["text"][0]
    assert text.startswith("3 evaluations of the network, from sigma infinity to ")
    assert text.count("slope of the pictures' means on the noise's") == 4
    assert "through the VAE" in text


def test_sigmas_from_infinity_on_a_model_that_knows_none(server):
    """What stands for infinity is a number to it, so the pictures are."""
    prompt = graph("dark")
    prompt["probe"]["inputs"]["model"] = ["loader", 0]
    prompt["diagnostic"]["inputs"]["model"] = ["loader", 0]
    outputs = run(server, prompt)
    text = outputs["report text"]["text"][0]
    assert "NaN" not in text
    assert "from sigma" in text
    assert server.image(outputs["report"]["images"][0]).std() > 10


def test_a_probe_that_comfyui_keeps_serves_the_next_seed(server):
    """The second run reuses the node's output of the first one; what it reports is what a fresh server would."""
    server.forget()
    first = graph("dark")
    del first["diagnostic"], first["diagnostic text"]
    second = json.loads(json.dumps(first))
    second["run"]["inputs"]["noise_seed"] = 2
    texts = [run(server, prompt)["report text"]["text"][0] for prompt in (first, second)]
    server.forget()
    assert run(server, second)["report text"]["text"][0] == texts[1] != texts[0]
