"""Pipelines loaded from folders, single files and a hub that runs in the test; real networks, tiny and random."""

import contextlib
import http.server
import importlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import socket
import sys
import threading

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from ztsnr.checkpoints import hub as hub_module
from ztsnr.checkpoints import pipeline as pipeline_module
from ztsnr.checkpoints.pipeline import load_pipeline
from ztsnr.samplers import NoiseSchedule, ZTSNRScheduler, diffusers_scheduler

from ..tiny_pipelines import write_single_file


@pytest.fixture(scope="module")
def plain(tiny):
    """The same pipeline as diffusers alone loads it."""
    return diffusers.StableDiffusionXLPipeline.from_pretrained(tiny)


def picture(pipeline, prompt="solid black background"):
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline(prompt, num_inference_steps=3, generator=generator, output_type="np").images)


def edit(path, **changes):
    """Change a JSON file; None removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def test_the_tiny_model_reads_its_prompt_and_is_small(tiny, plain):
    assert sum(file.stat().st_size for file in tiny.rglob("*")) < 5e6
    black, white = picture(plain), picture(plain, "solid white background")
    assert black.shape == (1, 32, 32, 3)
    assert (black - white).abs().max() > 0.01


def test_a_folder(tiny, plain):
    loaded = load_pipeline(tiny)
    assert (loaded.prediction_type, loaded.zero_terminal_snr) == ("v_prediction", True)
    assert loaded.description == ("tiny: unknown architecture, diffusers folder, v_prediction, zero terminal SNR")
    assert len(loaded.evidence) == 2
    assert all("scheduler_config.json" in sentence for sentence in loaded.evidence)
    assert loaded.warnings == ()
    assert torch.equal(picture(loaded.pipeline), picture(plain))


def test_the_pipeline_is_for_measuring(tiny, capfd):
    pipeline = load_pipeline(tiny).pipeline
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        network = getattr(pipeline, name)
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
    capfd.readouterr()
    picture(pipeline)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("dtype", "vae"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_half_precision(tiny, dtype, vae):
    pipeline = load_pipeline(tiny, dtype=dtype).pipeline
    assert (pipeline.unet.dtype, pipeline.text_encoder.dtype, pipeline.vae.dtype) == (dtype, dtype, vae)
    latents = pipeline("black", num_inference_steps=2, output_type="latent").images
    decoded = pipeline.vae.decode(latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor).sample
    assert decoded.isfinite().all()


def test_weights_that_exist_in_one_version_only(plain, tmp_path):
    plain.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert torch.equal(picture(load_pipeline(tmp_path).pipeline), picture(plain))


def test_stable_diffusion_1_without_its_safety_checker(plain, tmp_path):
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=plain.text_encoder.config.hidden_size,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        sample_size=16,
    )
    parts = {"vae": plain.vae, "text_encoder": plain.text_encoder, "tokenizer": plain.tokenizer, "unet": unet}
    made = diffusers.StableDiffusionPipeline(
        **parts,
        scheduler=diffusers.PNDMScheduler(prediction_type="v_prediction", skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
    )
    made.save_pretrained(tmp_path)
    index = {
        # as published; neither is loaded, so that the files need not be here
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    edit(tmp_path / "model_index.json", **index)
    loaded = load_pipeline(tmp_path)
    assert loaded.pipeline.safety_checker is None
    assert not loaded.pipeline.config.requires_safety_checker
    assert (loaded.prediction_type, loaded.zero_terminal_snr) == ("v_prediction", False)
    assert torch.equal(picture(loaded.pipeline), picture(made))


# ----------------------------------------------------------------------------------------------------------------------
# Single files


def test_a_single_file_is_the_same_model(tiny, plain, tmp_path):
    path = write_single_file(plain, tmp_path / "tiny.safetensors", marks=("v_pred", "ztsnr"))
    loaded = load_pipeline(path, config=tiny)
    assert (loaded.prediction_type, loaded.zero_terminal_snr) == ("v_prediction", True)
    assert "v_pred" in loaded.evidence[0]
    assert loaded.warnings == ()
    assert torch.equal(picture(loaded.pipeline), picture(plain))


def test_a_single_file_without_marks_is_taken_for_epsilon(tiny, plain, tmp_path):
    path = write_single_file(plain, tmp_path / "tiny.safetensors")
    loaded = load_pipeline(path, config=tiny)  # what the settings say is not said of this file
    assert (loaded.prediction_type, loaded.zero_terminal_snr) == ("epsilon", False)
    assert any("epsilon" in warning for warning in loaded.warnings)
    assert loaded.pipeline.scheduler.config.prediction_type == "epsilon"
    assert loaded.pipeline.scheduler.alphas_cumprod[-1] > 1e-3


def test_a_single_file_that_lacks_a_weight(tiny, plain, tmp_path):
    path = write_single_file(plain, tmp_path / "tiny.safetensors", marks=("v_pred",))
    tensors = load_file(path)
    del tensors["conditioner.embedders.1.model.text_projection"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"tiny\.safetensors lacks weights .* in: text_encoder_2$"):
        load_pipeline(path, config=tiny)


def test_text_encoders_that_diffusers_does_not_see(tiny, plain, tmp_path):
    """It would take those of the settings, without a word."""
    path = write_single_file(plain, tmp_path / "tiny.safetensors", marks=("v_pred", "ztsnr"))
    old = {name.replace("conditioner.embedders.0", "cond_stage_model"): t for name, t in load_file(path).items()}
    old = {name.replace(".text_model.", "."): t for name, t in old.items() if "embedders.1" not in name}
    save_file(old, path)
    with pytest.raises(ValueError, match=r"tiny\.safetensors has text encoders that diffusers does not find"):
        load_pipeline(path, config=tiny)


def test_settings_with_a_program(folder, plain, tmp_path):
    path = write_single_file(plain, tmp_path / "tiny.safetensors")
    (folder / "scheduler" / "mine.py").touch()
    with pytest.raises(ValueError, match=r"copy has a program, mine\.py, and"):
        load_pipeline(path, config=folder)


def test_settings_that_lack_a_tokenizer(folder, plain, tmp_path):
    path = write_single_file(plain, tmp_path / "tiny.safetensors")
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(ValueError, match=r"copy has no tokenizer_2: give a whole model"):
        load_pipeline(path, config=folder)


def test_settings_of_another_model(folder, plain, tmp_path):
    path = write_single_file(plain, tmp_path / "tiny.safetensors")
    edit(folder / "unet" / "config.json", block_out_channels=[16, 32])
    with pytest.raises(ValueError, match=r"^[^\n]*tiny\.safetensors cannot be loaded: [^\n]+$"):
        load_pipeline(path, config=folder)


# ----------------------------------------------------------------------------------------------------------------------
# What the model is


@pytest.mark.parametrize(
    ("by_hand", "expected"),
    [
        ({"prediction_type": "epsilon", "zero_terminal_snr": False}, ("epsilon", False)),
        ({"zero_terminal_snr": False}, ("v_prediction", False)),
        ({"prediction_type": "v_prediction"}, ("v_prediction", True)),
    ],
)
def test_what_is_set_by_hand_wins(tiny, by_hand, expected):
    loaded = load_pipeline(tiny, **by_hand)
    assert (loaded.prediction_type, loaded.zero_terminal_snr) == expected
    assert sum("by hand" in sentence for sentence in loaded.evidence) == len(by_hand)


@pytest.mark.parametrize("zero_terminal_snr", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        diffusers.EulerDiscreteScheduler,
        diffusers.DDIMScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.PNDMScheduler,  # knows nothing of zero terminal SNR
        ZTSNRScheduler,
    ],
)
def test_schedulers_built_from_the_config_are_right(folder, plain, kind, zero_terminal_snr):
    # a folder that says nothing: every value is its scheduler's default, which diffusers forgets on the way
    scheduler = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.save_pretrained(folder / "scheduler")
    config = folder / "scheduler" / "scheduler_config.json"
    edit(config, prediction_type=None, rescale_betas_zero_snr=None)
    edit(folder / "model_index.json", scheduler=[kind.__module__.split(".schedulers")[0], kind.__name__])

    loaded = load_pipeline(folder, prediction_type="v_prediction", zero_terminal_snr=zero_terminal_snr)
    own = loaded.pipeline.scheduler
    assert type(own) is kind
    assert own.config.get("timestep_spacing") == scheduler.config.get("timestep_spacing")
    schedule = NoiseSchedule.sdxl(zero_terminal_snr=zero_terminal_snr)
    for built in (ZTSNRScheduler.from_config(own.config), diffusers.DDIMScheduler.from_config(own.config)):
        assert built.config.prediction_type == "v_prediction"
        torch.testing.assert_close(built.alphas_cumprod, schedule.alphas_cumprod.float(), rtol=1e-4, atol=1e-6)
    assert own.config.prediction_type == "v_prediction"
    if kind is diffusers.PNDMScheduler and zero_terminal_snr:
        assert any("PNDMScheduler" in warning for warning in loaded.warnings)
    else:
        assert not any("cannot run" in warning for warning in loaded.warnings)
        torch.testing.assert_close(own.alphas_cumprod, schedule.alphas_cumprod.float(), rtol=1e-4, atol=1e-6)


def test_stable_diffusion_2_must_say_what_it_predicts(tmp_path, write_checkpoint):
    shapes = whole_file(text=1024, sizes=None, depths=((1, 1), (1, 1), (1, 1), (0, 0)))
    path = write_checkpoint(tmp_path / "a.safetensors", shapes)
    with pytest.raises(ValueError, match=r"SD 2\.x comes as epsilon and as v-prediction: set prediction_type"):
        load_pipeline(path)


def test_a_contradiction_is_refused(tiny):
    with pytest.raises(ValueError, match="epsilon model with zero terminal SNR, which cannot work"):
        load_pipeline(tiny, prediction_type="epsilon")


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def whole_file(channels=320, text=2048, sizes=2816, depths=((0, 0), (2, 2), (10, 10)), vae=True, clip=True):
    """The names and shapes of a full-size single file by which it is told what it is."""
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
        block += 1
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}
    shapes |= {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)} if vae else {}
    return shapes | ({"conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,)} if clip else {})


REFINER = {"channels": 384, "text": 1280, "sizes": 2560, "depths": ((0, 0), (4, 4), (4, 4), (0, 0))}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
            "is Flux, but zero-terminal-SNR sampling supports only",
        ),
        ({"joint_blocks.0.context_block.attn.qkv.weight": (8, 8)}, "is Stable Diffusion 3, but"),
        (whole_file(**REFINER), "is SDXL refiner, but"),
        ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (4, 640)}, "is a LoRA, not a whole model: merge it"),
        (whole_file(vae=False, clip=False), "has a U-Net without text encoders and VAE: give a whole checkpoint"),
        (whole_file(vae=False), "has a U-Net without VAE: give a whole checkpoint"),
        (whole_file(clip=False), "has a U-Net without text encoders: give a whole checkpoint"),
        ({"something.weight": (1,)}, "is not a model of Stable Diffusion"),
        (whole_file(depths=((0, 0), (2, 2), (4, 4))), "has SSD-1B, for which no settings are known"),
    ],
)
def test_single_files_of_another_kind(tmp_path, write_checkpoint, shapes, message):
    path = write_checkpoint(tmp_path / "a.safetensors", shapes)
    with pytest.raises(ValueError, match=rf"^[^\n]*a\.safetensors {message}"):
        load_pipeline(path)


def test_the_other_suffix_must_be_renamed(tmp_path, write_checkpoint):
    path = write_checkpoint(tmp_path / "a.sft", whole_file() | {"v_pred": (0,)})
    with pytest.raises(ValueError, match=r"^rename "):
        load_pipeline(path)


def test_folders_of_another_kind(folder, tmp_path):
    edit(folder / "model_index.json", _class_name="StableDiffusionXLInpaintPipeline")
    with pytest.raises(ValueError, match="is a model for StableDiffusionXLInpaintPipeline, but only"):
        load_pipeline(folder)
    shutil.rmtree(folder / "unet")
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ValueError, match="is a model for FluxPipeline, but only"):
        load_pipeline(folder)
    (folder / "model_index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not a diffusers folder of a whole model"):
        load_pipeline(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a diffusers folder"):
        load_pipeline(tmp_path / "empty")


@pytest.mark.parametrize("part", ["unet", "text_encoder_2", "tokenizer", "scheduler", "vae"])
def test_folders_of_which_a_part_is_missing(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        load_pipeline(folder)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_folder_that_lacks_a_weight(folder, part):
    weights = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors[max(tensors)]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=rf"copy lacks weights .* in: {part}$"):
        load_pipeline(folder)


def test_a_folder_saved_without_text_encoders(folder):
    edit(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(ValueError, match="copy has no text_encoder and no tokenizer: give a whole model"):
        load_pipeline(folder)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_pickles_are_never_opened(folder, tmp_path, part):
    weights = next((folder / part).glob("*.safetensors"))
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    weights.with_name(name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    load_pipeline(folder)  # it is not even looked at while the other is there
    weights.unlink()
    with pytest.raises(ValueError, match=r"is a pickle, which may run any program .* use the \.safetensors"):
        load_pipeline(folder)
    for suffix in ("ckpt", "pt", "bin"):
        (tmp_path / f"a.{suffix}").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        with pytest.raises(ValueError, match="is a pickle"):
            load_pipeline(tmp_path / f"a.{suffix}")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("place", ["None.py", "unet/mine.py"])
def test_programs_are_never_run(folder, tmp_path, place):
    (folder / place).write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})\nclass Mine: pass\n")
    edit(folder / "model_index.json", unet=["mine", "Mine"])
    with pytest.raises(ValueError, match="has a program"):
        load_pipeline(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["missing.safetensors", "models/missing.sft", "missing", "/a/b", "../a/b", "a/b/c", "a b/c"]
)
def test_names_of_nothing(name):
    with pytest.raises(ValueError, match="there is no file or folder"):
        load_pipeline(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dtype": torch.float64},
            "dtype must be one of torch.float32, torch.float16, torch.bfloat16, not torch.float64",
        ),
        ({"prediction_type": "velocity"}, "unknown prediction_type 'velocity'; choose one of"),
        ({"device": "gpu"}, "the device gpu cannot be used"),
        pytest.param(
            {"device": "cuda"},
            "the device cuda cannot be used",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments(tiny, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pipeline(tiny, **arguments)


# ----------------------------------------------------------------------------------------------------------------------
# The hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as its client asks for: one model, "owner/tiny", from a folder."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = None
    served = None

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        files = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}
        if match := re.fullmatch(rf"/owner/tiny/resolve/(?:main|{self.commit})/(.*)", path):
            file = files.get(match[1])
            if file is None:
                return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
            if self.command == "GET":
                self.served.append(match[1])
            data = file.read_bytes()
            return self.answer(data, 200, {"ETag": f'"{hash(data):x}"', "X-Repo-Commit": self.commit})
        if re.fullmatch(rf"/api/models/owner/tiny(/revision/(main|{self.commit}))?", path):
            siblings = [{"rfilename": name, "size": file.stat().st_size} for name, file in files.items()]
            return self.answer_json({"id": "owner/tiny", "sha": self.commit, "siblings": siblings})
        if path.startswith("/api/models/owner/tiny/tree/"):
            return self.answer_json(
                [{"type": "file", "path": n, "size": f.stat().st_size, "oid": "0"} for n, f in files.items()]
            )
        return self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})

    def answer_json(self, content):
        self.answer(json.dumps(content).encode(), 200, {"Content-Type": "application/json"})

    def answer(self, data, status, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def use_hub(monkeypatch, cache, url):
    """Point this process's hub client at a URL and at an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.model_info.__self__, "endpoint", url)


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch):
    """A hub with the tiny model; ``hub.served`` lists the files that were fetched."""
    handler = type("TinyHub", (Hub,), {"folder": tiny, "served": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, tmp_path / "cache", f"http://127.0.0.1:{server.server_port}")
    handler.stop = contextlib.ExitStack()
    handler.stop.callback(server.server_close)
    handler.stop.callback(server.shutdown)
    with handler.stop:
        yield handler


def test_a_model_from_the_hub_and_from_its_cache(hub, folder, plain):
    hub.folder = folder
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb("never")))
    loaded = load_pipeline("owner/tiny")
    assert (loaded.prediction_type, loaded.zero_terminal_snr) == ("v_prediction", True)
    assert loaded.description.startswith("tiny: ")
    assert torch.equal(picture(loaded.pipeline), picture(plain))
    assert "unet/diffusion_pytorch_model.safetensors" in hub.served
    assert not any(name.endswith(".bin") for name in hub.served)
    hub.stop.close()
    assert torch.equal(picture(load_pipeline("owner/tiny").pipeline), picture(plain))


def test_pickles_are_not_even_downloaded(hub, folder):
    hub.folder = folder
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"could not download owner/tiny .*safetensors"):
        load_pipeline("owner/tiny")
    assert hub.served == ["model_index.json"]


def test_settings_from_the_hub_and_from_its_cache(hub, plain, tmp_path):
    path = write_single_file(plain, tmp_path / "tiny.safetensors", marks=("v_pred", "ztsnr"))
    assert torch.equal(picture(load_pipeline(path, config="owner/tiny").pipeline), picture(plain))
    assert hub.served
    assert all(name.endswith((".json", ".txt")) for name in hub.served)
    hub.stop.close()
    assert torch.equal(picture(load_pipeline(path, config="owner/tiny").pipeline), picture(plain))


def test_a_model_that_the_hub_does_not_have(hub):
    with pytest.raises(ValueError, match=r"could not download owner/other from the Hugging Face Hub \(404"):
        load_pipeline("owner/other")


def test_another_kind_of_model_on_the_hub_is_not_downloaded(hub, folder):
    hub.folder = folder
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ValueError, match="is a model for FluxPipeline, but only"):
        load_pipeline("owner/tiny")
    assert hub.served == ["model_index.json"]


def test_no_network(tmp_path, monkeypatch, write_checkpoint):
    path = write_checkpoint(tmp_path / "noob.safetensors", whole_file() | {"v_pred": (0,), "ztsnr": (0,)})
    use_hub(monkeypatch, tmp_path / "cache", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ValueError, match=r"could not download owner/model .*refused.*run once with network, or give"):
        load_pipeline("owner/model")
    settings = r"could not download stabilityai/stable-diffusion-xl-base-1\.0 .* as config$"
    with pytest.raises(ValueError, match=settings):
        load_pipeline(path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=settings):
        load_pipeline(path)


def test_a_hub_that_never_answers_is_given_up_soon(tmp_path, monkeypatch):
    """It is asked once, and not again for every file."""
    monkeypatch.setattr(hub_module, "HUB_TIMEOUT", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(100)  # connections that it never takes
        use_hub(monkeypatch, tmp_path / "cache", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ValueError, match=r"could not download owner/model .*timed out"):
            load_pipeline("owner/model")
        # Beside it the client may tell which program asks.
        assert sum(b"owner/model" in request for request in requests(silent)) == 1


def requests(listening):
    """The first line of every request that waits at a socket to be taken."""
    listening.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            connection, _ = listening.accept()
            with connection:
                connection.setblocking(False)
                yield connection.recv(65536).partition(b"\r\n")[0]


# ----------------------------------------------------------------------------------------------------------------------
# What is a bug and what is not


@pytest.mark.parametrize(
    ("part", "file", "changes", "raised"),
    [
        ("unet", "config.json", {"cross_attention_dim": {"a": 1}}, KeyError),
        ("vae", "config.json", {"norm_num_groups": 0}, ZeroDivisionError),
        ("text_encoder_2", "config.json", {"max_position_embeddings": -1}, RuntimeError),
        ("scheduler", "scheduler_config.json", {"beta_schedule": 3}, NotImplementedError),
        ("tokenizer", "tokenizer.json", {"model": "gelu"}, Exception),  # AttributeError, in some versions itself
        ("tokenizer", "tokenizer.json", {"post_processor": 7}, Exception),  # itself
    ],
)
def test_settings_at_which_libraries_fail(folder, part, file, changes, raised):
    edit(folder / part / file, **changes)
    with pytest.raises(ValueError, match=r"^[^\n]*copy cannot be loaded: [^\n]+$") as caught:
        load_pipeline(folder)
    assert isinstance(caught.value.__cause__, raised)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_weights_that_are_cut_short(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        load_pipeline(folder)


def test_a_sentence_of_our_scheduler_is_told(folder):
    ZTSNRScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["ztsnr.samplers.diffusers_scheduler", "ZTSNRScheduler"])
    edit(folder / "scheduler" / "scheduler_config.json", solver="magic")
    with pytest.raises(ValueError, match=r"^[^\n]*copy cannot be loaded: unknown solver[^\n]+$"):
        load_pipeline(folder)


def test_a_bug_of_this_package_is_not_told_as_a_mistake(folder, monkeypatch):
    """Neither one in what the libraries call, nor one in a block itself."""
    ZTSNRScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["ztsnr.samplers.diffusers_scheduler", "ZTSNRScheduler"])
    load_pipeline(folder)
    with monkeypatch.context() as broken:
        broken.delattr(diffusers_scheduler, "check_prediction_type")
        with pytest.raises(NameError, match="check_prediction_type"):
            load_pipeline(folder)
    monkeypatch.setattr(pipeline_module, "weights_variant", None)
    with pytest.raises(TypeError, match="not callable"):
        load_pipeline(folder)


@pytest.mark.parametrize(("module", "step"), [(hub_module, "model_info"), (pipeline_module, "hf_hub_download")])
def test_a_bug_on_the_way_to_the_hub_is_not_told_as_its_silence(hub, monkeypatch, module, step):
    def broken(*arguments, **options):
        raise TypeError("of ours")

    monkeypatch.setattr(module, step, broken)
    with pytest.raises(TypeError, match="of ours"):
        load_pipeline("owner/tiny")


def test_an_answer_that_is_not_the_hubs(hub, monkeypatch):
    """As from a hotel's network, which answers everything with its own page."""
    monkeypatch.setattr(hub, "do_GET", lambda self: self.answer(b"<!DOCTYPE html>", 200, {"Content-Type": "text/html"}))
    one_line = r"^could not download owner/tiny from the Hugging Face Hub \([^\n]+\): [^\n]+$"
    with pytest.raises(ValueError, match=one_line):
        load_pipeline("owner/tiny")


# ----------------------------------------------------------------------------------------------------------------------
# A process that has not imported our scheduler


def load_anew(folder):
    """In a process that has this package not imported, and for the rest is a copy of this one."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "ztsnr"]:
        del sys.modules[name]
    load = importlib.import_module("ztsnr.checkpoints.pipeline").load_pipeline
    scheduler = load(folder).pipeline.scheduler
    assert type(scheduler) is not ZTSNRScheduler  # but its like of the new import
    assert (type(scheduler).__name__, scheduler.config.solver) == ("ZTSNRScheduler", "unipc")


def test_a_folder_with_our_scheduler_loads_where_nobody_imported_it(folder):
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.register_modules(scheduler=ZTSNRScheduler(solver="unipc"))
    pipeline.save_pretrained(folder)
    process = multiprocessing.get_context("fork").Process(target=load_anew, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0
