"""What a checkpoint is taken for, by the names and shapes in its header alone."""

import dataclasses
import json

import diffusers
import pytest
import safetensors.torch
import torch

from ztsnr.checkpoints import SUPPORTED, inspect_checkpoint
from ztsnr.samplers import ZTSNRScheduler

from ..full_size import UNETS, unet_shapes


@pytest.fixture(scope="module")
def sdxl_unet():
    return unet_shapes("SDXL base")


def ldm_unet(channels=320, text=2048, sizes=2816, depths=((0, 0), (2, 2), (10, 10)), prefix="model.diffusion_model."):
    """The names of a single-file U-Net by which it is told apart: block 0, then blocks and downsamplers."""
    shapes = {"input_blocks.0.0.weight": (channels, 4, 3, 3), "out.2.weight": (4, channels, 3, 3)}
    if sizes:
        shapes["label_emb.0.0.weight"] = (1280, sizes)
    block = 1
    for level in depths:
        for depth in level:
            shapes[f"input_blocks.{block}.0.in_layers.0.weight"] = (channels,)
            for i in range(depth):
                shapes[f"input_blocks.{block}.1.transformer_blocks.{i}.attn2.to_k.weight"] = (channels, text)
            block += 1
        shapes[f"input_blocks.{block}.0.op.weight"] = (channels, channels, 3, 3)
        block += 1
    return {prefix + name: shape for name, shape in shapes.items()}


CLIP = {"conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,)}
VAE = {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}
MARKS = {"v_pred": ("F32", 0), "ztsnr": ("F32", 0)}

# ----------------------------------------------------------------------------------------------------------------------
# Architecture


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_unets(tmp_path, write_checkpoint, name):
    report = inspect_checkpoint(write_checkpoint(tmp_path / "unet.safetensors", unet_shapes(name)))
    assert report.format == "diffusers U-Net file"
    assert report.architecture == ("KOALA" if name.startswith("KOALA") else name)
    assert report.supported == (name != "SDXL refiner")


@pytest.mark.parametrize(
    ("name", "unet"),
    {
        "SD 1.x": {"text": 768, "sizes": None, "depths": ((1, 1), (1, 1), (1, 1), (0, 0))},
        "SD 2.x": {"text": 1024, "sizes": None, "depths": ((1, 1), (1, 1), (1, 1), (0, 0))},
        "SD 2.x unCLIP": {"text": 1024, "sizes": 2048, "depths": ((1, 1), (1, 1), (1, 1), (0, 0))},
        "SDXL base": {},
        "SSD-1B": {"depths": ((0, 0), (2, 2), (4, 4))},
        "Vega": {"depths": ((0, 0), (1, 1), (2, 2))},
        "KOALA": {"depths": ((0,), (2,), (5,))},
        "SDXL refiner": {
            "channels": 384,
            "text": 1280,
            "sizes": 2560,
            "depths": ((0, 0), (4, 4), (4, 4), (0, 0)),
        },
        "unknown": {"depths": ((0, 0), (3, 3), (7, 7))},
    }.items(),
)
def test_single_file_unets(tmp_path, write_checkpoint, name, unet):
    for prefix in ("model.diffusion_model.", ""):
        report = inspect_checkpoint(write_checkpoint(tmp_path / "a.safetensors", ldm_unet(**unet, prefix=prefix)))
        assert report.format.startswith("U-Net only")
        assert report.architecture == name
        assert report.supported == (name in SUPPORTED)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("SDXL with EDM noise levels", {"edm_mean": (4,), "edm_std": (4,)}),
        ("SDXL with EDM noise levels", {"edm_vpred.sigma_max": ()}),
        ("Stable Video Diffusion", {"model.diffusion_model.input_blocks.4.1.time_stack.0.attn1.to_q.weight": (8, 8)}),
    ],
)
def test_relatives_are_named_as_unsupported(tmp_path, write_checkpoint, name, extra):
    report = inspect_checkpoint(write_checkpoint(tmp_path / "a.safetensors", {**ldm_unet(), **extra}))
    assert report.architecture == name
    assert not report.supported
    assert report.warnings == ()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("Stable Diffusion 3", "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"),
        ("Flux", "double_blocks.0.img_attn.norm.key_norm.scale"),
        ("Qwen-Image", "txt_norm.weight"),
    ],
)
def test_flow_models_are_named_as_unsupported(tmp_path, write_checkpoint, name, tensor):
    report = inspect_checkpoint(write_checkpoint(tmp_path / "a.safetensors", {tensor: (8,)}))
    assert report.architecture == name
    assert not report.supported


@pytest.mark.parametrize("shape", [(), (320,), (0, 0, 0, 0), (2**40, 0)])
def test_absurd_shapes_are_unknown(tmp_path, write_checkpoint, shape):
    for shapes in (ldm_unet(), {"conv_in.weight": (), "conv_out.weight": (), "time_embedding.linear_1.weight": ()}):
        report = inspect_checkpoint(write_checkpoint(tmp_path / "a.safetensors", dict.fromkeys(shapes, shape)))
        assert report.architecture == "unknown"


# ----------------------------------------------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize(
    ("parts", "form", "has_text_encoders", "has_vae"),
    [
        ((CLIP, VAE), "single file", True, True),
        ((VAE,), "single file", False, True),
        ((CLIP,), "single file", True, False),
        ((), "U-Net only, single-file names", False, False),
    ],
)
def test_single_files(tmp_path, write_checkpoint, parts, form, has_text_encoders, has_vae):
    shapes = {name: shape for part in (ldm_unet(), *parts, MARKS) for name, shape in part.items()}
    report = inspect_checkpoint(write_checkpoint(tmp_path / "noob.safetensors", shapes, {"modelspec.title": "Noob"}))
    assert (report.format, report.has_text_encoders, report.has_vae) == (form, has_text_encoders, has_vae)
    assert (report.architecture, report.prediction_type, report.zero_terminal_snr) == (
        "SDXL base",
        "v_prediction",
        True,
    )
    assert report.metadata == {"modelspec.title": "Noob"}
    assert report.precision == {"F16": 1}
    assert report.warnings == ()


def test_precision_is_a_share_of_bytes(tmp_path, write_checkpoint):
    shapes = {"a": ("F16", 30), "b": ("F32", 10), "c": ("F8_E4M3", 100), "v_pred": ("U8", 0)}
    report = inspect_checkpoint(write_checkpoint(tmp_path / "a.sft", shapes))
    assert report.precision == pytest.approx({"F8_E4M3": 0.5, "F16": 0.3, "F32": 0.2})
    assert list(report.precision) == ["F8_E4M3", "F16", "F32"]
    assert inspect_checkpoint(write_checkpoint(tmp_path / "b.sft", {"v_pred": (0,)})).precision == {}


@pytest.mark.parametrize(
    ("architecture", "name", "shape"),
    [
        # kohya, both naming schemes; peft; old diffusers; LyCORIS; OneTrainer
        ("SDXL base", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", (16, 2048)),
        ("SD 1.x", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight", (4, 768)),
        ("SDXL base", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", (4, 2048)),
        ("SD 2.x", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight", (4, 1024)),
        ("unknown", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.hada_w1_a", (640, 4)),
        ("SDXL base", "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.lora_A.weight", (16, 2048)),
        ("unknown", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.oft_R.weight", (20, 496)),
    ],
)
def test_loras(tmp_path, write_checkpoint, architecture, name, shape):
    metadata = {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}
    report = inspect_checkpoint(write_checkpoint(tmp_path / "lora.safetensors", {name: shape}, metadata))
    assert (report.format, report.architecture) == ("LoRA", architecture)
    assert (report.prediction_type, report.zero_terminal_snr) == ("v_prediction", True)
    silent = inspect_checkpoint(write_checkpoint(tmp_path / "silent.safetensors", {name: shape}))
    assert (silent.prediction_type, silent.warnings) == (None, ())


def test_what_is_no_model_is_unknown(tmp_path, write_checkpoint, sdxl_unet):
    control = {name: shape for name, shape in sdxl_unet.items() if not name.startswith(("up_blocks", "conv_out"))}
    for shapes in ({}, VAE, CLIP, control, {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}):
        report = inspect_checkpoint(write_checkpoint(tmp_path / "a.safetensors", shapes))
        assert (report.format, report.architecture) == ("unknown format", "unknown")
        assert report.warnings == ()


# ----------------------------------------------------------------------------------------------------------------------
# Diffusers' folders


def write_diffusers(folder, write_checkpoint, shapes, **config):
    write_checkpoint(folder / "unet" / "diffusion_pytorch_model.safetensors", shapes, {"format": "pt"})
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_and_its_unet_say_the_same(tmp_path, write_checkpoint, sdxl_unet):
    folder = write_diffusers(
        tmp_path / "noob", write_checkpoint, sdxl_unet, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    write_checkpoint(folder / "vae" / "diffusion_pytorch_model.safetensors", {"decoder.conv_in.bias": (512,)})
    (folder / "text_encoder").mkdir()
    whole = inspect_checkpoint(folder)
    unet = inspect_checkpoint(str(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    for report in (whole, unet):
        assert report.architecture == "SDXL base"
        assert (report.prediction_type, report.zero_terminal_snr) == ("v_prediction", True)
        assert len(report.evidence) == 2
        assert report.warnings == ()
    assert (whole.format, unet.format) == ("diffusers folder", "diffusers U-Net file")
    assert (whole.has_vae, unet.has_vae) == (True, False)
    assert not whole.has_text_encoders
    write_checkpoint(folder / "text_encoder" / "model.safetensors", {"a": (1,)})
    assert inspect_checkpoint(folder).has_text_encoders


def test_a_real_scheduler_writes_what_is_read(tmp_path, write_checkpoint, sdxl_unet):
    folder = write_diffusers(tmp_path, write_checkpoint, sdxl_unet)
    for prediction_type, rescale in (("v_prediction", True), ("v_prediction", False), ("epsilon", False)):
        scheduler = diffusers.EulerDiscreteScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=rescale)
        scheduler.save_pretrained(folder / "scheduler")
        report = inspect_checkpoint(folder)
        assert (report.prediction_type, report.zero_terminal_snr) == (prediction_type, rescale)


def test_a_pipeline_saved_with_our_scheduler_says_how_diffusers_loads_it(tmp_path, write_checkpoint, sdxl_unet):
    folder = write_diffusers(tmp_path, write_checkpoint, sdxl_unet)
    diffusers.EulerDiscreteScheduler().save_pretrained(folder / "scheduler")

    def row():
        return next(row for row in inspect_checkpoint(folder).programs if row.program == "diffusers, folder")

    assert "import" not in str(row())
    ZTSNRScheduler().save_pretrained(folder / "scheduler")
    assert "from ztsnr.samplers import ZTSNRScheduler" in str(row())
    assert (row().taken.prediction_type, row().taken.zero_terminal_snr) == ("v_prediction", True)


def test_settings_beside_a_file(tmp_path, write_checkpoint, sdxl_unet):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    unet = write_checkpoint(tmp_path / "unet.safetensors", sdxl_unet)
    assert inspect_checkpoint(unet).prediction_type == "v_prediction"
    single = write_checkpoint(tmp_path / "single.safetensors", ldm_unet())  # may be any model's neighbour
    assert inspect_checkpoint(single).prediction_type is None


def test_the_nearer_settings_count(tmp_path, write_checkpoint, sdxl_unet):
    folder = write_diffusers(tmp_path, write_checkpoint, sdxl_unet, prediction_type="epsilon")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert inspect_checkpoint(unet).prediction_type == "epsilon"
    (folder / "unet" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    assert inspect_checkpoint(unet).prediction_type == "v_prediction"


def test_damaged_settings_are_a_warning(tmp_path, write_checkpoint, sdxl_unet):
    folder = write_diffusers(tmp_path, write_checkpoint, {**sdxl_unet, **MARKS})
    (folder / "scheduler" / "scheduler_config.json").write_text("{")
    report = inspect_checkpoint(folder)
    assert report.prediction_type == "v_prediction"  # by its marks
    assert any("is not a scheduler's settings" in warning for warning in report.warnings)


def test_a_unet_in_parts(tmp_path, write_checkpoint, sdxl_unet):
    names = list(sdxl_unet)
    for part in range(3):
        path = tmp_path / "unet" / f"diffusion_pytorch_model-0000{part + 1}-of-00003.safetensors"
        write_checkpoint(path, {name: sdxl_unet[name] for name in names[part::3]})
    assert inspect_checkpoint(tmp_path).architecture == "SDXL base"
    # a smaller version beside the parts is the whole of it
    write_checkpoint(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors", unet_shapes("SD 1.x"))
    assert inspect_checkpoint(tmp_path).architecture == "SD 1.x"
    # and what diffusers loads unless asked for a version is the plain file
    write_checkpoint(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", unet_shapes("SD 2.x"), dtype="F32")
    report = inspect_checkpoint(tmp_path)
    assert (report.architecture, report.precision) == ("SD 2.x", {"F32": 1})


def test_folders_without_a_readable_unet(tmp_path):
    with pytest.raises(ValueError, match="is not a diffusers folder"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ValueError, match="is a pickle"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="cannot be read: File name too long"):
        inspect_checkpoint(tmp_path / f"{'x' * 300}.safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# The report


def test_silence_is_told(tmp_path, write_checkpoint):
    report = inspect_checkpoint(write_checkpoint(tmp_path / "a.safetensors", {**ldm_unet(), **CLIP, **VAE}))
    assert (report.prediction_type, report.zero_terminal_snr, report.evidence) == (None, None, ())
    (warning,) = report.warnings
    assert warning.startswith("Nothing in the file says what the model predicts")


def test_v_prediction_without_a_word_on_zero_snr_is_told(tmp_path, write_checkpoint):
    metadata = {"modelspec.prediction_type": "v"}
    sdxl, sd2 = ldm_unet(), ldm_unet(text=1024, sizes=None, depths=((1, 1), (1, 1), (1, 1), (0, 0)))
    (warning,) = inspect_checkpoint(write_checkpoint(tmp_path / "a.safetensors", {**sdxl, **VAE}, metadata)).warnings
    assert "whether it has zero terminal SNR" in warning
    # SD 2.x was published as v-prediction without it
    assert inspect_checkpoint(write_checkpoint(tmp_path / "b.safetensors", {**sd2, **VAE}, metadata)).warnings == ()
    # LoRAs are not marked
    lora = {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 2048)}
    assert inspect_checkpoint(write_checkpoint(tmp_path / "lora.safetensors", lora, metadata)).warnings == ()
    said = metadata | {"ss_zero_terminal_snr": "False"}
    assert inspect_checkpoint(write_checkpoint(tmp_path / "c.safetensors", {**sdxl, **VAE}, said)).warnings == ()


def test_a_yaml_beside_the_file_is_seen(tmp_path, write_checkpoint):
    longest = "x" * (255 - len(".sft"))  # whose .yaml is too long a name
    for name in ("a.safetensors", f"{longest}.sft"):
        path = write_checkpoint(tmp_path / name, {**ldm_unet(), **VAE, **MARKS})
        assert inspect_checkpoint(path).programs[2].right, name
    (tmp_path / "a.yaml").write_text("model: {}\n")
    assert "believes the .yaml" in str(inspect_checkpoint(tmp_path / "a.safetensors").programs[2])


def test_disagreement_is_told(tmp_path, write_checkpoint):
    metadata = {"modelspec.prediction_type": "epsilon"}
    report = inspect_checkpoint(write_checkpoint(tmp_path / "a.safetensors", {**ldm_unet(), **MARKS}, metadata))
    assert report.prediction_type == "v_prediction"
    (warning,) = report.warnings
    assert warning.startswith("The marks disagree")


def test_the_text_for_people(tmp_path, write_checkpoint):
    metadata = {"modelspec.prediction_type": "epsilon"}
    shapes = {**ldm_unet(), **CLIP, **VAE, **MARKS}
    report = inspect_checkpoint(write_checkpoint(tmp_path / "noob.safetensors", shapes, metadata))
    lines = str(report).splitlines()
    assert lines[:2] == [
        "noob.safetensors: SDXL base, single file, F16 100%.",
        "Prediction: v_prediction. Zero terminal SNR: yes.",
    ]
    assert lines[2:-1] == list(report.evidence)
    assert lines[-1] == f"Warning: {report.warnings[0]}"


def test_the_report_cannot_be_changed(tmp_path, write_checkpoint):
    report = inspect_checkpoint(write_checkpoint(tmp_path / "a.safetensors", {"a": (1,)}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.architecture = "SDXL base"


def test_a_file_written_by_safetensors(tmp_path):
    tensors = {name: torch.zeros(shape) for name, shape in ldm_unet(depths=((0,), (2,), (5,))).items()}
    marks = {name: torch.tensor([]) for name in ("v_pred", "ztsnr")}
    safetensors.torch.save_file({**tensors, **marks}, tmp_path / "a.safetensors")
    report = inspect_checkpoint(tmp_path / "a.safetensors")
    assert (report.architecture, report.prediction_type, report.zero_terminal_snr) == ("KOALA", "v_prediction", True)
    assert report.precision == {"F32": 1}
