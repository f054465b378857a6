"""What runs inside ComfyUI's own interpreter.

python checkpoints_inside.py COMFYUI BASE shapes      U-Nets as ComfyUI builds them, and what it takes their tensors for
python checkpoints_inside.py COMFYUI BASE load        every file in BASE/models, through our loader and the stock ones
python checkpoints_inside.py COMFYUI BASE latents     what becomes of latents in a model whose file scales them

All print JSON on the last line of standard output.
"""

import asyncio
import importlib
import inspect
import json
import math
import sys
from pathlib import Path

COMFYUI, BASE, TASK = sys.argv[1:]
sys.path.insert(0, COMFYUI)
sys.argv[1:] = ["--cpu", "--base-directory", BASE]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_detection  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.utils  # noqa: E402
import latent_preview  # noqa: E402
import torch  # noqa: E402
from comfy.cli_args import LatentPreviewMethod  # noqa: E402
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


# ----------------------------------------------------------------------------------------------------------------------
# Scaled latents

MEAN = torch.tensor([4.8119, 0.1607, 1.3538, -1.7753], dtype=torch.float64)[:, None, None]
STD = torch.tensor([9.9181, 6.2753, 7.5978, 5.9956], dtype=torch.float64)[:, None, None]
STOCK = 0.13025


def latents() -> dict:
    """{what is compared: largest difference, or yes and no}, of two files that differ in their metadata alone."""
    assert asyncio.run(nodes.load_custom_node(PACK)), "the pack does not load"
    room = f"{PACK.replace('.', '_x_')}.nodes"
    loader = importlib.import_module(f"{room}.checkpoint").ZTSNRCheckpointLoader
    metadata = {"ztsnr.latent_mean": json.dumps(MEAN.flatten().tolist())}
    metadata["ztsnr.latent_std"] = json.dumps(STD.flatten().tolist())
    folder = Path(BASE, "models", "checkpoints")
    folder.mkdir(parents=True)
    write_random(folder / "scaled.safetensors", metadata)
    write_random(folder / "plain.safetensors", {})
    scaled, _, _, report = loader.execute("scaled.safetensors").args
    plain = loader.execute("plain.safetensors").args[0]
    generator = torch.Generator().manual_seed(1)
    z = (torch.randn(2, 4, 8, 8, generator=generator).double() * STD + MEAN).float()
    x = (z.double() - MEAN) / STD
    found = {"report": report}

    def difference(found, expected) -> float:
        return float((found.double() - expected.double()).abs().max())

    # before the model is loaded for the first time, as Add Noise asks it and the preview of the first run
    found["in, not loaded"] = difference(scaled.get_model_object("process_latent_in")(z), x)
    found["previews"] = [
        difference(preview(scaled.model.latent_format, x), preview(plain.model.latent_format, STOCK * z))
    ]

    empty = torch.zeros_like(z)
    raw = STOCK * sample(plain, empty).double()
    found["empty latent"] = difference(sample(scaled, empty), raw * STD + MEAN)
    found["stock scale"] = difference(sample(plain, empty), raw * STD + MEAN)
    raw = STOCK * sample(plain, (x / STOCK).float(), denoise=0.5).double()
    found["from a picture"] = difference(sample(scaled, z, denoise=0.5), raw * STD + MEAN)
    painted = sample(scaled, z, mask=(torch.arange(8) < 4).float().expand(1, 8, 8))
    found["kept by inpainting"] = difference(painted[..., 4:], z[..., 4:])
    found["painted"] = difference(painted[..., :4], z[..., :4])
    found["previews"] += [
        difference(preview(scaled.model.latent_format, x), preview(plain.model.latent_format, STOCK * z))
    ]

    later, _ = importlib.import_module(f"{room}.model_patch").patch_model(scaled, first_step="as ComfyUI does it")
    found["behind ZTSNR Model"] = difference(later.get_model_object("latent_format").process_out(x.float()), z)
    if "force_deepcopy" in inspect.signature(scaled.clone).parameters:  # newer cores reload a model from its file
        again = scaled.clone(force_deepcopy=True)
        assert again.model is not scaled.model
        comfy.model_management.load_models_gpu([again])
        found["reloaded"] = difference(again.model.process_latent_out(x.float()), z)

    stock = nodes.CheckpointLoaderSimple().load_checkpoint("scaled.safetensors")[0]
    for name, model in (("plain", plain), ("stock loader", stock)):
        found[name] = difference(model.model.process_latent_out(x.float()), x / STOCK)
        assert "latent_format" not in model.object_patches
    merging = importlib.import_module("comfy_extras.nodes_model_merging")
    merging.save_checkpoint(scaled, filename_prefix="saved", output_dir=BASE)
    (saved,) = Path(BASE).glob("saved*.safetensors")
    found["kept by Save Checkpoint"] = any(
        name in comfy.utils.safetensors_header(str(saved)).decode() for name in metadata
    )
    return found


def write_random(path: Path, metadata: dict[str, str]) -> None:
    """The smallest U-Net of the SDXL family, the same every time, marked as v-prediction with zero terminal SNR."""
    arguments = {key: list(value) if isinstance(value, list) else value for key, value in UNETS["small"].items()}
    unet = UNetModel(**arguments, device="meta", operations=comfy.ops.disable_weight_init).state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    for name, tensor in unet.items():
        values = torch.randn(tensor.shape, generator=generator)
        values /= math.sqrt(math.prod(tensor.shape[1:])) if tensor.ndim > 1 else 10  # keeps a map's input its size
        tensors[f"model.diffusion_model.{name}"] = values.half()
    comfy.utils.save_torch_file(tensors, str(path), metadata=metadata)


def sample(model, latent: torch.Tensor, denoise: float = 1.0, mask: torch.Tensor | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    text = [
        [torch.randn(1, 77, 2048, generator=generator), {"pooled_output": torch.randn(1, 1280, generator=generator)}]
    ]
    noise = comfy.sample.prepare_noise(latent, 3)
    return comfy.sample.sample(
        model,
        noise,
        4,
        1.0,
        "euler",
        "simple",
        text,
        text,
        latent,
        denoise=denoise,
        noise_mask=mask,
        disable_pbar=True,
        seed=3,
    )


def preview(latent_format, x: torch.Tensor) -> torch.Tensor:
    """What the browser is shown of the first latent of a batch, in 1/255."""
    latent_preview.args.preview_method = LatentPreviewMethod.Latent2RGB
    picture = latent_preview.get_previewer("cpu", latent_format).decode_latent_to_preview(x.float())
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)


print(json.dumps({"shapes": shapes, "load": load, "latents": latents}[TASK]()))
