"""``ztsnr leak`` on whole pipelines of random weights: what it measures, writes, resumes and refuses."""

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import StableDiffusionXLPipeline

from ztsnr import extras
from ztsnr.checkpoints import load_pipeline
from ztsnr.cli import main
from ztsnr.diagnostics import leak_run, pipelines
from ztsnr.diagnostics.leak_probes import SamplerProbe
from ztsnr.diagnostics.leak_report import load_row, row_of_pictures
from ztsnr.diagnostics.plain import plain
from ztsnr.samplers import NoiseSchedule, ZTSNRScheduler, exposure_true_guidance

from .tiny_pipelines import make_tiny_sdxl, write_single_file

SHORT = ("--seeds", 2, "--steps", 3, "--reference-steps", 10)
TWO_PROMPTS = ("--prompt", "", "--prompt", "solid black background=black")


@pytest.fixture(scope="module", autouse=True)
def _short_sheet():
    """Three steps for each start of the sheet, which otherwise takes most of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leak_run, "SHEET_STEPS", 3)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def pipe(tiny):
    return load_pipeline(tiny).pipeline


def invoke(*arguments) -> Result:
    """A call of the command; a crash that click did not turn into a sentence is raised."""
    result = CliRunner().invoke(main, ["leak", *(str(argument) for argument in arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def leak(*arguments) -> tuple[int, str]:
    """Exit code and what is printed, without the progress bar."""
    result = invoke(*arguments)
    return result.exit_code, result.stdout


def sentence_of(*arguments) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2
    (error,) = re.findall(r"Error: (.*)", result.stderr, re.DOTALL)
    return error


# ----------------------------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("leak")
    code, text = leak(tiny, *TWO_PROMPTS, *SHORT, "--out", out)
    assert code == 0
    return out, text


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes most of a short run's time."""
    monkeypatch.setattr(extras, "find_spec", lambda name: None)


def strict(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_it_prints_what_it_writes(finished):
    out, text = finished
    report = strict((out / "report.json").read_text())
    assert report["verdict"][1:] in text  # the first letter is a capital there
    assert [entry["target"] for entry in report["prompts"]] == [None, [0, 0, 0]]
    assert report["prompts"][0]["checkpoint"]["sigmas"][-1] == "infinity"
    assert report["prompts"][1]["checkpoint"] is None
    assert report["prompts"][1]["sampler"]["colour_error"]["seeds"] == 2
    brightness = report["prompts"][1]["sampler"]["brightness"]["value"]
    assert f"{brightness:.0f}" in text
    assert [row["start_sigma"] for row in report["sheet"]] == ["infinity", 20000, 4518, 136, 56, 14.6]


def test_the_page_is_one_file_with_all_pictures(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,40})', page)
    assert len(sources) == 2 * 2 + 2  # a light and a dark picture for two prompts, and two sheets
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "solid black background" in page


def test_a_finished_run_is_only_reported_again(finished, tiny, monkeypatch):
    out, text = finished

    def fail(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(leak_run, "probe_sampler", fail)
    monkeypatch.setattr(leak_run, "probe_network", fail)
    before = (out / "report.json").read_bytes()
    assert leak(tiny, *TWO_PROMPTS, *SHORT, "--out", out) == (0, text)
    assert (out / "report.json").read_bytes() == before


@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_run_goes_on(finished, tiny, tmp_path, monkeypatch):
    """Stopped at its fourth measurement, with half a line written: the result is that of a run in one go."""
    out, _ = finished
    real, calls = leak_run.probe_sampler, []

    def stopped(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(leak_run, "probe_sampler", stopped)
    assert leak(tiny, *TWO_PROMPTS, *SHORT, "--out", tmp_path)[0] == 1
    file = tmp_path / "measurements.jsonl"
    kept = file.read_text().count("\n")
    with file.open("a") as lines:
        lines.write('{"1/sampler/0/0": {"seed"')
    assert leak(tiny, *TWO_PROMPTS, *SHORT, "--out", tmp_path)[0] == 0
    assert len(calls) == 4 + 16 - 3  # three of sixteen were kept
    assert kept >= 4
    assert (tmp_path / "report.json").read_bytes() == (out / "report.json").read_bytes()


@pytest.mark.usefixtures("no_pictures")
def test_other_settings_are_not_mixed_in(finished, tiny):
    out, _ = finished
    sentence = sentence_of(tiny, *TWO_PROMPTS, *SHORT, "--guidance", 3, "--out", out)
    assert "other settings" in sentence
    assert "measurements.jsonl" in sentence


@pytest.mark.usefixtures("no_pictures")
def test_numbers_come_without_matplotlib(tiny, tmp_path):
    code, text = leak(tiny, *TWO_PROMPTS, *SHORT, "--out", tmp_path)
    assert code == 0
    assert "pip install matplotlib" in text
    page = (tmp_path / "report.html").read_text()
    assert "<img" not in page
    assert "14.6" in page


@pytest.mark.usefixtures("no_pictures")
def test_more_seeds_are_added_to_those_that_were_measured(finished, tiny, tmp_path, monkeypatch):
    out, _ = finished
    shutil.copy(out / "measurements.jsonl", tmp_path)
    shutil.copytree(out / "pictures", tmp_path / "pictures")
    real, seeds = leak_run.probe_network, []
    monkeypatch.setattr(leak_run, "probe_network", lambda *a: seeds.append(a[-1]) or real(*a))
    code, _ = leak(tiny, *TWO_PROMPTS, *SHORT, "--seeds", 3, "--out", tmp_path)
    assert code == 0
    assert seeds == [2]
    assert strict((tmp_path / "report.json").read_text())["settings"]["seeds"] == [0, 1, 2]


@pytest.mark.usefixtures("no_pictures")
def test_trained_on_the_same_path_is_another_model(finished, tiny, tmp_path):
    out, _ = finished
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    pipeline.unet.conv_out.bias.data += 0.01
    pipeline.save_pretrained(tmp_path / "model")
    assert "another model" in sentence_of(tmp_path / "model", *TWO_PROMPTS, *SHORT, "--out", out)


@pytest.mark.usefixtures("no_pictures")
def test_the_gate(tiny, tmp_path, monkeypatch):
    """The checkpoint's answer and the worst pull, of which one is enough to be stopped."""
    arguments = (tiny, *TWO_PROMPTS, *SHORT, "--out", tmp_path, "--gate", 100)
    code, text = leak(*arguments)
    assert code == 1  # a random network ignores the noise's mean too much to be judged
    assert "Gate failed: cannot tell: this prompt fixes the brightness" in text

    real = leak_run.judge_network
    monkeypatch.setattr(leak_run, "judge_network", lambda *a: replace(real(*a), verdict="zero SNR"))
    assert leak(*arguments)[0] == 0
    worst = max(
        entry["sampler"]["pull"]["value"] for entry in strict((tmp_path / "report.json").read_text())["prompts"]
    )
    assert worst > 0
    code, text = leak(*arguments[:-1], 0.9 * worst)
    assert code == 1
    assert "pull toward grey" in text.split("Gate failed")[-1]


@pytest.mark.usefixtures("no_pictures")
def test_a_single_file(tiny, tmp_path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    file = tmp_path / "tiny.safetensors"
    write_single_file(pipeline, file, marks=("v_pred", "ztsnr"))
    code, text = leak(file, "--config", tiny, "--prompt", "", *SHORT, "--out", tmp_path / "out")
    assert code == 0
    assert "v_prediction, zero terminal SNR" in text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (("--scheduler", "model"), None),
        (("--scheduler", "EulerDiscreteScheduler", "--spacing", "trailing"), 4096),
        (("--scheduler", "ztsnr", "--spacing", "trailing"), math.inf),
        (("--scheduler", "DDIMScheduler", "--spacing", "leading"), None),
    ],
)
def test_the_sampler_under_test(tiny, tmp_path, arguments, start):
    code, _ = leak(tiny, "--prompt", "", *SHORT, *arguments, "--out", tmp_path)
    assert code == 0
    (entry,) = strict((tmp_path / "report.json").read_text())["prompts"]
    began = float(entry["sampler"]["start_sigma"])
    if start is None:  # SDXL's leading steps never run t = T
        assert began < 20
    else:
        assert began == pytest.approx(start)


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


def test_guidance_is_compared_with_the_same_noise_without_it(finished):
    out, text = finished
    report = strict((out / "report.json").read_text())
    page = (out / "report.html").read_text()
    for entry in report["prompts"]:
        answer = entry["guidance"]
        assert [shift["guidance"] for shift in answer["shifts"]] == ["CFG 5", "exposure-true guidance"]
        assert np.shape(answer["shifts"][0]["changes"]) == np.shape(answer["unguided"]) == (2, 2)
        # the guided pictures are the exact flow's
        guided = np.add(answer["unguided"], answer["shifts"][0]["changes"])
        assert guided.mean() == pytest.approx(entry["sampler"]["reference_brightness"]["value"])
    assert f"Guidance: {report['prompts'][0]['guidance']['sentence']}." in text
    most = max(report["prompts"], key=lambda entry: entry["guidance"]["shifts"][0]["rms"]["value"])
    assert f"{most['guidance']['sentence']} (prompt: {most['prompt'] or '(empty prompt)'})" in page
    assert [row["guidance"] for row in report["guidance_sheet"]] == ["no guidance", "CFG 5", "exposure-true guidance"]
    assert {row["prompt"] for row in report["guidance_sheet"]} == {most["prompt"]}
    for row in report["guidance_sheet"]:
        pictures, labels = load_row(out / "pictures" / f"{row['file']}.png")
        assert labels == ["0", "1"]
        assert pictures.mean((1, 2)) @ [0.2126, 0.7152, 0.0722] == pytest.approx(row["brightness"])


@pytest.mark.usefixtures("no_pictures")
def test_without_guidance_there_is_nothing_to_ask(tiny, tmp_path):
    code, text = leak(tiny, "--prompt", "", *SHORT, "--guidance", 1, "--out", tmp_path)
    assert code == 0
    assert "uidance:" not in text
    report = strict((tmp_path / "report.json").read_text())
    assert report["prompts"][0]["guidance"] is None
    assert report["guidance_sheet"] == []
    assert "With and without guidance" not in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_a_folder_from_before_the_question_is_completed(finished, tiny, tmp_path, monkeypatch):
    out, _ = finished
    shutil.copytree(out / "pictures", tmp_path / "pictures")
    lines = (out / "measurements.jsonl").read_text().splitlines(keepends=True)
    kept = [
        line for line in lines if not any(kind in line for kind in ("/unguided/", "/exposure-true/", '{"guidance_'))
    ]
    assert len(lines) - len(kept) == 2 * 2 * 2 + 3
    (tmp_path / "measurements.jsonl").write_text("".join(kept))
    real, calls = leak_run.probe_sampler, []
    monkeypatch.setattr(leak_run, "probe_sampler", lambda *a: calls.append(a[-1]) or real(*a))
    assert leak(tiny, *TWO_PROMPTS, *SHORT, "--out", tmp_path)[0] == 0
    assert len(calls) == 2 * 2 * 2
    assert (tmp_path / "report.json").read_bytes() == (out / "report.json").read_bytes()


def test_guidance_of_the_network_is_of_its_own_predictions(pipe):
    """Exposure-true guidance by its formula, from the U-Net's predictions with and without the prompt."""
    schedule = NoiseSchedule.from_config(pipe.scheduler.config)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    embeddings = pipelines.encode(pipe, "a cat")
    negative = {name.removeprefix("negative_"): embeddings[f"negative_{name.removeprefix('negative_')}"]
                for name in embeddings}  # fmt: skip
    for sigma in (math.inf, 2.0):
        cond, uncond = (
            pipelines.network(pipe, texts, schedule, "v_prediction")(noise, sigma) for texts in (embeddings, negative)
        )
        guided = pipelines.network(pipe, embeddings, schedule, "v_prediction", 5.0, exposure_true_guidance)
        d = (cond - uncond).double()
        m = d.mean((-2, -1), keepdim=True)
        p = (cond - cond.mean((-2, -1), keepdim=True)).double()
        k = (d * p).sum((1, 2, 3), keepdim=True) / (p * p).sum((1, 2, 3), keepdim=True)
        expected = cond + 4 * (d - 0.9 * m - 0.8 * k * p)
        assert torch.allclose(guided(noise, sigma).double(), expected, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.usefixtures("no_pictures")
def test_mistakes_end_in_a_sentence(tiny, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "no file or folder" in sentence_of(tmp_path / "nothing.safetensors", *out)
    assert "is not a colour" in sentence_of(tiny, "--prompt", "a cat=purplish", *out)
    assert "is not a colour" in sentence_of(tiny, "--prompt", "a cat=#12345g", *out)
    assert "not 'Euler'" in sentence_of(tiny, "--scheduler", "Euler", *SHORT, *out)
    assert "spacing" in sentence_of(tiny, "--scheduler", "model", "--spacing", "karras", *SHORT, *out)
    assert "multiples of" in sentence_of(tiny, "--width", 33, *SHORT, *out)
    assert leak(tiny, "--seeds", 1)[0] == 2
    (tmp_path / "file").write_text("")
    assert "is a file" in sentence_of(tiny, *SHORT, "--out", tmp_path / "file")
    assert "cannot write into" in sentence_of(tiny, *SHORT, "--out", tmp_path / "file" / "below")


@pytest.mark.usefixtures("no_pictures")
def test_a_model_that_overflows(tiny, tmp_path, monkeypatch):
    real = pipelines.network

    def broken(*arguments):
        denoise = real(*arguments)
        return lambda x, sigma: denoise(x, sigma) * (math.nan if sigma < 3 else 1)

    monkeypatch.setattr(pipelines, "network", broken)
    sentence = sentence_of(tiny, "--prompt", "", *SHORT, "--out", tmp_path)
    assert "NaN or infin" in sentence
    assert "channel 1" in sentence


@pytest.mark.parametrize(
    ("text", "words", "target"),
    [
        ("", "", None),
        ("a cat", "a cat", None),
        ("dark=black", "dark", (0, 0, 0)),
        ("1+1=2=#0080ff", "1+1=2", (0, 128, 255)),
        ("1+1=2=", "1+1=2", None),
    ],
)
def test_prompts_on_the_command_line(text, words, target):
    prompt = leak_run.parse_prompt(text)
    assert (prompt.text, prompt.target) == (words, target)


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline as it is seen


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_network_is_the_pipelines_own(pipe, guidance):
    """One step from infinity is the network's answer there: the pipeline's picture and ours are the same."""
    pipe.scheduler = ZTSNRScheduler.from_config(pipe.scheduler.config, latent_size=(16, 16))
    schedule = NoiseSchedule.from_config(pipe.scheduler.config)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    embeddings = pipelines.encode(pipe, "a cat")
    x0 = pipelines.network(pipe, embeddings, schedule, "v_prediction", guidance)(noise, math.inf)
    latents, statistics = pipelines.sampler(pipe, embeddings, 1, guidance)(noise)
    assert torch.allclose(x0, latents, atol=1e-5)
    assert not torch.allclose(x0, torch.zeros_like(x0), atol=0.1)
    assert statistics.sigmas.tolist() == [math.inf]
    texts = pipe("a cat", latents=noise, num_inference_steps=1, guidance_scale=guidance, output_type="latent",
                 height=32, width=32, num_images_per_prompt=2).images  # fmt: skip
    assert torch.allclose(texts, latents, atol=1e-5)


def test_pictures_are_the_pipelines_own(pipe):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(4)) * pipe.vae.config.scaling_factor
    ours = pipelines.vae_to_rgb(pipe)(latents).clamp(0, 1)
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    theirs = pipe.image_processor.postprocess(decoded, output_type="pt")
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_probes_survive_the_file():
    probe = SamplerProbe(
        7, np.ones((2, 4)), np.zeros((2, 4)), None, None, None, None, np.array([math.inf, 2.0]), np.ones((2, 2, 4))
    )
    back = leak_run.as_probe(SamplerProbe, json.loads(json.dumps(plain(probe), allow_nan=False)))
    assert back.seed == 7
    assert back.rgb_mean is None
    assert back.sigmas.tolist() == [math.inf, 2.0]
    assert back.denoised_mean.shape == (2, 2, 4)


def test_rows_of_pictures_survive_the_file(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    file = tmp_path / "row.png"
    file.write_bytes(row_of_pictures(pictures, ["inf", "2", "0.5"]))
    back, labels = load_row(file)
    assert (back == pictures).all()
    assert labels == ["inf", "2", "0.5"]
