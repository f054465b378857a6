"""Export LoRAs that peft saved in the format of kohya's sd-scripts, which image programs read.

peft keeps two matrices a layer, lora_A and lora_B, and one file of settings; a layer's weight changes by
scale * lora_B @ lora_A, where the scale is lora_alpha / rank.  kohya's format calls them lora_down and lora_up, keeps
an alpha beside each pair, and names layers as sd-scripts names them in training: by the single file for SDXL, by
diffusers for SD 1.x and 2.x, with underscores for dots.  ComfyUI, AUTOMATIC1111 and diffusers read that too.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import atomic_write
from .folder import read_weights
from .header import LONGEST_HEADER, read_header
from .layouts import list_names, unet_modules
from .single_file import check_new_file, inspect_folder, is_sdxl, modelspec
from .stream import DTYPE_NAMES, TensorStream, cast, made, stored, write_tensors

_HALF = re.compile(r"(?:base_model\.model\.)?(?:unet\.)?(.+)\.lora_(A|B)\.weight")
_BASE_MODELS = {"SD 1.x": "sd_v1", "SD 2.x": "sd_v2", "SDXL base": "sdxl_base_v1-0"}  # as sd-scripts calls them


@dataclass(frozen=True)
class _Pair:
    down: TensorStream  # lora_A: (rank, inputs), or (rank, inputs, height, width) for a convolution
    up: TensorStream  # lora_B: (outputs, rank), or (outputs, rank, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def export_lora(adapter: str | Path, out: str | Path, *, model: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a peft LoRA of a U-Net in kohya's format, marked with what the model predicts.

    Args:
        adapter: a folder with adapter_model.safetensors and adapter_config.json.
        out: a .safetensors file that does not exist yet.
        model: the diffusers folder that the LoRA was trained on.
        dtype: float32, float16 or bfloat16; by default each tensor's own.

    Raises:
        UserError: no such adapter, or not a plain LoRA (DoRA, biases, whole layers); the model lacks layers that the
            adapter changes; ``out`` exists or cannot be written.
    """
    adapter, out, model = Path(adapter), Path(out), Path(model)
    check_new_file(out, dtype)
    report = inspect_folder(model)
    unet = read_weights(model / "unet")
    pairs = _read_adapter(adapter)
    _check_layers(adapter, pairs, unet, model)

    names = unet_modules(unet) if is_sdxl(unet) else {layer: layer for layer in pairs}
    if unknown := sorted(pairs.keys() - names.keys()):
        raise UserError(f"{adapter} changes layers that have no name in kohya's format: {list_names(unknown)}")
    tensors = {}
    for layer, pair in pairs.items():
        name = f"lora_unet_{names[layer].replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = pair.down
        tensors[f"{name}.lora_up.weight"] = pair.up
        tensors[f"{name}.alpha"] = made(torch.tensor(pair.alpha), "F32")
    if dtype is not None:
        tensors = {n: t if n.endswith(".alpha") else cast(t, DTYPE_NAMES[dtype]) for n, t in tensors.items()}

    metadata = modelspec(report, out.stem)
    if "modelspec.architecture" in metadata:
        metadata["modelspec.architecture"] += "/lora"
    metadata |= {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _the_only({pair.rank for pair in pairs.values()}),
        "ss_network_alpha": _the_only({pair.alpha for pair in pairs.values()}),
    }
    if report.architecture in _BASE_MODELS:
        metadata["ss_base_model_version"] = _BASE_MODELS[report.architecture]
    if report.prediction_type is not None:
        metadata["ss_v_parameterization"] = str(report.prediction_type == "v_prediction")
        metadata["ss_zero_terminal_snr"] = str(bool(report.zero_terminal_snr))
    with atomic_write(out) as file:
        write_tensors(file, dict(sorted(tensors.items())), dict(sorted(metadata.items())))


def _read_adapter(adapter: Path) -> dict[str, _Pair]:
    """Layer, as diffusers names it -> what the LoRA adds to it."""
    config = _read_config(adapter / "adapter_config.json")
    path = adapter / "adapter_model.safetensors"
    if not path.is_file() and (adapter / "adapter_model.bin").is_file():
        read_header(adapter / "adapter_model.bin")  # which refuses it, and says why
    header = read_header(path)
    halves = {}
    for name in header.tensors:
        if match := _HALF.fullmatch(name):
            layer, half = match.groups()
            halves.setdefault(layer, {})[half] = stored(path, header, name)
    if unknown := sorted(name for name in header.tensors if not _HALF.fullmatch(name)):
        raise UserError(f"{path} has more than a plain LoRA, which kohya's format cannot hold: {list_names(unknown)}")
    if not halves:
        raise UserError(f"{path} has no tensors")
    if lonely := sorted(layer for layer, found in halves.items() if len(found) < 2):
        raise UserError(f"{path} lacks lora_A or lora_B for {list_names(lonely)}")
    return {layer: _Pair(found["A"], found["B"], _alpha(layer, found["A"], config)) for layer, found in halves.items()}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(LONGEST_HEADER).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path} is not a readable config of a peft LoRA")
    alphas = [config.get("lora_alpha"), *_alpha_pattern(config).values()]
    if not all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas):
        raise UserError(f"{path} has no valid lora_alpha")
    try:
        re.compile("|".join(f"(?:{end})" for end in _alpha_pattern(config)))
    except re.error:
        raise UserError(f"{path} has an alpha_pattern that is not a regular expression") from None
    if config.get("use_dora"):
        raise UserError(f"{path} is the config of a DoRA: only plain LoRAs can be exported")
    return config


def _alpha_pattern(config: dict[str, Any]) -> dict[str, float]:
    pattern = config.get("alpha_pattern")
    return pattern if isinstance(pattern, dict) else {}


def _alpha(layer: str, down: TensorStream, config: dict[str, Any]) -> float:
    """Alpha for programs that scale by alpha / rank.  A pattern is for the layers whose names end in it, as in peft."""
    alphas = (alpha for end, alpha in _alpha_pattern(config).items() if re.fullmatch(rf"(?:.*\.)?(?:{end})", layer))
    alpha = next(alphas, config["lora_alpha"])
    rank = down.shape[0] if down.shape else 0
    return float(alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)


def _check_layers(adapter: Path, pairs: dict[str, _Pair], unet: dict[str, TensorStream], model: Path) -> None:
    if unknown := sorted(layer for layer in pairs if f"{layer}.weight" not in unet):
        raise UserError(f"{adapter} does not fit the U-Net of {model}, which lacks {list_names(unknown)}")
    for layer, pair in pairs.items():
        outputs, *inputs = unet[f"{layer}.weight"].shape
        rank, *of_down = pair.down.shape or (0,)
        if not rank or of_down != inputs or pair.up.shape != (outputs, rank, *(1 for _ in inputs[1:])):
            raise UserError(
                f"{adapter} does not fit the U-Net of {model}: {layer} is {(outputs, *inputs)} there, but the matrices "
                f"of the LoRA are {pair.down.shape} and {pair.up.shape}"
            )


def _the_only(values: set[float]) -> str:
    return str(values.pop()) if len(values) == 1 else "Dynamic"
