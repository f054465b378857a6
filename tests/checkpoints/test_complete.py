"""Which tensors a checkpoint lacks: files of full size that are all header, as programs write them."""

import shutil

import diffusers
import pytest
from safetensors.torch import load_file, save_file

from ztsnr.checkpoints import inspect_checkpoint
from ztsnr.checkpoints.complete import find_missing
from ztsnr.checkpoints.published import NETWORKS, published_names

from ..full_size import networks, shapes, unet_shapes
from ..tiny_pipelines import make_tiny_sdxl

UNET, VAE = "model.diffusion_model.", "first_stage_model."
SDXL_CLIP, SDXL_OPEN_CLIP = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
POSITIONS = "embeddings.position_ids"
TO_K = "input_blocks.7.1.transformer_blocks.0.attn2.to_k.weight"
# what DDPM.register_schedule of CompVis' latent-diffusion keeps with the weights
SCHEDULE = dict.fromkeys(
    [
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    ],
    ("F32", 1000),
)


def published(name, without=(), **changes):
    """A published file without the tensors of these names, and with others changed or added."""
    return {key: shape for key, shape in published_names(name).items() if not key.startswith(without)} | changes


def part(name, prefix):
    return {key.removeprefix(prefix): shape for key, shape in published_names(name).items() if key.startswith(prefix)}


def averages(name):
    """The moving averages beside the weights, as CompVis' LitEma names them."""
    averaged = {f"model_ema.diffusion_model{key.replace('.', '')}": shape for key, shape in part(name, UNET).items()}
    return averaged | {"model_ema.decay": (), "model_ema.num_updates": ()}


REAL_FILES = {
    **{name: published(name) for name in NETWORKS},
    # NoobAI-XL v-pred: the marks; position numbers cast with the rest
    "NoobAI": published("SDXL base", v_pred=("F32", 0), ztsnr=("F32", 0), **{SDXL_CLIP + POSITIONS: ("F16", 1, 77)}),
    # kohya's sd-scripts: no position numbers, unless transformers is old
    "kohya": published("SDXL base", SDXL_CLIP + POSITIONS),
    "without a scale of logits": published("SDXL base", SDXL_OPEN_CLIP + "logit_scale"),
    "v1-5-pruned-emaonly": published("SD 1.x") | SCHEDULE | {"model_ema.decay": (), "model_ema.num_updates": ()},
    "v1-5-pruned": published("SD 1.x") | SCHEDULE | averages("SD 1.x"),
    # merges of the NovelAI leak
    "old names of the text encoder": {
        name.replace("transformer.text_model.", "transformer."): shape for name, shape in published("SD 1.x").items()
    },
    "v2-1_768": published("SD 2.x") | SCHEDULE,
    # from diffusers, which drops what is not used
    "SD 2.x out of a folder": published(
        "SD 2.x",
        tuple(f"cond_stage_model.model.{name}" for name in ("transformer.resblocks.23.", "text_proj", "logit_scale")),
    ),
    "inpainting": published("SD 1.x", **{f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3)}),
    "editing": published("SDXL base", **{f"{UNET}input_blocks.0.0.weight": (320, 8, 3, 3)}),
    "U-Net only": {UNET + name: shape for name, shape in part("SDXL base", UNET).items()},
    "U-Net only, bare names": part("SSD-1B", UNET) | {"v_pred": ("F32", 0), "ztsnr": ("F32", 0)},
    "U-Net only, diffusers' names": unet_shapes("KOALA 1B") | {"v_pred": ("F32", 0)},
}


@pytest.fixture
def look(tmp_path, write_checkpoint):
    def look(names):
        return find_missing(inspect_checkpoint(write_checkpoint(tmp_path / "model.safetensors", names)))

    return look


@pytest.mark.parametrize("name", REAL_FILES)
def test_files_that_are_whole(look, name):
    assert look(REAL_FILES[name]) == ([], [])


@pytest.mark.parametrize(
    ("name", "lost", "network", "count"),
    [
        ("SDXL base", UNET + TO_K, "SDXL U-Net", 1680),
        ("SDXL base", VAE + "quant_conv.bias", "VAE", 248),
        ("SDXL base", SDXL_CLIP + "final_layer_norm.weight", "CLIP ViT-L", 197),
        ("SDXL base", SDXL_OPEN_CLIP + "text_projection", "OpenCLIP ViT-bigG", 390),
        ("SD 1.x", UNET + "out.2.bias", "SD 1.x U-Net", 686),
        ("SD 2.x", "cond_stage_model.model.ln_final.bias", "OpenCLIP ViT-H", 294),
        ("SSD-1B", UNET + "middle_block.0.in_layers.2.weight", "SSD-1B U-Net", 944),
        ("Vega", UNET + "output_blocks.8.0.skip_connection.bias", "Vega U-Net", 564),
        ("KOALA 700M", UNET + "output_blocks.5.0.skip_connection.bias", "KOALA 700M U-Net", 584),
        ("KOALA 1B", UNET + "middle_block.1.proj_in.weight", "KOALA 1B U-Net", 790),
    ],
)
def test_a_tensor_is_missing(look, name, lost, network, count):
    short = lost.removeprefix(next(prefix for prefix in NETWORKS[name] if lost.startswith(prefix)))
    expected = f"{network}: 1 of {count} tensors are missing or have another shape: {short!r}."
    assert look(published(name, lost)) == ([expected], [])


def test_many_are_missing(look):
    """As of a file whose writer gave up."""
    (problem,), _ = look(published("SDXL base", UNET + "output_blocks"))
    lost = sum(name.startswith("output_blocks") for name in part("SDXL base", UNET))
    assert f"{lost} of 1680 tensors are missing" in problem
    assert problem.endswith(f" and {lost - 3} more.")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (UNET + TO_K, (1280, 1024)),
        (UNET + TO_K, (2048, 1280)),
        (UNET + "input_blocks.0.0.weight", (320, 4, 1, 1)),
        (VAE + "decoder.mid.attn_1.q.weight", (512, 512)),
        (SDXL_CLIP + POSITIONS, (1, 248)),
    ],
)
def test_other_shapes(look, name, shape):
    (problem,), remarks = look(published("SDXL base", **{name: shape}))
    assert f"(its shape is '{shape}' instead of {published('SDXL base')[name]})" in problem
    assert remarks == []


def test_tensors_that_the_model_has_not(look):
    others = {f"{UNET}adapter.weight": (8, 8), "lost": (3,), "first_stage_model.loss.logvar": ()}
    problems, (remark,) = look(published("SDXL base", **others))
    assert problems == []
    assert remark.startswith("3 tensors do not belong to SDXL base: 'first_stage_model.loss.logvar', 'lost', ")


def test_parts_that_are_missing(look):
    problems, (remark,) = look(published("SDXL base", VAE))
    assert problems == []
    assert remark.startswith("It has no VAE:")
    _, (remark,) = look(published("SDXL base", "conditioner."))
    assert remark.startswith("It has no CLIP ViT-L and no OpenCLIP ViT-bigG:")
    _, (remark,) = look(published("SDXL base", SDXL_CLIP))
    assert remark.startswith("It has no CLIP ViT-L:")


def test_what_cannot_be_told(look):
    refiner = unet_shapes("SDXL refiner")
    for names in ({"a": (2, 2)}, {VAE + "quant_conv.bias": (8,)}, refiner):
        problems, (remark,) = look(names)
        assert problems == []
        assert "No published model" in remark
    assert look({"lora_unet_input_blocks_4_1_proj_in.lora_up.weight": (8, 4)}) == ([], [])


# ----------------------------------------------------------------------------------------------------------------------
# Diffusers' names


def write_folder(folder, write_checkpoint, name, **changes):
    """A folder of full size; changes: network -> the names and shapes it gets besides, or loses (None)."""
    for network, built in networks(name).items():
        stem = "model" if network.startswith("text_encoder") else "diffusion_pytorch_model"
        names = shapes(built) | changes.get(network, {})
        names = {key: shape for key, shape in names.items() if shape is not None}
        write_checkpoint(folder / network / f"{stem}.safetensors", names)
    return folder


def look_at(folder):
    return find_missing(inspect_checkpoint(folder))


@pytest.mark.parametrize("name", ["SDXL base", "SD 1.x", "SD 2.x"])
def test_folders_that_are_whole(tmp_path, write_checkpoint, name):
    assert look_at(write_folder(tmp_path, write_checkpoint, name)) == ([], [])


def test_a_unet_file_that_is_not_whole(look):
    names = unet_shapes("Vega")
    del names["conv_out.bias"]
    assert look(names) == (["the U-Net lacks 'conv_out.bias'."], [])


def test_folders_that_are_not(tmp_path, write_checkpoint):
    to_q = "encoder.mid_block.attentions.0.to_q.weight"
    last = {key: None for key in shapes(networks("SDXL base")["text_encoder"]) if ".layers.11." in key}
    folder = write_folder(
        tmp_path,
        write_checkpoint,
        "SDXL base",
        unet={"conv_out.bias": None, "conv_in.weight": (320, 9, 3, 3)},
        vae={to_q: (256, 512)},
        text_encoder=last,  # the rest fits together
        text_encoder_2={"text_projection.weight": (1280, 768)},
    )
    problems, remarks = look_at(folder)
    assert len(problems) == 4
    assert "unet: the U-Net lacks 'conv_out.bias'." in problems
    assert any("'encoder.mid.attn_1.q.weight' (its shape is '(256, 512, 1, 1)' instead of" in text for text in problems)
    assert any(text.startswith("CLIP ViT-L: 16 of 197 tensors are missing") for text in problems)
    assert any("'text_projection' (its shape is '(768, 1280)' instead of (1280, 1280))" in text for text in problems)
    assert remarks == []


def test_queries_and_keys_that_do_not_fit_together(tmp_path, write_checkpoint):
    layer = next(key for key in shapes(networks("SD 2.x")["text_encoder"]) if key.endswith("3.self_attn.k_proj.weight"))
    for shape in ((1024, 512), ()):
        folder = write_folder(tmp_path, write_checkpoint, "SD 2.x", text_encoder={layer: shape})
        (problem,), _ = look_at(folder)
        assert "do not fit together" in problem


def test_folders_without_a_part(tmp_path, write_checkpoint):
    folder = write_folder(tmp_path, write_checkpoint, "SDXL base")
    shutil.rmtree(folder / "vae")
    problems, (remark,) = look_at(folder)
    assert problems == []
    assert remark.startswith("It has no VAE:")
    file = folder / "text_encoder" / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    (problem,), _ = look_at(folder)
    assert problem.startswith("text_encoder: ")
    for network in ("text_encoder", "text_encoder_2"):
        shutil.rmtree(folder / network)
    assert look_at(folder) == ([], [])  # a U-Net alone


def test_several_files_of_one_network(tmp_path):
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(make_tiny_sdxl(tmp_path / "tiny"))
    pipeline.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    files = sorted((tmp_path / "parts" / "unet").glob("*-of-*.safetensors"))
    assert len(files) > 2
    whole, (remark,) = look_at(tmp_path / "parts")
    assert whole == []
    assert "No published model" in remark  # no published model is so small
    files[1].unlink()
    (problem,), _ = look_at(tmp_path / "parts")
    assert problem.startswith("unet: ")


def test_names_of_an_unknown_model_fit_together(tmp_path):
    folder = make_tiny_sdxl(tmp_path / "tiny")
    assert look_at(folder)[0] == []
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.mid_block.resnets.0.norm1.bias"]
    save_file(tensors, file)
    assert look_at(folder)[0] == ["vae: the VAE lacks 'decoder.mid_block.resnets.0.norm1.bias'."]
