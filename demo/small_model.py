"""A small text-to-image model of diffusers' SDXL classes, with random weights, for the reproduction to train.

It has SDXL's parts and is loaded, trained, exported and sampled as SDXL is; only its sizes are small.

**Tokenizers.**  CLIP's, with a token for each word of the captions, and one for each other character.

**VAE.**  An AutoencoderKL that is not trained: its weights are set by hand so that it is a linear map.  A latent is the
mean colour of ``factor`` x ``factor`` pixels.  The channels r, g, b become four, the first of which is brightness and
the others colour,

    z = A (r, g, b),    A = 1/2 (1 1 1; 1 -1 -1; -1 1 -1; -1 -1 1),    A^T A = 1,

and the decoder returns A^T z.  So no effect in the pictures comes from an autoencoder, none has to be trained first,
and the mean of a latent channel is the mean of the picture.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..errors import UserError
from ..files import atomic_folder

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
COLOUR_TO_LATENT = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 2
LARGE = 256.0  # makes colours small to GroupNorm; a power of two, so that sums of it are exact
NOTHING = 1e-5  # not 0 in float16
SCALING_FACTOR = 1.5  # gives the latents of the pictures a standard deviation near 1


@dataclass(frozen=True)
class SmallModelSize:
    """The sizes of the parts.

    Attributes:
        side: Side of the pictures, in pixels.
        factor: Pixels per latent along a side, a power of two.
        widths: Channels of the U-Net's levels, each of which halves the resolution.
        attention: Which levels have attention.
        layers: ResNet blocks per level.
        text_widths: Widths of the two text encoders.
        norm_groups: Groups of the U-Net's GroupNorm.
        head_dim: Channels per attention head.
    """

    side: int
    factor: int
    widths: tuple[int, ...]
    attention: tuple[bool, ...]
    layers: int
    text_widths: tuple[int, int]
    norm_groups: int = 8
    head_dim: int = 16


SIZES = {
    "cpu": SmallModelSize(
        side=32,
        factor=1,
        widths=(16, 32, 80, 128),
        attention=(False, False, False, False),
        layers=1,
        text_widths=(24, 56),
        head_dim=32,
    ),
    "gpu": SmallModelSize(
        side=64,
        factor=1,
        widths=(48, 96, 192, 256),
        attention=(False, False, True, True),
        layers=2,
        text_widths=(64, 128),
        head_dim=32,
    ),
}


def write_small_model(folder: Path, words: Iterable[str], size: SmallModelSize, seed: int = 0) -> Path:
    """Write the model as a diffusers folder.  Equal arguments give equal weights.

    Args:
        folder: Folder to write.
        words: Words with a token of their own.  Other words are spelled.
        size: One of ``SIZES``, or another.
        seed: Seed of the weights.

    Raises:
        UserError: The folder exists already, or cannot be written.
    """
    vocabulary, merges = word_vocabulary(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, text_encoders = _unet(size), _text_encoders(size, vocabulary)
        vae = linear_vae(size.factor, size.side)
    with atomic_folder(folder) as place:
        tokenizers = [
            _write_tokenizer(place / name, vocabulary, merges, pad)
            for name, pad in (("tokenizer", END), ("tokenizer_2", PAD))
        ]
        StableDiffusionXLPipeline(
            vae=vae,
            unet=unet,
            text_encoder=text_encoders[0],
            text_encoder_2=text_encoders[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            scheduler=EulerDiscreteScheduler(
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                timestep_spacing="leading",  # as SDXL is published
                steps_offset=1,
            ),
            add_watermarker=False,
        ).save_pretrained(place)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# The networks that are trained


def _unet(size: SmallModelSize) -> UNet2DConditionModel:
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in size.attention]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(size.attention)]
    sizes, pooled = 32, size.text_widths[1]
    return UNet2DConditionModel(
        sample_size=size.side // size.factor,
        block_out_channels=size.widths,
        layers_per_block=size.layers,
        norm_num_groups=size.norm_groups,
        attention_head_dim=[max(1, width // size.head_dim) for width in size.widths],  # heads, in spite of its name
        cross_attention_dim=sum(size.text_widths),
        down_block_types=down,
        up_block_types=up,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=sizes,
        projection_class_embeddings_input_dim=6 * sizes + pooled,
    )


def _text_encoders(
    size: SmallModelSize, vocabulary: dict[str, int]
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    configs = [
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,  # of which SDXL's cross-attention sees the first, and its pooled output both
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=size.text_widths[1],
            bos_token_id=vocabulary[START],
            eos_token_id=vocabulary[END],
            pad_token_id=vocabulary[END],
            hidden_act=activation,
        )
        for width, activation in zip(size.text_widths, ("quick_gelu", "gelu"), strict=True)
    ]
    return CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])


# ----------------------------------------------------------------------------------------------------------------------
# Words


def word_vocabulary(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-pair vocabulary and merges in which each word is one token, merged from its front.

    All printable ASCII characters have tokens too, so that any other text can be spelled.  The merges are ordered so
    that no word's merges break up another word; where no such order exists, some words are spelled.
    """
    characters = [chr(code) for code in range(33, 127)]
    tokens = dict.fromkeys([PAD, *characters, *(character + "</w>" for character in characters)])
    spelled = {word: _from_front(word.lower()) for word in words}
    while True:
        try:
            merges = list(TopologicalSorter(_earlier_merges(spelled.values())).static_order())
            break
        except CycleError as error:
            del spelled[next(word for word, pairs in spelled.items() if error.args[1][0] in pairs)]
    tokens |= dict.fromkeys(front + part for front, part in merges)
    return {token: number for number, token in enumerate([*tokens, START, END])}, merges


def _from_front(word: str) -> list[tuple[str, str]]:
    """The merges that make a word: (g, r), (gr, e), (gre, e), (gree, n</w>) for green."""
    return [(word[:end], word[end] + ("</w>" if end == len(word) - 1 else "")) for end in range(1, len(word))]


def _earlier_merges(words: Iterable[list[tuple[str, str]]]) -> dict[tuple[str, str], set[tuple[str, str]]]:
    """The merges that must precede each merge: those of a word before any that would join its remaining parts."""
    words = list(words)
    earlier: dict[tuple[str, str], set[tuple[str, str]]] = {pair: set() for pairs in words for pair in pairs}
    for pairs in words:
        for number, pair in enumerate(pairs):
            rest = [part for _, part in pairs[number:]]
            for other in pairwise(rest):
                if other in earlier:
                    earlier[other].add(pair)
    return earlier


def _write_tokenizer(
    folder: Path, vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], pad: str
) -> CLIPTokenizer:
    """Write and load the two files in which CLIP's tokenizers are published."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)


# ----------------------------------------------------------------------------------------------------------------------
# The VAE


@torch.no_grad()
def linear_vae(factor: int, side: int) -> AutoencoderKL:
    """An AutoencoderKL that encodes mean colours and decodes them, exact to about 1e-5.

    Its eight channels are the three colours, their negatives, and plus and minus ``LARGE``.  GroupNorm divides by the
    standard deviation of all of them, which the large ones set to half of LARGE; and silu(a) - silu(-a) = a.  The
    ResNet blocks and the attention are scaled by ``NOTHING`` instead of 0, because a file with weights of 0 would be
    taken for a truncated one.

    Args:
        factor: Pixels per latent along a side, a power of two.
        side: Side of the pictures, for the VAE's config.

    Raises:
        UserError: The factor is not a power of two.
    """
    levels = factor.bit_length()
    if factor < 1 or factor != 1 << (levels - 1):
        raise UserError(f"factor must be a power of two, not {factor}")
    vae = AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        scaling_factor=SCALING_FACTOR,
        sample_size=side,
    )
    for name, parameter in vae.named_parameters():
        if ".conv2." in name or ".to_out." in name:
            parameter.mul_(NOTHING)
        elif not (".resnets." in name or ".attentions." in name or "norm" in name):
            parameter.zero_()
    signs = torch.cat([torch.eye(3), -torch.eye(3), torch.zeros(2, 3)])  # (8, 3), of the colours
    constant = torch.tensor([0.0] * 6 + [LARGE, -LARGE])
    encoder, decoder = vae.encoder, vae.decoder

    _centre(encoder.conv_in, signs)
    encoder.conv_in.bias.copy_(constant)
    for block in encoder.down_blocks[:-1]:
        block.downsamplers[0].conv.weight[:, :, :2, :2] = torch.eye(8)[..., None, None] / 4
    _centre(encoder.conv_out, torch.cat([COLOUR_TO_LATENT @ signs.T, torch.zeros(4, 8)]))
    encoder.conv_out.bias[4:] = -30.0  # log variance: no noise
    _centre(vae.quant_conv, torch.eye(8))

    _centre(vae.post_quant_conv, torch.eye(4))
    _centre(decoder.conv_in, signs @ COLOUR_TO_LATENT.T)
    decoder.conv_in.bias.copy_(constant)
    for block in decoder.up_blocks[:-1]:
        _centre(block.upsamplers[0].conv, torch.eye(8))
    _centre(decoder.conv_out, signs.T)
    for half in (encoder, decoder):
        half.conv_norm_out.weight.fill_(LARGE / 2)
    return vae.eval()


def _centre(convolution: torch.nn.Conv2d, weight: torch.Tensor) -> None:
    """Set a convolution's weight so that it acts on each pixel alone."""
    convolution.weight[:, :, convolution.kernel_size[0] // 2, convolution.kernel_size[1] // 2] = weight
