"""The networks of a model: loading them, choosing what is trained, and calling them."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, Literal, cast

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..checkpoints.latent_scaling import LatentScaling
from ..checkpoints.pipeline import inspect_model, load_pipeline
from ..data.tokens import TokenBatch, encode_prompts, token_chunks
from ..errors import UserError

# Group of blocks, for the stages of a training -> how its parameters' names begin.
BLOCK_GROUPS = {
    "time": ("time_embedding.", "add_embedding."),
    "down": ("conv_in.", "down_blocks."),
    "mid": ("mid_block.",),
    "up": ("up_blocks.", "conv_norm_out.", "conv_out."),
    "attention": (),  # of all blocks
}


@dataclass(frozen=True)
class AdapterSettings:
    """A low-rank adapter that is trained instead of the U-Net's own weights.

    Attributes:
        kind: lora (Hu et al., arXiv 2106.09685), or lokr, of Kronecker products (Yeh et al., arXiv 2309.14859).
        rank: rank of the change of each weight.
        alpha: the change is multiplied by alpha / rank.
        target_modules: endings of the names of the layers that are adapted; by default those of the attention.
    """

    kind: Literal["lora", "lokr"] = "lora"
    rank: int = 16
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass
class Networks:
    """A model's parts; ``pipeline`` holds the same modules.

    Attributes:
        text_encoders, tokenizers: one of each, or SDXL's two.
        latent_scaling: conversion between the VAE's latents and the U-Net's.
    """

    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline
    unet: UNet2DConditionModel
    text_encoders: list[CLIPTextModel | CLIPTextModelWithProjection]
    tokenizers: list[CLIPTokenizer]
    vae: AutoencoderKL
    latent_scaling: LatentScaling

    @property
    def is_sdxl(self) -> bool:
        """True for SDXL, whose U-Net is conditioned on picture sizes."""
        return len(self.text_encoders) == 2

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return self.pipeline.vae_scale_factor


def load_networks(model: str | Path, config: str | Path | None = None) -> Networks:
    """Load a model to be trained, in float32 on the CPU; for the arguments and what is raised see ``load_pipeline``."""
    report = inspect_model(model)
    # what an unmarked base is trained as, the objective decides, so any answer will do here
    guess = "v_prediction" if report.zero_terminal_snr else "epsilon"
    pipe = load_pipeline(report.path, config=config, prediction_type=None if report.prediction_type else guess).pipeline
    check_finite(model, **{name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)})
    both = isinstance(pipe, StableDiffusionXLPipeline)
    return Networks(
        pipeline=pipe,
        unet=pipe.unet,
        text_encoders=[pipe.text_encoder, pipe.text_encoder_2] if both else [pipe.text_encoder],
        tokenizers=[pipe.tokenizer, pipe.tokenizer_2] if both else [pipe.tokenizer],
        vae=pipe.vae,
        latent_scaling=LatentScaling.of_vae_config(pipe.vae.config),
    )


def check_finite(model: str | Path, **networks: torch.nn.Module) -> None:
    """Refuse weights that are not finite: with them every step fails, and nothing else would say why.

    Raises:
        UserError: names the first such tensor, as NETWORK.TENSOR.
    """
    for part, network in networks.items():
        for name, weight in network.named_parameters():
            # the sum, which needs no memory, is finite only if each number is; large numbers may also overflow it
            if not weight.detach().sum().isfinite() and not (finite := weight.isfinite()).all():
                raise UserError(
                    f"{int((~finite).sum())} of the {weight.numel()} numbers of {part}.{name} in {model} are not "
                    "finite: the file is damaged, or was trained until it broke; use another copy of the model"
                )


class Tokenize:
    """``tokenize(caption)``: its chunks of tokens for each text encoder (see ``token_chunks``).

    Args:
        networks: with the tokenizers.
        max_chunks: longer captions are cut.
    """

    def __init__(self, networks: Networks, max_chunks: int = 3):
        self._tokenizers, self._max_chunks = networks.tokenizers, max_chunks

    def __call__(self, caption: str) -> list[torch.Tensor]:
        return [
            # the padding is ComfyUI's: the end token for SD 1.x and SDXL's first encoder, "!" for the OpenCLIP encoders
            token_chunks(caption, tokenizer, cast(int, tokenizer.pad_token_id))[: self._max_chunks]
            for tokenizer in self._tokenizers
        ]


# ----------------------------------------------------------------------------------------------------------------------
# What is trained


class Denoiser(torch.nn.Module):
    """Text encoders and U-Net as one network, so that one wrapper makes them parallel."""

    def __init__(self, networks: Networks):
        super().__init__()
        self.unet = networks.unet
        self.text_encoders = torch.nn.ModuleList(networks.text_encoders)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: TokenBatch, time_ids: torch.Tensor
    ) -> torch.Tensor:
        """The U-Net's output, (B, C, h, w).

        Args:
            noisy: (B, C, h, w) in the U-Net's dtype.
            timesteps: (B,).
            tokens: tokens of B prompts.
            time_ids: (B, 6) float32; only SDXL's U-Net reads them.
        """
        hidden, pooled = encode_prompts(tokens, self.text_encoders)
        return predict(self.unet, noisy, timesteps, hidden, pooled, time_ids)


def predict(
    unet: UNet2DConditionModel,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    hidden: torch.Tensor,
    pooled: torch.Tensor | None,
    time_ids: torch.Tensor,
) -> torch.Tensor:
    """A U-Net's output for hidden states (B, L, width), and for SDXL pooled states (B, width) and sizes (B, 6).

    The sizes stay float32 up to the sinusoids: bfloat16 would round 1215 to 1216.
    """
    added = {"text_embeds": pooled, "time_ids": time_ids} if pooled is not None else None
    return unet(noisy, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False)[0]


def add_adapter(unet: UNet2DConditionModel, settings: AdapterSettings) -> None:
    """Add a low-rank adapter to the U-Net; it changes nothing until it is trained.

    Raises:
        UserError: no layer has one of the names.
    """
    from peft import LoKrConfig, LoraConfig
    from peft.tuners.lokr import LoKrLayer

    targets = list(settings.target_modules)
    if not any(name.endswith(tuple(targets)) for name, _ in unet.named_modules()):
        raise UserError(f"the U-Net has no layer named {' or '.join(targets)}: change model.adapter.target_modules")
    alpha = cast(Any, settings.alpha)  # peft's hints say int, but it only divides it by the rank
    if settings.kind == "lora":
        config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=targets)
    else:
        config = LoKrConfig(r=settings.rank, alpha=alpha, target_modules=targets)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same on all ranks
        unet.add_adapter(config)
    if settings.kind == "lokr":
        for module in unet.modules():
            if isinstance(module, LoKrLayer):
                module.train = MethodType(_without_dropout, module)
                module.train()


def _without_dropout(layer: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    """Replaces ``layer.train(mode)`` of LoKr.  In training mode peft draws a number from torch's global generator in
    each layer even without dropout, and torch.compile breaks its graph there."""
    for child in layer.children():
        child.train(mode)
    layer.training = False
    return layer


def trained_names(denoiser: Denoiser, *, adapter: bool, text_encoders: bool) -> list[str]:
    """Names of the parameters that are trained in any stage.

    The U-Net sees only the penultimate layer of SDXL's first text encoder, so the parameters after it get no gradient.
    """
    unseen = ()
    if len(denoiser.text_encoders) == 2:
        last = cast(CLIPTextModel, denoiser.text_encoders[0]).config.num_hidden_layers - 1
        unseen = (f".encoder.layers.{last}.", ".final_layer_norm.")
    return [
        name
        for name, _ in denoiser.named_parameters()
        if (("lora_" in name or "lokr_" in name) if adapter else name.startswith("unet."))
        or (
            text_encoders
            and name.startswith("text_encoders.")
            and not (name.startswith("text_encoders.0.") and any(part in name for part in unseen))
        )
    ]


def in_groups(names: Collection[str], groups: Sequence[str]) -> set[str]:
    """The names that belong to one of the groups.

    Args:
        names: names of the denoiser's parameters.
        groups: keys of BLOCK_GROUPS, "all", "text", or "up.0" for one block.

    Raises:
        UserError: none of the names belongs to a group.
    """
    found = set()
    for group in groups:
        those = {name for name in names if _belongs(name, group)}
        if not those:
            known = ", ".join(["all", "text", *BLOCK_GROUPS])
            raise UserError(
                f"nothing that is trained belongs to {group!r}: choose from {known}, or a block such as up.0"
            )
        found |= those
    return found


def _belongs(name: str, group: str) -> bool:
    if group == "all":
        return True
    if group == "text":
        return name.startswith("text_encoders.")
    inside = name.removeprefix("unet.")
    if inside == name:
        return False
    if group == "attention":
        return ".attentions." in inside
    if match := re.fullmatch(r"(up|down)\.(\d+)", group):
        return inside.startswith(f"{match[1]}_blocks.{match[2]}.")
    return inside.startswith(BLOCK_GROUPS.get(group, ()) or ("?",))
