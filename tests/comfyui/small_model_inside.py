"""The demo's small model inside ComfyUI: a node that loads it, and a function for the worker of inside.py.

ComfyUI knows SDXL by its sizes, and this model has others.  So the node, which a server takes from its custom_nodes as
it takes any other, reads the sizes from the diffusers folder and the weights of U-Net and VAE from the single file:

- The U-Net is ComfyUI's own, in its own ``comfy.model_base.SDXL``; the marks of the file say what it predicts.
- The VAE is ComfyUI's own.
- The text encoders are those of the folder, run by transformers, for ComfyUI's CLIP has the sizes of its tokens fixed.
"""

import json
from pathlib import Path
from unittest import mock

import comfy.latent_formats
import comfy.ldm.modules.diffusionmodules.model
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep


def operations(groups: int) -> type:
    """ComfyUI's layers, with another number of groups in each GroupNorm than 32."""

    class Operations(comfy.ops.disable_weight_init):
        class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
            def __init__(self, num_groups, num_channels, **options):
                super().__init__(groups, num_channels, **options)

    return Operations


def part(tensors: dict, prefix: str) -> dict:
    return comfy.utils.state_dict_prefix_replace(dict(tensors), {prefix: ""}, filter_keys=True)


def unet_config(config: dict) -> dict:
    """What ComfyUI calls the numbers of a U-Net of diffusers'."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    heads = config["attention_head_dim"]  # so many, in spite of the name
    head_channels = widths[-1] // heads[-1]  # of the middle, and of every level that has attention
    levels = zip(widths, heads, config["down_block_types"], strict=True)
    assert all(width // number == head_channels for width, number, block in levels if "CrossAttn" in block)
    depth = config["transformer_layers_per_block"]
    depths = [depth if "CrossAttn" in block else 0 for block in config["down_block_types"]]
    return {
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [depth for depth in depths for _ in range(layers)],
        "transformer_depth_output": [depth for depth in depths for _ in range(layers + 1)],
        "transformer_depth_middle": depth,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config["use_linear_projection"],
        "context_dim": config["cross_attention_dim"],
        "num_classes": "sequential",
        "adm_in_channels": config["projection_class_embeddings_input_dim"],
        "num_heads": -1,
        "num_head_channels": head_channels,
        "legacy": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
    }


class SmallSDXL(comfy.model_base.SDXL):
    """SDXL whose six sizes have another width of embedding, and are those of the pictures that its own VAE makes.

    ComfyUI takes a latent's pixel for eight of the picture.
    """

    def __init__(self, config, model_type, embedding: int, factor: int):
        super().__init__(config, model_type=model_type)
        self.embedder = Timestep(embedding)
        self.factor = factor

    def encode_adm(self, **options):
        height, width = (side * self.factor for side in options["noise"].shape[-2:])
        return super().encode_adm(**options | {"height": height, "width": width})


class SmallTextEncoders:
    """What the node CLIPTextEncode asks of a CLIP."""

    def __init__(self, folder: Path):
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        self.tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]
        self.first = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
        self.second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").eval()

    def tokenize(self, text: str) -> list[torch.Tensor]:
        options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        return [tokenizer(text, **options).input_ids for tokenizer in self.tokenizers]

    @torch.no_grad()
    def encode_from_tokens_scheduled(self, tokens: list[torch.Tensor]) -> list:
        """As SDXL is conditioned: both penultimate hidden states side by side, and the second's pooled output."""
        first, second = (
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip((self.first, self.second), tokens, strict=True)
        )
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return [[hidden, {"pooled_output": second.text_embeds}]]


def load_model(folder: Path, tensors: dict) -> comfy.model_patcher.ModelPatcher:
    unet, vae = (json.loads((folder / name / "config.json").read_text()) for name in ("unet", "vae"))
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    config = comfy.supported_models.SDXL({})
    config.unet_config = unet_config(unet)
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = operations(unet["norm_num_groups"])
    config.latent_format = comfy.latent_formats.SDXL()
    config.latent_format.scale_factor = vae["scaling_factor"]
    config.latent_format.spacial_downscale_ratio = factor  # by which KSampler makes empty latents of another model fit
    model = SmallSDXL(config, config.model_type(tensors), unet["addition_time_embed_dim"], factor)
    model.diffusion_model.load_state_dict(part(tensors, "model.diffusion_model."), strict=True)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def load_vae(folder: Path, tensors: dict) -> comfy.sd.VAE:
    config = json.loads((folder / "vae" / "config.json").read_text())
    widths = config["block_out_channels"]
    sizes = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    settings = {"params": {"ddconfig": sizes, "embed_dim": config["latent_channels"]}}
    with mock.patch.object(comfy.ldm.modules.diffusionmodules.model, "ops", operations(config["norm_num_groups"])):
        vae = comfy.sd.VAE(part(tensors, "first_stage_model."), config=settings, dtype=torch.float32)
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(widths) - 1)
    return vae


class SmallModelLoader:
    """MODEL, CLIP and VAE, as CheckpointLoaderSimple gives them."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"folder": ("STRING", {}), "file": ("STRING", {})}}

    def load(self, folder: str, file: str):
        tensors = comfy.utils.load_torch_file(file)
        place = Path(folder)
        return load_model(place, tensors), SmallTextEncoders(place), load_vae(place, tensors)


NODE_CLASS_MAPPINGS = {"SmallModelLoader": SmallModelLoader}


# ----------------------------------------------------------------------------------------------------------------------
# For the worker


def pictures(
    path: str, folder: str, file: str, text: str, size: tuple[int, int], batch: int = 1, steps: int = 20, seed: int = 7
) -> dict[str, str]:
    """KSampler behind ZTSNR Model, then VAEDecode: a file with what went in and what came out.

    Args:
        size: (height, width) of the latents.

    Returns:
        for what ComfyUI takes the file, and the noise level that it starts from.
    """
    import comfy.sample
    import numpy as np
    from inside import room, stock

    loaded, clip, vae = SmallModelLoader().load(folder, file)
    shift = room("checkpoints.schedule_shift").shift_of_metadata(room("checkpoints").inspect_checkpoint(file).metadata)
    choices = {"prediction": "auto", "schedule": "auto", "first_step": "exact infinity", "canvas_shift": shift}
    model = stock("ZTSNRModelSampling", model=loaded, **choices)[0]
    (prompt,) = stock("CLIPTextEncode", clip=clip, text=text)
    latent = {"samples": torch.zeros(batch, 4, *size)}
    noise = comfy.sample.prepare_noise(latent["samples"], seed)
    (result,) = stock(
        "KSampler", model=model, seed=seed, steps=steps, cfg=1.0, sampler_name="euler", scheduler="ztsnr_trailing",
        positive=prompt, negative=prompt, latent_image=latent, denoise=1.0,
    )  # fmt: skip
    (decoded,) = stock("VAEDecode", vae=vae, samples=result)
    latents = loaded.model.latent_format.process_in(result["samples"])
    with open(path, "wb") as out:
        np.savez(out, noise=noise, latents=latents, pictures=decoded)
    start = model.get_model_object("model_sampling").sigmas[-1].item()
    return {"type": loaded.model.model_type.name, "start": str(start)}  # JSON has no infinity
