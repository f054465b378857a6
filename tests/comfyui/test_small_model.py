"""The demo's small model in a real ComfyUI, through the node of small_model_inside.py.

Its weights are random, or those of the zero-SNR network that comes with the package.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from ztsnr.checkpoints import inspect_checkpoint, to_folder, to_single_file
from ztsnr.checkpoints.schedule_shift import shift_of_metadata
from ztsnr.demo.composed import Asked, Composer
from ztsnr.demo.objectives import OURS, shift_of
from ztsnr.demo.shipped import CONFIG, FILES, WEIGHTS
from ztsnr.demo.small_model import SIZES, write_small_model
from ztsnr.samplers import NoiseSchedule, ZTSNRScheduler

from .server import PACK, Server, running_server

pytestmark = pytest.mark.comfyui

LOADER = Path(__file__).with_name("small_model_inside.py")
SIDE, FACTOR = SIZES["cpu"].side, SIZES["cpu"].factor
LATENT = (SIDE // FACTOR, SIDE // FACTOR)
LIMIT = 1e-5  # of the norm; float32 differs by 3e-7, another caption by 1e-2
PROMPT = Asked("red", "snake", long=True).caption


def random_model(place: Path, shift: float = 1.0) -> Path:
    """With the scheduler of a zero-terminal-SNR model that predicts v, whose sigmas may be shifted for its canvas."""
    words = sorted({word for caption in Composer().captions() for word in caption.split()})
    folder = write_small_model(place / "random", words, SIZES["cpu"], seed=1)
    path = folder / "scheduler" / "scheduler_config.json"
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    if shift != 1:
        said["trained_betas"] = NoiseSchedule.sdxl().shifted(shift).betas.tolist()
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    return folder


def shift_in(model: dict[str, str]) -> float:
    """What its file says that every sigma is multiplied by."""
    return shift_of_metadata(inspect_checkpoint(model["file"]).metadata)


def both_layouts(folder: Path, place: Path) -> dict[str, str]:
    """What the loader is given."""
    file = place / "model.safetensors"
    to_single_file(folder, file)
    return {"folder": str(folder), "file": str(file)}


def trained_model(place: Path) -> dict[str, str]:
    """The zero-SNR network that comes with the package; in float32, because transformers would run what it finds."""
    file = WEIGHTS / FILES[OURS]
    to_folder(file, place / "folder", config=CONFIG, dtype=torch.float32)
    return {"folder": str(place / "folder"), "file": str(file)}


@pytest.fixture(scope="module", params=["random", "trained"])
def model(request, tmp_path_factory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("model")
    return trained_model(place) if request.param == "trained" else both_layouts(random_model(place), place)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, str]:
    return trained_model(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def server(comfyui_path, comfyui_python, tmp_path_factory):
    """A server with the pack and the loader in it."""
    packs = {"comfyui-ztsnr": PACK, LOADER.name: LOADER}
    base = tmp_path_factory.mktemp("comfyui")
    with running_server(comfyui_path, comfyui_python, base, packs, checkpoints={}) as running:
        yield running


# ----------------------------------------------------------------------------------------------------------------------
# The nodes, and diffusers


def in_comfyui(inside, path: Path, **arguments) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """What ComfyUI says of the model; noise, latents in the model's scale and pictures (B, H, W, 3)."""
    said = inside("small_model_inside.pictures", path=str(path), **arguments)
    return said, {name: torch.from_numpy(array) for name, array in np.load(path).items()}


def pipeline_of(folder: str, solver: str, spacing: str, latent_size: tuple[int, int]) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.scheduler = ZTSNRScheduler.from_config(
        pipeline.scheduler.config, solver=solver, spacing=spacing, latent_size=latent_size
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope="module")
def shifted(tmp_path_factory) -> dict[str, str]:
    """A random model on the schedule of its canvas, as the trained ones are."""
    place = tmp_path_factory.mktemp("shifted")
    model = both_layouts(random_model(place, shift_of(SIDE // FACTOR)), place)
    assert shift_in(model) == 0.25
    return model


def test_a_shifted_schedule_is_taken_from_the_file(inside, shifted, tmp_path):
    check_ksampler(inside, shifted, LATENT, tmp_path)


@pytest.mark.parametrize("size", [LATENT, (16, 32)], ids=str)
def test_ksampler_takes_the_steps_of_the_diffusers_pipeline(inside, model, size, tmp_path):
    check_ksampler(inside, model, size, tmp_path)


def check_ksampler(inside, model, size, tmp_path):
    said, found = in_comfyui(inside, tmp_path / "out.npz", text=PROMPT, size=size, batch=2, steps=20, **model)
    assert said == {"type": "V_PREDICTION", "start": "8192.0"}

    pipeline = pipeline_of(model["folder"], "euler", "trailing", size)
    options = {"latents": found["noise"], "num_inference_steps": 20, "guidance_scale": 1.0}
    options |= {"height": FACTOR * size[0], "width": FACTOR * size[1]}
    expected = pipeline([PROMPT] * 2, output_type="latent", **options).images
    assert relative(found["latents"], expected) < LIMIT
    pictures = pipeline([PROMPT] * 2, output_type="pt", **options).images
    torch.testing.assert_close(found["pictures"].movedim(-1, 1), pictures, rtol=0, atol=1e-5)

    # A model that looks at neither its caption nor its sizes would be equal too
    other = pipeline([Asked("green").caption] * 2, output_type="latent", **options).images
    assert relative(other, expected) > 100 * LIMIT
    other = pipeline([PROMPT] * 2, output_type="latent", original_size=(192, 192), **options).images
    assert relative(other, expected) > 100 * LIMIT


@pytest.mark.parametrize(("colour", "least", "most"), [("black", 0, 64), ("white", 192, 255)])
def test_the_trained_model_paints_what_it_is_asked_for(inside, trained, colour, least, most, tmp_path):
    caption = Asked(colour).caption
    _, found = in_comfyui(inside, tmp_path / "out.npz", text=caption, size=LATENT, batch=4, steps=20, **trained)
    level = 255 * found["pictures"].mean().item()
    print(f"{caption}: {level:.1f}")
    assert least <= level <= most


# ----------------------------------------------------------------------------------------------------------------------
# The workflows


def graph_of(workflow: str, model: dict[str, str]) -> dict[str, dict]:
    """A workflow of the pack in the API's form, with our loader for its own and a canvas of the model's size."""
    content = json.loads((PACK / "workflows" / f"{workflow}.json").read_text(encoding="utf-8"))
    sources = {link[0]: [str(link[1]), link[2]] for link in content["links"]}
    graph = {}
    for node in content["nodes"]:
        linked = {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry.get("link") is not None}
        inputs = node.get("widgets_values_named", {}) | linked
        if node["type"] != "MarkdownNote":
            graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    replace(graph, "CheckpointLoaderSimple", "SmallModelLoader", model)
    replace(graph, "ZTSNRBucketLatent", "EmptyLatentImage", {"width": SIDE, "height": SIDE, "batch_size": 1})
    for node in graph.values():
        if "canvas_shift" in node["inputs"]:
            node["inputs"]["canvas_shift"] = shift_in(model)
    return graph


def replace(graph: dict[str, dict], class_type: str, other: str, inputs: dict) -> None:
    (node,) = (node for node in graph.values() if node["class_type"] == class_type)
    node |= {"class_type": other, "inputs": inputs}


def saved(server: Server, graph: dict[str, dict]) -> dict[str, np.ndarray]:
    """(H, W, 3) float, 0...255, by what each SaveImage calls it."""
    outputs = server.queue(graph)
    names = {key: node["inputs"]["filename_prefix"] for key, node in graph.items() if node["class_type"] == "SaveImage"}
    return {name: server.image(outputs[key]["images"][0]).astype(float) for key, name in names.items()}


def test_the_loader_loads(server):
    assert set(server.object_info("SmallModelLoader")["output"]) == {"MODEL", "CLIP", "VAE"}
    assert "IMPORT FAILED" not in server.log()
    assert "Traceback" not in server.log()


def test_text_to_image(server, model):
    """What the diffusers pipeline makes with the workflow's own settings, guidance and all."""
    graph = graph_of("text_to_image", model)
    (sampler,) = (node["inputs"] for node in graph.values() if node["class_type"] == "KSampler")
    (picture,) = saved(server, graph).values()

    # what a scheduler in KSampler's list, which knows no canvas, takes it for
    trained_on = (round(128 * shift_in(model)),) * 2
    spacing = sampler["scheduler"].removeprefix("ztsnr_")
    expected = pipeline_of(model["folder"], sampler["sampler_name"], spacing, trained_on)(
        graph[sampler["positive"][0]]["inputs"]["text"],
        negative_prompt=graph[sampler["negative"][0]]["inputs"]["text"],
        latents=torch.randn(1, 4, *LATENT, generator=torch.Generator().manual_seed(sampler["seed"])),
        height=SIDE,
        width=SIDE,
        num_inference_steps=sampler["steps"],
        guidance_scale=sampler["cfg"],
        output_type="np",
    ).images[0]
    assert np.abs(picture - 255 * expected).max() < 1.01  # levels: ComfyUI rounds them down


def test_completely_black(server, model):
    exact, finite, plain = by_name(saved(server, graph_of("completely_black", model)))
    assert exact.shape == (SIDE, SIDE, 3)
    assert 0 < np.abs(exact - finite).mean() < np.abs(exact - plain).mean()


def test_the_trained_model_is_completely_black_from_infinity(server, trained):
    graph = graph_of("completely_black", trained)
    for node in graph.values():
        if node["class_type"] == "CLIPTextEncode" and node["inputs"]["text"]:
            node["inputs"]["text"] = Asked("black").caption  # the words that it knows
    levels = [picture.mean() for picture in by_name(saved(server, graph))]
    print("exact {:.2f}, finite {:.2f}, plain SDXL {:.2f}".format(*levels))
    assert levels[0] < 64


def by_name(pictures: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Of completely_black and guidance they begin with 1, 2 and so on."""
    return [pictures[name] for name in sorted(pictures)]


def test_guidance_keeps_the_brightness_of_the_prompt_alone(server, trained):
    graph = graph_of("guidance", trained)
    for node in graph.values():
        if node["class_type"] == "CLIPTextEncode":
            node["inputs"]["text"] = Asked("light", "frog").caption if "1girl" in node["inputs"]["text"] else ""

    def levels():
        return [picture.mean() for picture in by_name(saved(server, graph))]

    cfg, kept = levels()
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["cfg"] = 1.0
    alone, same = levels()
    print(f"CFG 1 {alone:.2f}, CFG 5 {cfg:.2f}, with ZTSNR Guidance {kept:.2f}")
    assert alone == same
    assert abs(kept - alone) < 0.7 * abs(cfg - alone)
