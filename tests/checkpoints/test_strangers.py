"""Settings of strangers: sizes and classes that no model has are refused in a sentence, before anything is built."""

import json
import sys
import time

import diffusers
import pytest
import torch

from ztsnr.checkpoints import inspect_checkpoint, to_folder, to_single_file
from ztsnr.checkpoints.components import NETWORKS, check_classes, check_networks
from ztsnr.checkpoints.pipeline import load_pipeline
from ztsnr.checkpoints.settings import LONGEST_SETTINGS, MOST_LAYERS, check_sizes
from ztsnr.checkpoints.vae import load_vae


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def said_within_a_second(action, *arguments, **options):
    """The one sentence that it ends with."""
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        action(*arguments, **options)
    assert time.process_time() - begun < 1
    return str(caught.value)


HUGE = [
    ("unet", {"layers_per_block": 200_000}, "layers_per_block = 200000, but at most 8192 is allowed"),
    ("unet", {"layers_per_block": [2, 200_000]}, "layers_per_block = 200000"),
    ("unet", {"layers_per_block": -200_000}, "layers_per_block = 200000"),
    ("unet", {"layers_per_block": 2000}, "asks for 4000 layers, but at most 256 are allowed"),
    ("unet", {"layers_per_block": 16, "transformer_layers_per_block": [[16], 10]}, "asks for 512 layers"),
    ("unet", {"reverse_transformer_layers_per_block": [300]}, "asks for 600 layers"),
    ("unet", {"block_out_channels": [8, 10**9]}, "block_out_channels = 1000000000"),
    ("unet", {"down_block_types": ["DownBlock2D"] * 1000}, "asks for 1000 layers"),
    ("unet", {"cross_attention_dim": 10**400}, "cross_attention_dim = a number of more than 12 digits"),
    ("vae", {"layers_per_block": 5000}, "asks for 10000 layers"),
    ("vae", {"latent_channels": 10**6}, "latent_channels = 1000000"),
    ("text_encoder", {"num_hidden_layers": 5000}, "asks for 5000 layers"),
    ("text_encoder_2", {"vocab_size": 10**10}, "vocab_size = 10000000000, but at most 1048576 is allowed"),
    ("text_encoder", {"model_type": "clip", "text_config": {"hidden_size": 10**6}}, "hidden_size = 1000000"),
]


@pytest.mark.parametrize(("part", "changes", "sentence"), HUGE)
def test_a_folder_that_asks_for_too_much(folder, part, changes, sentence):
    edit(folder / part / "config.json", **changes)
    said = said_within_a_second(load_pipeline, folder)
    assert said.startswith(f"{folder / part / 'config.json'} asks for ")
    assert sentence in said


def test_every_door_that_builds_from_a_folder(tiny, folder, tmp_path):
    file = tmp_path / "model.safetensors"
    to_single_file(tiny, file)
    edit(folder / "unet" / "config.json", layers_per_block=200_000)
    edit(folder / "vae" / "config.json", layers_per_block=200_000)
    for action in (
        lambda: load_pipeline(file, config=folder),
        lambda: to_folder(file, tmp_path / "out", config=folder),
        lambda: load_vae(folder),
        lambda: load_vae(folder / "vae"),
        lambda: load_vae(file, config=folder),
    ):
        assert "asks for layers_per_block = 200000" in said_within_a_second(action)
    assert not (tmp_path / "out").exists()


def test_a_scheduler_of_too_many_timesteps(folder):
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=10**10)
    sentence = "num_train_timesteps = 10000000000, but at most"
    assert sentence in said_within_a_second(load_pipeline, folder)
    assert any(sentence in warning for warning in inspect_checkpoint(folder).warnings)


def test_settings_that_are_too_long_or_none(folder):
    path = folder / "unet" / "config.json"
    for text in (b" " * LONGEST_SETTINGS + path.read_bytes(), b"[]", b"[" * 100_000, b"\xff"):
        path.write_bytes(text)
        assert said_within_a_second(load_pipeline, folder) == f"{path} is not a network's settings"


def test_what_the_class_does_not_read_may_be_large(folder):
    """diffusers' training scripts leave their step count in the config of a moving average."""
    edit(folder / "unet" / "config.json", optimization_step=1_200_000)
    edit(folder / "text_encoder" / "config.json", global_step=1_200_000)
    load_pipeline(folder)


@pytest.mark.parametrize("kind", NETWORKS.values())
def test_the_defaults_of_every_class_are_believed(tmp_path, kind):
    (tmp_path / "config.json").write_text("{}")
    with torch.device("meta"):  # without weights: some of the networks are of full size
        config = kind.config_class().to_dict() if getattr(kind, "config_class", None) else dict(kind().config)
    check_sizes(tmp_path / "config.json", config)


def test_published_models_are_believed(tmp_path):
    """SDXL's and SD 2.1's numbers, and those of two models that were made smaller, with lists of lists."""
    sdxl = {"block_out_channels": [320, 640, 1280], "layers_per_block": 2, "transformer_layers_per_block": [1, 2, 10]}
    vega = sdxl | {"transformer_layers_per_block": [[1, 1], [2, 2], [4, 4]]}
    for config in (
        sdxl | {"cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 2816, "sample_size": 128},
        vega | {"reverse_transformer_layers_per_block": [[4, 4, 4], [2, 1, 1], 1]},
        {"num_hidden_layers": 32, "intermediate_size": 5120, "vocab_size": 49408, "eos_token_id": 49407},
        {"layers_per_block": MOST_LAYERS},
    ):
        check_sizes(tmp_path, config)


# ----------------------------------------------------------------------------------------------------------------------
# Classes


@pytest.mark.parametrize(
    ("part", "named", "sentence"),
    [
        ("unet", ["os", "system"], "'os system' for its part 'unet': only UNet2DConditionModel is allowed there"),
        ("vae", ["diffusers", "AutoencoderTiny"], "only AutoencoderKL is allowed there"),
        ("vae", ["transformers", "AutoencoderKL"], "'transformers AutoencoderKL' for its part 'vae'"),
        ("text_encoder", ["transformers", "AutoModel"], "only CLIPTextModel is allowed there"),
        ("tokenizer", ["my_tokenizer", "CLIPTokenizer"], "only CLIPTokenizer or CLIPTokenizerFast is allowed there"),
        ("scheduler", ["evil", "EulerDiscreteScheduler"], "a scheduler must be one of diffusers' own or"),
        ("scheduler", ["diffusers", "DiffusionPipeline"], "a scheduler must be one of diffusers' own or"),
        ("scheduler", ["diffusers", "utils.Scheduler"], "a scheduler must be one of diffusers' own or"),
        ("scheduler", ["diffusers"], "'diffusers' for its part 'scheduler'"),
        ("scheduler", {"library": "evil"}, "for its part 'scheduler'"),
        ("prior", ["evil", "Prior"], "a Stable Diffusion 1"),
    ],
)
def test_classes_that_are_not_loaded(folder, tmp_path, monkeypatch, part, named, sentence):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(folder / "model_index.json", **{part: named})
    assert sentence in said_within_a_second(load_pipeline, folder)
    assert "evil" not in sys.modules


def test_classes_that_are(folder, tiny):
    index = json.loads((tiny / "model_index.json").read_text())
    for scheduler in (
        *(
            ["diffusers", name]
            for name in dir(diffusers)
            if name.endswith("DiscreteScheduler") and not name.startswith("Flax")
        ),
        ["diffusers", "DPMSolverMultistepScheduler"],
        ["ztsnr.samplers.diffusers_scheduler", "ZTSNRScheduler"],
        [None, None],
    ):
        check_classes(folder, index | {"scheduler": scheduler}, ())
    check_classes(folder, index | {"safety_checker": ["evil", "Checker"]}, {"safety_checker"})
    check_networks(folder)
