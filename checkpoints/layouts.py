"""The names of a network's weights in diffusers' folders, and in single files as CompVis and Stability AI publish them.

A single file numbers the blocks of a U-Net one after the other, where diffusers counts levels and layers; its second
text encoder is OpenCLIP's, with queries, keys and values in one matrix; and its VAE keeps attention as 1 x 1
convolutions.  Each function below walks through one network, as far as its names show that it reaches, and says for
every tensor of the single file what it is made of.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from ..errors import UserError
from .header import shorten

# What the names of a network begin with in a single file
UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."  # SD 1.x
OPEN_CLIP = "cond_stage_model.model."  # SD 2.x
SDXL_CLIP = "conditioner.embedders.0.transformer.text_model."
SDXL_OPEN_CLIP = "conditioner.embedders.1.model."


@dataclass(frozen=True)
class Recipe:
    """How a tensor of a single file is made of tensors of a folder."""

    sources: tuple[str, ...]  # their names; several are stacked along the first axis
    transposed: bool = False
    convolution: bool = False  # a matrix that the single file keeps as a 1 x 1 convolution


Layout = dict[str, Recipe]  # by name in the single file


# ----------------------------------------------------------------------------------------------------------------------
# U-Net

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_SDXL_SIZES = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
_UNET_SHORTCUT = {"conv_shortcut": "skip_connection"}  # where the number of channels changes
_ATTENTION_ENDS = ("norm", "proj_in", "proj_out")
_QUERIES_KEYS_VALUES = tuple(f"attn{i}.to_{which}" for i in (1, 2) for which in "qkv")
_TRANSFORMER_BLOCK = (
    *_QUERIES_KEYS_VALUES,
    *("attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
)


def unet_layout(names: Collection[str]) -> Layout:
    """The tensors of a U-Net of SD 1.x, 2.x or SDXL, of any number of levels and layers.

    Args:
        names: names of diffusers' tensors.

    Raises:
        UserError: a tensor that a single file has no place for, or a missing tensor.
    """
    modules = unet_modules(names)
    no_bias = tuple(f".{name}" for name in _QUERIES_KEYS_VALUES)
    weights = {f"{new}.weight": Recipe((f"{old}.weight",)) for old, new in modules.items()}
    biases = {f"{new}.bias": Recipe((f"{old}.bias",)) for old, new in modules.items() if not old.endswith(no_bias)}
    return _checked(weights | biases, names, "U-Net")


def unet_modules(names: Iterable[str]) -> dict[str, str]:
    """Each layer of a U-Net, its name in diffusers -> its name in a single file."""
    there = _prefixes(names)
    modules = dict(_UNET_ENDS)
    if "add_embedding" in there:
        modules |= _SDXL_SIZES

    def add_resnet(old: str, new: str) -> None:
        modules.update(_within(old, new, _UNET_RESNET))
        if f"{old}.conv_shortcut" in there:
            modules.update(_within(old, new, _UNET_SHORTCUT))

    def add_attention(old: str, new: str) -> bool:
        if old not in there:
            return False
        modules.update(_within(old, new, _same(_ATTENTION_ENDS)))
        for depth in _numbers(f"{old}.transformer_blocks.{{}}", there):
            block = f"transformer_blocks.{depth}"
            modules.update(_within(f"{old}.{block}", f"{new}.{block}", _same(_TRANSFORMER_BLOCK)))
        return True

    # A single file counts the blocks of the way down in one row: conv_in is 0, each layer with its attention is one,
    # and a downsampler is a block of its own.
    block = 1
    for level in _numbers("down_blocks.{}", there):
        down = f"down_blocks.{level}"
        for layer in _numbers(f"{down}.resnets.{{}}", there):
            add_resnet(f"{down}.resnets.{layer}", f"input_blocks.{block}.0")
            add_attention(f"{down}.attentions.{layer}", f"input_blocks.{block}.1")
            block += 1
        if f"{down}.downsamplers" in there:
            modules[f"{down}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1

    for layer in _numbers("mid_block.resnets.{}", there):  # one, or two with the attention between them
        add_resnet(f"mid_block.resnets.{layer}", f"middle_block.{2 * layer}")
    add_attention("mid_block.attentions.0", "middle_block.1")

    # On the way up an upsampler is not a block of its own, but the last module in the block of its level's last layer:
    # module 1 there, or 2 where that layer has attention.
    block = 0
    for level in _numbers("up_blocks.{}", there):
        up, has_attention = f"up_blocks.{level}", False
        layers = _numbers(f"{up}.resnets.{{}}", there)
        for layer in layers:
            add_resnet(f"{up}.resnets.{layer}", f"output_blocks.{block}.0")
            has_attention = add_attention(f"{up}.attentions.{layer}", f"output_blocks.{block}.1")
            block += 1
        if layers and f"{up}.upsamplers" in there:
            modules[f"{up}.upsamplers.0.conv"] = f"output_blocks.{block - 1}.{1 + has_attention}.conv"
    return modules


# ----------------------------------------------------------------------------------------------------------------------
# VAE

_VAE_ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
_VAE_SHORTCUT = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_VAE_ATTENTION = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # diffusers before 0.12


def vae_layout(names: Collection[str]) -> Layout:
    """The tensors of the VAE of SD 1.x, 2.x or SDXL, of any number of levels and layers; see ``unet_layout``."""
    there = _prefixes(names)
    modules = _same(("quant_conv", "post_quant_conv"))
    convolutions = set()

    def add_resnet(old: str, new: str) -> None:
        modules.update(_within(old, new, _VAE_RESNET))
        if f"{old}.conv_shortcut" in there:
            modules.update(_within(old, new, _VAE_SHORTCUT))

    def add_level(old: str, new: str, sampler: tuple[str, str]) -> None:
        for layer in _numbers(f"{old}.resnets.{{}}", there):
            add_resnet(f"{old}.resnets.{layer}", f"{new}.block.{layer}")
        if f"{old}.{sampler[0]}" in there:
            modules[f"{old}.{sampler[0]}.0.conv"] = f"{new}.{sampler[1]}.conv"

    for side in ("encoder", "decoder"):
        modules |= _within(side, side, _VAE_ENDS)
        for i in range(2):
            add_resnet(f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}")
        old, new = f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"
        attention = _within(old, new, _OLD_VAE_ATTENTION if f"{old}.query" in there else _VAE_ATTENTION)
        convolutions |= attention.keys()
        modules |= attention | _within(old, new, {"group_norm": "norm"})
    for level in _numbers("encoder.down_blocks.{}", there):
        add_level(f"encoder.down_blocks.{level}", f"encoder.down.{level}", ("downsamplers", "downsample"))
    levels = _numbers("decoder.up_blocks.{}", there)
    # diffusers counts the decoder's levels in the order they run, the single file from the picture's side, as in the
    # encoder: what runs first is the highest number.
    for level in levels:
        add_level(f"decoder.up_blocks.{level}", f"decoder.up.{levels[-1] - level}", ("upsamplers", "upsample"))

    weights = {
        f"{new}.weight": Recipe((f"{old}.weight",), convolution=old in convolutions) for old, new in modules.items()
    }
    biases = {f"{new}.bias": Recipe((f"{old}.bias",)) for old, new in modules.items()}
    return _checked(weights | biases, names, "VAE")


# ----------------------------------------------------------------------------------------------------------------------
# Text encoders

POSITION_IDS = "embeddings.position_ids"
_CLIP_LAYER = (
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
)
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def clip_layout(names: Collection[str]) -> Layout:
    """The tensors of OpenAI's CLIP text encoder, without the position numbers; see ``unet_layout``."""
    root = _clip_root(names)
    modules = [
        "final_layer_norm",
        *(f"encoder.layers.{i}.{part}" for i in _clip_layers(names) for part in _CLIP_LAYER),
    ]
    made = [
        *("embeddings.token_embedding.weight", "embeddings.position_embedding.weight"),
        *(f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")),
    ]
    layout = {name: Recipe((root + name,)) for name in made}
    # the numbers 0 to 76: old files have them, and they can be made again
    return _checked(layout, set(names) - {root + POSITION_IDS}, "text encoder")


def open_clip_layout(names: Collection[str]) -> Layout:
    """The tensors of OpenCLIP's text encoder, without the scale of its logits; see ``unet_layout``."""
    root = _clip_root(names)
    layout = {
        "token_embedding.weight": Recipe((f"{root}embeddings.token_embedding.weight",)),
        "positional_embedding": Recipe((f"{root}embeddings.position_embedding.weight",)),
    }
    modules = {"final_layer_norm": "ln_final"}
    for i in _clip_layers(names):
        old, new = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        modules |= _within(old, new, _OPEN_CLIP_LAYER)
        # OpenCLIP uses torch's MultiheadAttention, whose in_proj holds queries, keys and values, one below the other.
        for leaf in ("weight", "bias"):
            sources = tuple(f"{root}{old}.self_attn.{which}_proj.{leaf}" for which in "qkv")
            layout[f"{new}.attn.in_proj_{leaf}"] = Recipe(sources)
    for old, new in modules.items():
        layout |= {f"{new}.{leaf}": Recipe((f"{root}{old}.{leaf}",)) for leaf in ("weight", "bias")}
    if "text_projection.weight" in names:  # SD 2.x has none
        layout["text_projection"] = Recipe(("text_projection.weight",), transposed=True)
    return _checked(layout, set(names) - {root + POSITION_IDS}, "text encoder")


def _clip_root(names: Collection[str]) -> str:
    """transformers 5.6 dropped it from CLIPTextModel, and not from CLIPTextModelWithProjection."""
    return "text_model." if any(name.startswith("text_model.") for name in names) else ""


def _clip_layers(names: Collection[str]) -> range:
    return _numbers(f"{_clip_root(names)}encoder.layers.{{}}", _prefixes(names))


# ----------------------------------------------------------------------------------------------------------------------


def _prefixes(names: Iterable[str]) -> set[str]:
    """Everything that has a name: the tensors, the layers they belong to, the blocks of those."""
    return {name[:end] for name in names for end in (*(i for i, c in enumerate(name) if c == "."), len(name))}


def _numbers(template: str, there: set[str]) -> range:
    """The numbers of the blocks that the network has, from 0 on."""
    return range(next(i for i in count() if template.format(i) not in there))


def _within(old: str, new: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{old}.{part}": f"{new}.{renamed}" for part, renamed in parts.items()}


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def _checked(layout: Layout, names: Collection[str], network: str) -> Layout:
    """The layout, if it uses every tensor and has every tensor that it uses."""
    # A layout follows from the names alone, so both directions are checked: a missing tensor would fail later, in the
    # middle of writing, and one without a place would be lost without a word.
    used = {source for recipe in layout.values() for source in recipe.sources}
    if missing := sorted(used - set(names)):
        raise UserError(f"the {network} lacks {list_names(missing)}")
    if unknown := sorted(set(names) - used):
        raise UserError(f"the {network} has tensors that a single file has no place for: {list_names(unknown)}")
    return layout


def list_names(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shorten(name, 100) for name in names[:3]) + more
