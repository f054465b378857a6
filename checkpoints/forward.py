"""Do the programs that load a checkpoint get the same networks out of it?

A prompt goes through the text encoders, a canvas at the last timestep T through the U-Net, a latent through the VAE: in
diffusers from the single file, in diffusers from the folder, and in ComfyUI from the single file, all in float32 on the
CPU.  Each network gets the same input in every program, so a difference points at the network that was read wrong.
"""

import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save_file

from ..errors import UserError
from ..samplers.noise_schedule import NoiseSchedule
from ..samplers.prediction import alpha_s, to_denoised
from .architecture import SUPPORTED
from .inspect import inspect_checkpoint
from .pipeline import load_pipeline
from .supported import Pipeline

LIMIT = 1e-5  # between two programs in float32; a network that was read wrong differs by about 1
INSIDE_COMFYUI = Path(__file__).resolve().parent.parent / "nodes" / "forward_inside.py"  # a program of its own
PROMPT = "a photograph of a red fox in the snow"
LATENT_SIZE = (16, 24)  # small, and not square
# no two alike, so that none can be taken for another
SIZES = {"height": 1024, "width": 832, "crop_h": 8, "crop_w": 24, "target_height": 960, "target_width": 768}
# by the names of its classes in comfy/supported_models.py
_IN_COMFYUI = {
    "SD 1.x": ("SD15", "SD15_instructpix2pix"),
    "SD 2.x": ("SD20",),
    "SDXL base": ("SDXL", "SDXL_instructpix2pix"),
    "SSD-1B": ("SSD1B",),
    "Vega": ("Segmind_Vega",),
    "KOALA": ("KOALA_700M", "KOALA_1B"),
}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Agreement:
    """How far one output of a program is from diffusers'.

    Attributes:
        program: its name, and what it read.
        what: a network's output, or the table of sigmas.
        difference: norm of the difference over the norm of diffusers'.
    """

    program: str
    what: str
    difference: float

    @property
    def holds(self) -> bool:
        return self.difference <= LIMIT

    def __str__(self) -> str:
        how = f"differs by {self.difference:.1e} of its norm" if self.difference else "is the same"
        return f"{self.program}: {self.what} {how}"


def compare_forwards(
    path: Path, other: Path | None = None, *, config: str | Path | None = None, comfyui: str | Path | None = None
) -> tuple[list[Agreement], list[str]]:
    """Run a checkpoint once in each program and from each layout given, and compare the outputs.

    Needs the memory of the model in float32, for one program at a time.

    Args:
        path: a single file or a diffusers folder.
        other: the same checkpoint in the other layout.
        config: the diffusers folder, or its name on the Hub, that completes a single file; by default the folder of the
            two, or the first model of its kind.
        comfyui: the folder of a ComfyUI; by default the one that ``find_comfyui`` finds.  It is not run on unknown
            architectures, which it cannot load.

    Returns:
        each comparison, and a sentence for each problem.

    Raises:
        UserError: there is nothing to compare with, or no ComfyUI in that folder; see also ``load_pipeline``.
    """
    places = [path] if other is None else [path, other]
    file = next((place for place in places if not place.is_dir()), None)
    folder = next((place for place in places if place.is_dir()), None)
    if other is not None and (file is None or folder is None):
        raise UserError(f"{path} and {other} have the same layout: to run, give a single file and its diffusers folder")
    comfyui = find_comfyui() if comfyui is None else _check_comfyui(Path(comfyui))
    architecture = inspect_checkpoint(path).architecture
    if architecture not in SUPPORTED:
        comfyui = None
    if other is None and (file is None or comfyui is None):
        lacking = "its single file" if file is None else "its diffusers folder, or a ComfyUI that knows it"
        raise UserError(f"there is nothing to compare {path} with: give {lacking}")

    loaded = load_pipeline(path, config=config or folder)
    schedule = NoiseSchedule.from_config(loaded.pipeline.scheduler.config)
    prediction_type = loaded.prediction_type
    inputs, settings = _inputs(loaded.pipeline, schedule)
    expected = _forward(loaded.pipeline, inputs, schedule)
    del loaded
    gc.collect()  # pipelines are circles of references, and two models may be more than the memory holds
    agreements, problems = [], []
    if other is not None:
        found = _forward(load_pipeline(other, config=config or folder).pipeline, inputs, schedule)
        gc.collect()
        agreements += _compare(f"diffusers, {other.name}", found, expected)
    if file is not None and comfyui is not None:
        try:
            about, found = _run_comfyui(comfyui, file, inputs, settings)
        except RuntimeError as error:
            return agreements, [*problems, str(error)]
        program = f"ComfyUI {about['version']}"
        if about["architecture"] not in _IN_COMFYUI[architecture]:
            problems.append(f"{program} loads it as {about['architecture']}, but it is {architecture}.")
        seen = {"V_PREDICTION": "v_prediction", "EPS": "epsilon"}.get(about["model_type"], about["model_type"])
        if seen != prediction_type:
            problems.append(f"{program} loads it as {seen}, but it is {prediction_type}.")
        sigmas = found.pop("sigmas")
        agreements.append(Agreement(program, "sigma table", _table_difference(sigmas, schedule)))
        # at the finite sigma that its table ends with
        expected["denoised"] = to_denoised(
            expected.pop("prediction"), inputs["state"], sigmas[-1].item(), prediction_type
        )
        agreements += _compare(program, found, expected)
    problems += [f"{agreement}; rounding explains at most {LIMIT}." for agreement in agreements if not agreement.holds]
    return agreements, problems


# ----------------------------------------------------------------------------------------------------------------------
# In diffusers


def _inputs(pipeline: Pipeline, schedule: NoiseSchedule) -> tuple[Tensors, dict[str, Any]]:
    """The input of every program: tensors, token numbers and SDXL's sizes."""
    generator = torch.Generator().manual_seed(0)
    latent, noise = torch.randn(2, 1, 4, *LATENT_SIZE, generator=generator)
    alpha, s = alpha_s(schedule.sigma_max)
    text = _encode(pipeline)
    inputs = {"latent": latent, "state": alpha * latent + s * noise, **text}
    tokenizers = [pipeline.tokenizer, *([pipeline.tokenizer_2] if "pooled" in text else [])]
    tokens = [tokenizer(PROMPT, padding="max_length", max_length=77).input_ids for tokenizer in tokenizers]
    return inputs, {"tokens": tokens, "sizes": SIZES}


@torch.inference_mode()
def _encode(pipeline: Pipeline) -> Tensors:
    """Text (1, 77, width) and, of SDXL, pooled text (1, width)."""
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    encoded: tuple[Any, ...] = pipeline.encode_prompt(PROMPT, **options)
    text, _, *pooled = encoded
    return {"text": text, "pooled": pooled[0]} if pooled else {"text": text}


@torch.inference_mode()
def _forward(pipeline: Pipeline, inputs: Tensors, schedule: NoiseSchedule) -> Tensors:
    """Each network's output for the inputs, the text encoders' for the prompt."""
    sizes = torch.tensor([list(SIZES.values())], dtype=torch.float32)
    added = {"text_embeds": inputs["pooled"], "time_ids": sizes} if "pooled" in inputs else None
    prediction = pipeline.unet(inputs["state"], schedule.last_timestep, inputs["text"], added_cond_kwargs=added).sample
    return {**_encode(pipeline), "prediction": prediction, "picture": pipeline.vae.decode(inputs["latent"]).sample}


# ----------------------------------------------------------------------------------------------------------------------
# In ComfyUI


def find_comfyui() -> Path | None:
    """The folder of a ComfyUI: COMFYUI_PATH, or the one whose custom_nodes this package is in, or comfy-cli's."""
    if named := os.environ.get("COMFYUI_PATH"):
        return _check_comfyui(Path(named).expanduser())
    package = Path(__file__).absolute().parent.parent
    around = [package.parent.parent] if package.parent.name == "custom_nodes" else []
    candidates = [*around, Path.home() / "comfy" / "ComfyUI"]
    return next((folder for folder in candidates if (folder / "main.py").is_file()), None)


def _check_comfyui(folder: Path) -> Path:
    if not (folder / "main.py").is_file():
        raise UserError(f"there is no ComfyUI in {folder}: give the folder with its main.py")
    return folder


def _python_of(comfyui: Path) -> str:
    """The interpreter that runs a ComfyUI: COMFYUI_PYTHON, or that of its environment, or else ours."""
    if named := os.environ.get("COMFYUI_PYTHON"):
        return named
    environments = [*(comfyui / name for name in (".venv", "venv")), comfyui.parent / "python_embeded"]
    names = ("bin/python", "Scripts/python.exe", "python.exe")
    found = (folder / name for folder in environments for name in names)
    return str(next((python for python in found if python.is_file()), sys.executable))


def _run_comfyui(
    comfyui: Path, file: Path, inputs: Tensors, settings: dict[str, Any]
) -> tuple[dict[str, str], Tensors]:
    """What ComfyUI takes a file for, and the outputs of its networks.

    Raises:
        RuntimeError: it could not run, with the reason in one sentence.
    """
    with tempfile.TemporaryDirectory() as folder:
        sent, received = Path(folder, "inputs.safetensors"), Path(folder, "outputs.safetensors")
        save_file({name: t.contiguous() for name, t in inputs.items()}, sent, {"settings": json.dumps(settings)})
        command = [_python_of(comfyui), INSIDE_COMFYUI, comfyui.resolve(), file.resolve(), sent, received]
        said = {"stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
        environment = os.environ | {"PYTHONIOENCODING": "utf-8"}  # not the code page that Windows gives to a pipe
        try:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, **said, cwd=folder, env=environment)
        except OSError as error:
            raise RuntimeError(f"ComfyUI does not start with {command[0]}: {error.strerror}.") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it gave no reason"]
            reason = (
                lines[-1] if done.returncode > 0 else f"signal {-done.returncode} ended it, as when memory runs out"
            )
            raise RuntimeError(f"The ComfyUI in {comfyui} could not run {file.name}: {reason}.")
        with safe_open(received, "pt") as opened:
            about = json.loads(opened.metadata()["about"])
        # read and not mapped: Windows removes no file that is mapped
        return about, load(received.read_bytes())


def _table_difference(sigmas: torch.Tensor, schedule: NoiseSchedule) -> float:
    """The largest relative difference from ComfyUI's table of sigmas, where a large number stands for infinity."""
    expected = schedule.sigma(torch.arange(schedule.last_timestep + 1))
    if sigmas.shape != expected.shape:
        return math.inf
    if schedule.zero_terminal_snr:
        if sigmas[-1] < 4000:
            return math.inf
        sigmas, expected = sigmas[:-1], expected[:-1]
    return (sigmas.double() / expected - 1).abs().max().item()


def _compare(program: str, found: Tensors, expected: Tensors) -> list[Agreement]:
    return [Agreement(program, what, _difference(found[what], expected[what])) for what in expected if what in found]


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
