"""What runs inside ComfyUI's own interpreter.

python checkpoints_inside.py COMFYUI BASE shapes      U-Nets as ComfyUI builds them, and what it takes their tensors for
python checkpoints_inside.py COMFYUI BASE load        every file in BASE/models, through our loader and the stock ones

Both print JSON on the last line of standard output.
"""

import asyncio
import importlib
import json
import sys
from pathlib import Path

COMFYUI, BASE, TASK = sys.argv[1:]
sys.path.insert(0, COMFYUI)
sys.argv[1:] = ["--cpu", "--base-directory", BASE]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_detection  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402

import nodes  # noqa: E402

PACK = str(Path(__file__).resolve().parents[2])

SD = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "adm_in_channels": None,
}
SDXL = {
    **SD,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "context_dim": 2048,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}
KOALA = {
    **SDXL,
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [0, 2, 5],
    "transformer_depth_output": [0, 0, 2, 2, 5, 5],
    "transformer_depth_middle": -2,
}
UNETS = {
    "SD 1.5": {**SD, "context_dim": 768, "use_linear_in_transformer": False},
    "SD 2.1": {**SD, "context_dim": 1024},
    "SDXL": SDXL,
    "SDXL refiner": {
        **SDXL,
        "model_channels": 384,
        "adm_in_channels": 2560,
        "context_dim": 1280,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
        "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
        "transformer_depth_middle": 4,
    },
    "SSD-1B": {
        **SDXL,
        "transformer_depth": [0, 0, 2, 2, 4, 4],
        "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
        "transformer_depth_middle": -1,
    },
    "Vega": {
        **SDXL,
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "transformer_depth_middle": -1,
    },
    "KOALA-700M": KOALA,
    "KOALA-1B": {
        **KOALA,
        "transformer_depth": [0, 2, 6],
        "transformer_depth_output": [0, 0, 2, 2, 6, 6],
        "transformer_depth_middle": 6,
    },
    "SDXS": {  # the smallest that ComfyUI knows in the diffusers layout
        **SD,
        "context_dim": 768,
        "use_linear_in_transformer": False,
        "num_res_blocks": [1, 1, 1],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 1, 1],
        "transformer_depth_output": [0, 0, 1, 1, 1, 1],
        "transformer_depth_middle": -2,
    },
    "small": {
        **KOALA,
        "channel_mult": [1, 1, 1],
        "transformer_depth_output": [0] * 6,
    },  # the smallest of the SDXL family
}


def shapes() -> dict:
    """{name: {layout: [what ComfyUI takes it for, {tensor: shape}]}}"""
    found = {}
    for name, config in UNETS.items():
        arguments = {key: list(value) if isinstance(value, list) else value for key, value in config.items()}
        unet = UNetModel(**arguments, device="meta", operations=comfy.ops.disable_weight_init).state_dict()
        diffusers = {
            theirs: unet[ours] for theirs, ours in comfy.utils.unet_to_diffusers(config).items() if ours in unet
        }
        model = comfy.model_detection.model_config_from_unet(unet, "")
        found[name] = {"single-file": [type(model).__name__, {key: list(unet[key].shape) for key in unet}]}
        if name != "small":
            model = comfy.model_detection.model_config_from_diffusers_unet(diffusers)
            found[name]["diffusers"] = [type(model).__name__, {key: list(diffusers[key].shape) for key in diffusers}]
    return found


def load() -> dict:
    """{file: what our loader gives, and what the stock one takes it for}"""
    assert asyncio.run(nodes.load_custom_node(PACK)), "the pack does not load"
    checkpoint = importlib.import_module(f"{PACK.replace('.', '_x_')}.nodes.checkpoint")
    found = {}
    for name in [*checkpoint.list_files(), "gone.safetensors"]:
        output = checkpoint.ZTSNRCheckpointLoader.execute(name)
        if output.block_execution:
            found[name] = {"refused": output.block_execution, "outputs": len(output.args)}
            continue
        model, clip, vae, report = output.args
        assert output.ui.as_dict()["text"] == (report,)
        if name.startswith(checkpoint.UNET_PREFIX):
            (stock,) = nodes.UNETLoader().load_unet(name.removeprefix(checkpoint.UNET_PREFIX), "default")
        else:
            stock = nodes.CheckpointLoaderSimple().load_checkpoint(name)[0]
        try:
            picture = list(vae.decode(torch.zeros(1, 4, 2, 2)).shape)
        except RuntimeError as error:
            picture = str(error)
        found[name] = {"report": report, "clip": clip is not None, "vae": picture}
        found[name] |= {"ours": about(model), "stock": about(stock)}
    return found


def about(model) -> list:
    """Prediction type, zero terminal SNR, largest sigma."""
    sampling = model.get_model_object("model_sampling")
    prediction = "v_prediction" if isinstance(sampling, comfy.model_sampling.V_PREDICTION) else "epsilon"
    return [prediction, bool(getattr(sampling, "zsnr", False)), str(round(float(sampling.sigma_max), 2))]


print(json.dumps({"shapes": shapes, "load": load}[TASK]()))
