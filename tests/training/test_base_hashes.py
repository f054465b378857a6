"""A run that is resumed knows the base that it began with, and reads it again only where a file's date has changed."""

import hashlib
import json
import os
import shutil

import pytest

from ztsnr.errors import UserError
from ztsnr.training.base_hashes import HASHES

from ..checkpoints.tiny_folders import rewrite
from .tiny_run import make_content, train

LORA = {"kind": "lora", "rank": 2}


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(place / "tiny", folder / "tiny")
    train(content_of(place, folder))
    return folder


def content_of(place, folder, steps=1):
    return make_content(place, folder / "run", steps=steps, model__base=str(folder / "tiny"), model__adapter=LORA)


@pytest.fixture
def again(place, done, tmp_path):
    """A copy of the run and its base, with the dates that they had, and how to resume it."""
    folder = shutil.copytree(done, tmp_path / "copy")
    known = (folder / "run" / HASHES).read_text()
    (folder / "run" / HASHES).write_text(known.replace(str(done.resolve()), str(folder.resolve())))
    said = []

    def resume(steps=2):
        train(content_of(place, folder, steps), resume=True, say=said.append)
        return said

    return folder, resume


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are read."""
    names, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: (names.append(file.name), digest(file, kind))[1])
    return names


def test_a_resume_reads_nothing_where_nothing_has_changed(again, hashed):
    folder, resume = again
    assert "resuming at step 1" in resume()
    assert hashed == []
    state = json.loads((folder / "run" / "states" / "step-00000002" / "state.json").read_text())
    assert set(state["base"]) == {"unet", "text_encoder", "text_encoder_2", "vae"}


def test_a_date_that_has_changed(again, hashed):
    folder, resume = again
    path = folder / "tiny" / "unet" / "diffusion_pytorch_model.safetensors"
    os.utime(path, (1, 1))
    resume()
    assert hashed == [str(path)]  # and not again for the export
    resume(3)
    assert hashed == [str(path)]


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', None])
def test_hashes_that_are_lost_are_made_again(again, hashed, content):
    folder, resume = again
    path = folder / "run" / HASHES
    path.unlink() if content is None else path.write_text(content)
    resume()
    assert len(hashed) == 4
    assert len([name for name in json.loads(path.read_text()) if name.endswith(".safetensors")]) == 4


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("unet", "conv_in.bias"),
        ("vae", "decoder.conv_in.bias"),
        ("text_encoder_2", "text_projection.weight"),
    ],
)
def test_another_base_is_refused_with_what_differs(again, part, tensor):
    folder, resume = again
    rewrite(folder / "tiny", part, lambda tensors: tensors | {tensor: tensors[tensor] + 0.1})
    with pytest.raises(UserError, match=rf"was trained on another base: \S+{part} has another content\.  Set model"):
        resume()


def test_settings_of_a_network_count_and_who_wrote_them_does_not(again):
    folder, resume = again
    path = folder / "tiny" / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_diffusers_version": "0.0.1", "_name_or_path": "elsewhere"}))
    resume()
    path.write_text(json.dumps(config | {"scaling_factor": 0.5}))
    with pytest.raises(UserError, match="vae has another content"):
        resume(3)


def test_the_same_base_in_another_place(place, again):
    folder, _ = again
    (folder / "tiny").rename(folder / "moved")
    content = content_of(place, folder, 2) | {"model": {"base": str(folder / "moved"), "adapter": LORA}}
    content["model"]["dtype"] = "float32"
    train(content, resume=True)


def test_a_state_of_version_0_1_0(again):
    folder, resume = again
    path = folder / "run" / "states" / "step-00000001" / "state.json"
    state = json.loads(path.read_text())
    del state["base"]
    path.write_text(json.dumps(state))
    assert len([line for line in resume() if "version 0.1.0" in line and "not checked" in line]) == 1


def test_a_base_that_is_replaced_while_it_is_trained(again, monkeypatch):
    """The adapter would be merged into another model."""
    folder, resume = again
    from ztsnr.training import trainer

    train_all = trainer.train

    def train_and_replace(run, states):
        ended = train_all(run, states)
        rewrite(folder / "tiny", "unet", lambda tensors: tensors | {"conv_in.bias": tensors["conv_in.bias"] + 0.1})
        return ended

    monkeypatch.setattr(trainer, "train", train_and_replace)
    with pytest.raises(UserError, match=r"the base has changed while the run was training: \S+unet has another"):
        resume()
