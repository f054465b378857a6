"""Whole SDXL pipelines of random weights, small enough to be made in a test: text goes in, a 32 x 32 picture comes out.

Text encoders and tokenizers are the real classes, at a width of 16 and 24 and with a letter a token.
"""

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTHS = (16, 24)  # of the two text encoders; single files are read by their difference
POOLED = 16
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
SDXL_EMBEDDINGS = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
}
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tiny_sdxl(folder: Path, *, prediction_type: str = "v_prediction", zero_snr: bool = True) -> Path:
    """Write a diffusers folder (1 MB, in about a second), the same weights every time, and return it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = _networks()
    pipeline = StableDiffusionXLPipeline(
        **networks,
        tokenizer=make_tokenizer(folder / "tokenizer", pad=END),
        tokenizer_2=make_tokenizer(folder / "tokenizer_2", pad="!"),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="leading",  # as SDXL is published
            steps_offset=1,
            prediction_type=prediction_type,
            rescale_betas_zero_snr=zero_snr,
        ),
    )
    pipeline.save_pretrained(folder)
    return folder


def _networks() -> dict[str, torch.nn.Module]:
    unet = UNet2DConditionModel(
        **BLOCKS,
        **SDXL_EMBEDDINGS,
        sample_size=16,
        cross_attention_dim=sum(WIDTHS),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.13025,
        sample_size=32,
    )
    clip = [
        CLIPTextConfig(
            vocab_size=len(_vocabulary()),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=POOLED,
            bos_token_id=_vocabulary()[START],
            eos_token_id=_vocabulary()[END],
            hidden_act=activation,
        )
        for width, activation in zip(WIDTHS, ("quick_gelu", "gelu"), strict=True)
    ]
    return {
        "unet": unet.eval(),
        "vae": vae.eval(),
        "text_encoder": CLIPTextModel(clip[0]).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(clip[1]).eval(),
    }


def _vocabulary() -> dict[str, int]:
    """CLIP's, without its merges: each printable ASCII character, inside a word and at its end."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(character + "</w>" for character in characters), START, END]
    return {token: i for i, token in enumerate(tokens)}


def make_tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """A tokenizer from the two files in which CLIP's are published."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)


# ----------------------------------------------------------------------------------------------------------------------
# As a single file


def write_single_file(pipeline: StableDiffusionXLPipeline, path: Path, marks: tuple[str, ...] = ()) -> Path:
    """Write the pipeline in the single-file layout of Stability AI, with empty tensors as marks, and return the path.

    For U-Nets and VAEs of the same number of layers in every block.
    """
    clip, open_clip = pipeline.text_encoder.state_dict(), pipeline.text_encoder_2.state_dict()
    parts = {
        "model.diffusion_model.": _unet_tensors(pipeline.unet),
        "first_stage_model.": _vae_tensors(pipeline.vae),
        "conditioner.embedders.0.transformer.text_model.": {
            name.removeprefix("text_model."): tensor for name, tensor in clip.items()
        },
        "conditioner.embedders.1.model.": _open_clip_tensors(open_clip),
        "": {mark: torch.zeros(0) for mark in marks},
    }
    save_file({prefix + name: t.contiguous() for prefix, part in parts.items() for name, t in part.items()}, path)
    return path


def _rename(name: str, rules: dict[str, str]) -> str:
    for old, new in rules.items():
        name = re.sub(old, new, name)
    return name


def _unet_tensors(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    layers = unet.config.layers_per_block
    rules = {
        r"^time_embedding\.linear_1": "time_embed.0",
        r"^time_embedding\.linear_2": "time_embed.2",
        r"^add_embedding\.linear_1": "label_emb.0.0",
        r"^add_embedding\.linear_2": "label_emb.0.2",
        r"^conv_in": "input_blocks.0.0",
        r"^conv_norm_out": "out.0",
        r"^conv_out": "out.2",
        r"^mid_block\.resnets\.0": "middle_block.0",
        r"^mid_block\.attentions\.0": "middle_block.1",
        r"^mid_block\.resnets\.1": "middle_block.2",
    }
    inside_resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    tensors = {}
    for name, tensor in unet.state_dict().items():
        is_resnet = ".resnets." in name
        if match := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name):
            side, block, kind, layer, rest = match.groups()
            block, layer = int(block), int(layer)
            if side == "down":
                number = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else layer)
                place = f"input_blocks.{number}." + {"resnets": "0", "attentions": "1", "downsamplers": "0"}[kind]
                rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
            else:
                number = block * (layers + 1) + (layers if kind == "upsamplers" else layer)
                last = 2 if unet.config.up_block_types[block].startswith("CrossAttn") else 1
                place = f"output_blocks.{number}." + {"resnets": "0", "attentions": "1", "upsamplers": str(last)}[kind]
            name = f"{place}.{rest}"
        else:
            name = _rename(name, rules)
        tensors[_rename(name, inside_resnet) if is_resnet else name] = tensor
    return tensors


def _vae_tensors(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    last = len(vae.config.block_out_channels) - 1
    rules = {
        r"down_blocks\.(\d)\.resnets": r"down.\1.block",
        r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
        r"up_blocks\.(\d)\.resnets": lambda match: f"up.{last - int(match[1])}.block",
        r"up_blocks\.(\d)\.upsamplers\.0": lambda match: f"up.{last - int(match[1])}.upsample",
        r"mid_block\.resnets\.0": "mid.block_1",
        r"mid_block\.resnets\.1": "mid.block_2",
        r"mid_block\.attentions\.0": "mid.attn_1",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
        "group_norm": "norm",
        r"attn_1\.to_([qkv])": r"attn_1.\1",
        r"to_out\.0": "proj_out",
    }
    tensors = {_rename(name, rules): tensor for name, tensor in vae.state_dict().items()}
    # its attention is stored as 1 x 1 convolutions
    return {
        name: t[..., None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else t
        for name, t in tensors.items()
    }


def _open_clip_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rules = {
        r"^text_model\.": "",
        r"^embeddings\.token_embedding": "token_embedding",
        r"^embeddings\.position_embedding\.weight": "positional_embedding",
        r"^final_layer_norm": "ln_final",
        r"^encoder\.layers": "transformer.resblocks",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        r"mlp\.fc1": "mlp.c_fc",
        r"mlp\.fc2": "mlp.c_proj",
        r"self_attn\.out_proj": "attn.out_proj",
    }
    tensors, projections = {}, {}
    for name, tensor in state.items():
        name = _rename(name, rules)
        if match := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            layer, which, kind = match.groups()
            projections.setdefault(f"{layer}.attn.in_proj_{kind}", {})[which] = tensor
        elif name == "text_projection.weight":
            tensors["text_projection"] = tensor.T
        else:
            tensors[name] = tensor
    return tensors | {name: torch.cat([parts[which] for which in "qkv"]) for name, parts in projections.items()}
