"""The pack in a ComfyUI server: it loads, describes itself, and its nodes run."""

import math
import re
import warnings

import numpy as np
import pytest
import torch

from ztsnr.samplers import SOLVERS, SPACINGS, NoiseSchedule, ZTSNRWarning, sample, step_schedule

from .server import PACK, SIZE

pytestmark = pytest.mark.comfyui

HELP_PAGES = {page.stem for page in PACK.glob("web/docs/*.md")}


@pytest.fixture(scope="module")
def nodes(server) -> dict[str, dict]:
    """ComfyUI's definitions of the pack's nodes."""
    definitions = server.object_info()
    return {name: node for name, node in definitions.items() if node["python_module"] == "custom_nodes.comfyui-ztsnr"}


def inputs_of(node: dict) -> dict[str, dict]:
    """Names of a node's inputs and their options."""
    return {
        name: (specification[1] if len(specification) > 1 else {})
        for group in ("required", "optional")
        for name, specification in node["input"].get(group, {}).items()
    }


# ----------------------------------------------------------------------------------------------------------------------


def test_the_pack_loads(server, nodes):
    log = server.log()
    assert nodes
    assert "IMPORT FAILED" not in log
    assert "Cannot import" not in log
    assert "Traceback" not in log


def test_start_up_is_quick(about):
    """In seconds of the processor, which a busy machine does not change."""
    assert about["load_seconds"] <= 0.1


def test_every_node_has_a_help_page(nodes):
    assert set(nodes) == HELP_PAGES
    assert {page.parent.name for page in PACK.glob("web/docs/*/zh.md")} == HELP_PAGES


def test_every_node_explains_itself(nodes):
    for name, node in nodes.items():
        assert node["description"], name
        for input_name, options in inputs_of(node).items():
            assert options.get("tooltip"), f"{name}.{input_name}"


def test_every_node_is_translated(server, nodes):
    chinese = server.get("/i18n")["zh"]["nodeDefs"]
    assert set(chinese) == set(nodes)
    for name, node in nodes.items():
        assert re.search(r"[\u4e00-\u9fff]", chinese[name]["display_name"]), name
        assert re.search(r"[\u4e00-\u9fff]", chinese[name]["description"]), name
        assert set(chinese[name]["inputs"]) == set(inputs_of(node)), name
        for input_name, texts in chinese[name]["inputs"].items():
            assert re.search(r"[\u4e00-\u9fff]", texts["tooltip"]), f"{name}.{input_name}"


def test_hidden_inputs_do_nothing_and_shown_ones_something(nodes):
    """The page hides the widgets of inputs whose choices say so (web/ztsnr.js)."""
    rules = {
        (name, input_name): options["used_for"]
        for name, node in nodes.items()
        for input_name, options in inputs_of(node).items()
        if "used_for" in options
    }
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def sampled(solver: str, **options) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return sample(
            lambda x, sigma: 0.3 * x, noise, [math.inf, 5.0, 2.0, 0.5, 0.0], solver, generator=generator, **options
        )

    def steps(spacing: str, **options) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ZTSNRWarning)  # of leading
            return step_schedule(NoiseSchedule.sdxl(), 9, spacing, latent_size=(64, 64), **options)

    def start_matters(spacing: str) -> bool:
        try:
            return not torch.equal(steps(spacing, sigma_start=99.0), steps(spacing))
        except ValueError:  # it takes no sigma_start
            return False

    def different(make, choices, **options) -> list[str]:
        return [choice for choice in choices if not torch.equal(make(choice, **options), make(choice))]

    assert rules == {
        ("ZTSNRSampler", "eta"): {"solver": different(sampled, SOLVERS, eta=0.3)},
        ("ZTSNRSampler", "s_noise"): {"solver": different(sampled, SOLVERS, s_noise=0.3)},
        ("ZTSNRScheduler", "cfg"): {"spacing": different(steps, SPACINGS, guidance=1.0)},
        ("ZTSNRScheduler", "sigma_start"): {"spacing": [spacing for spacing in SPACINGS if start_matters(spacing)]},
        ("ZTSNRBucketLatent", "ratio_width"): {"size": nearest_sizes(nodes)},
        ("ZTSNRBucketLatent", "ratio_height"): {"size": nearest_sizes(nodes)},
    }


def nearest_sizes(nodes) -> list[str]:
    specification = nodes["ZTSNRBucketLatent"]["input"]["required"]["size"]
    sizes = specification[0] if isinstance(specification[0], list) else specification[1]["options"]
    return [size for size in sizes if "nearest" in size]


# ----------------------------------------------------------------------------------------------------------------------


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def text_to_image(**options) -> dict:
    """A graph of stock nodes, in the API's form; its result is the node "picture"."""
    sampling = {"seed": 1, "steps": 4, "cfg": 5.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    conditioning = {"positive": ["positive", 0], "negative": ["negative", 0]}
    return {
        "loader": node("CheckpointLoaderSimple", ckpt_name="small.safetensors"),
        "positive": node("CLIPTextEncode", clip=["loader", 1], text="completely black"),
        "negative": node("CLIPTextEncode", clip=["loader", 1], text="bright"),
        "size": node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1),
        "sampler": node(
            "KSampler", model=["loader", 0], latent_image=["size", 0], **conditioning, **{**sampling, **options}
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["loader", 2]),
        "picture": node("PreviewImage", images=["decode", 0]),
    }


def picture(server, prompt: dict) -> np.ndarray:
    """(H, W, 3) float, 0...255, of the node "picture"."""
    (image,) = server.queue(prompt)["picture"]["images"]
    return server.image(image).astype(float)


def test_the_small_checkpoint_is_a_working_model(server):
    """What the other tests rely on: pictures that are neither empty nor clipped, and that prompt and seed decide."""
    first = picture(server, text_to_image())
    assert first.shape == (SIZE, SIZE, 3)
    assert 60 < first.mean() < 195
    assert first.std() > 30
    assert np.mean((first == 0) | (first == 255)) < 0.2
    assert np.abs(picture(server, text_to_image(seed=2)) - first).mean() > 20
    assert np.abs(picture(server, text_to_image(cfg=1.0)) - first).mean() > 2
    assert re.search(r"model_type V_PREDICTION\s", server.log())


def test_the_small_checkpoint_returns_a_picture_that_is_encoded(server):
    prompt = text_to_image()
    prompt["load"] = node("LoadImage", image="example.png")
    prompt["original"] = node("PreviewImage", images=["load", 0])
    prompt["encode"] = node("VAEEncode", pixels=["load", 0], vae=["loader", 2])
    prompt["decode"] = node("VAEDecode", samples=["encode", 0], vae=["loader", 2])
    outputs = server.queue(prompt)
    original, decoded = (server.image(outputs[name]["images"][0]).astype(float) for name in ("original", "picture"))
    assert original.std() > 30
    assert np.abs(decoded - original)[::8, ::8].max() <= 2
    assert np.array_equal(decoded, decoded[::8, ::8].repeat(8, 0).repeat(8, 1))


def test_a_refused_graph_and_a_failing_node_say_why(server):
    with pytest.raises(RuntimeError, match="Value not in list"):
        server.queue(text_to_image(scheduler="none of these"))
    (server.base / "input" / "broken.png").write_text("no picture")
    broken = {"load": node("LoadImage", image="broken.png"), "picture": node("PreviewImage", images=["load", 0])}
    with pytest.raises(RuntimeError, match=r"node load \(LoadImage\): .*UnidentifiedImageError"):
        server.queue(broken)


# ----------------------------------------------------------------------------------------------------------------------
# Our nodes


def exact(prompt: dict, **options) -> dict:
    """The same graph with ZTSNR Model behind the loader."""
    choices = {"prediction": "auto", "schedule": "auto", "first_step": "exact infinity", "canvas_shift": 1.0, **options}
    prompt["exact"] = node("ZTSNRModelSampling", model=["loader", 0], **choices)
    prompt["sampler"]["inputs"]["model"] = ["exact", 0]
    return prompt


def test_exact_first_step_in_a_stock_graph(server):
    stock = picture(server, text_to_image())
    assert np.array_equal(picture(server, exact(text_to_image(), first_step="as ComfyUI does it")), stock)
    from_infinity = picture(server, exact(text_to_image()))
    # sigma 4518.76 is that close to infinity
    assert 0 < np.abs(from_infinity - stock).mean() < 0.5


def test_the_loader_does_what_stock_loader_and_model_node_do(server):
    prompt = text_to_image()
    prompt["loader"]["class_type"] = "ZTSNRCheckpointLoader"
    assert np.array_equal(picture(server, prompt), picture(server, exact(text_to_image())))


def test_custom_sampling_in_a_training_bucket(server):
    prompt = exact(text_to_image())
    specification = server.object_info("ZTSNRBucketLatent")["input"]["required"]["size"]
    sizes = specification[0] if isinstance(specification[0], list) else specification[1]["options"]
    (size,) = [size for size in sizes if re.search(r"\b256 x 1024\b", size)]
    prompt |= {
        "size": node("ZTSNRBucketLatent", size=size, ratio_width=1, ratio_height=1, batch_size=1),
        "sigmas": node(
            "ZTSNRScheduler", model=["exact", 0], steps=2, spacing="spectral", denoise=1.0, latent=["size", 0]
        ),
        "solver": node("ZTSNRSampler", solver="spectral", eta=1.0, s_noise=1.0),
        "rescaled": node("ZTSNRGuidanceRescale", model=["exact", 0], phi=0.7),
        "sampler": node(
            "SamplerCustom",
            model=["rescaled", 0],
            sampler=["solver", 0],
            sigmas=["sigmas", 0],
            latent_image=["size", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            add_noise=True,
            noise_seed=1,
            cfg=5.0,
        ),
    }
    outputs = server.queue(prompt)
    result, drawing = (server.image(outputs[name]["images"][0]) for name in ("picture", "sigmas"))
    assert result.shape == (1024, 256, 3)
    assert result.std() > 30
    assert drawing.std() > 10


def test_a_refusal_is_a_sentence_and_harms_no_other_branch(server):
    prompt = exact(text_to_image(), prediction="epsilon", schedule="zero terminal SNR")
    stock = text_to_image()
    prompt |= {
        "other sampler": stock["sampler"],
        "other decode": node("VAEDecode", samples=["other sampler", 0], vae=["loader", 2]),
        "other picture": node("PreviewImage", images=["other decode", 0]),
    }
    log_before = len(server.log())
    outputs = server.queue(prompt)
    assert server.image(outputs["other picture"]["images"][0]).std() > 30
    assert "picture" not in outputs
    (sentence,) = outputs["exact"]["text"]
    assert re.fullmatch(r"[A-Z][^\n]+\.", sentence)
    assert sentence in server.log()[log_before:]
    assert "Traceback" not in server.log()[log_before:]
