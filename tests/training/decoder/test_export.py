"""A trained decoder in its checkpoint: nothing else has changed, and programs read it."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tiny_pipelines import make_tiny_sdxl, write_single_file
from ztsnr.checkpoints.vae import hash_encoder, load_vae
from ztsnr.checkpoints.verify import verify_checkpoint
from ztsnr.training.decoder import export as vae_export
from ztsnr.training.decoder.export import is_whole, merge_decoder, save_vae

DECODER = ("first_stage_model.decoder.", "first_stage_model.post_quant_conv.")
HASHES = {"modelspec.hash_sha256": "0x" + "0" * 64, "sshs_model_hash": "abc", "modelspec.title": "a model"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_sdxl(tmp_path_factory.mktemp("model") / "folder")


@pytest.fixture(scope="module")
def single(folder):
    return write_single_file(
        StableDiffusionXLPipeline.from_pretrained(folder), folder.parent / "single.safetensors", ("v_pred", "ztsnr")
    )


@pytest.fixture(scope="module")
def trained(folder):
    """A VAE whose decoder has been moved."""
    vae = load_vae(folder)
    generator = torch.Generator().manual_seed(0)
    for name, weight in vae.named_parameters():
        if name.startswith(("decoder.", "post_quant_conv.")):
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return vae


def decoded(vae):
    with torch.no_grad():
        return vae.decode(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))).sample


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def differing(path, base):
    new, old = load_file(path), load_file(base)
    assert new.keys() == old.keys()
    assert all(new[name].dtype == old[name].dtype and new[name].shape == old[name].shape for name in old)
    return {name for name in old if not torch.equal(new[name], old[name])}


def test_a_single_file(trained, single, folder, tmp_path):
    merge_decoder(trained, single, tmp_path / "new.safetensors")
    expected = {name for name in load_file(single) if name.startswith(DECODER)}
    assert differing(tmp_path / "new.safetensors", single) == expected
    vae = load_vae(tmp_path / "new.safetensors", config=folder)
    torch.testing.assert_close(decoded(vae), decoded(trained), rtol=0, atol=0)
    assert hash_encoder(vae) == hash_encoder(trained)
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(tmp_path / "new.safetensors"), config=str(folder), local_files_only=True
    )
    torch.testing.assert_close(decoded(pipeline.vae), decoded(trained), rtol=0, atol=0)
    report = verify_checkpoint(tmp_path / "new.safetensors", single)
    assert report.report.prediction_type == "v_prediction"
    assert report.report.zero_terminal_snr
    assert {change.name for change in report.changes} == expected


def test_metadata_and_half_precision(trained, single, tmp_path):
    """The base's types stay, and so does what its metadata say; the hash is that of the new tensors."""
    halves = {name: tensor.half() if tensor.numel() else tensor for name, tensor in load_file(single).items()}
    save_file(halves, tmp_path / "half.safetensors", HASHES)
    merge_decoder(trained, tmp_path / "half.safetensors", tmp_path / "new.safetensors")
    new = load_file(tmp_path / "new.safetensors")
    name = "first_stage_model.decoder.conv_out.weight"
    assert torch.equal(new[name], trained.decoder.conv_out.weight.half())
    assert all(same_bytes(new[name], halves[name]) for name in halves if not name.startswith(DECODER))
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"modelspec.hash_sha256", "modelspec.title"}
    report = verify_checkpoint(tmp_path / "new.safetensors")
    assert not [problem for problem in report.problems if "hash" in problem]  # which it was computed and compared for
    assert [problem for problem in verify_checkpoint(tmp_path / "half.safetensors").problems if "hash" in problem]


def test_a_number_too_large(trained, single, tmp_path):
    save_file({name: tensor.half() for name, tensor in load_file(single).items()}, tmp_path / "half.safetensors")
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    vae = AutoencoderKL.from_config(trained.config)
    vae.load_state_dict(state)
    with torch.no_grad():
        vae.decoder.conv_out.weight[0] = 1e6
    with pytest.raises(ValueError, match="cannot hold"):
        merge_decoder(vae, tmp_path / "half.safetensors", tmp_path / "new.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.safetensors"]


def test_a_folder(trained, folder, tmp_path):
    merge_decoder(trained, folder, tmp_path / "new")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*") if path.is_file()
    )
    changed = [file for file in files if (folder / file).read_bytes() != (tmp_path / "new" / file).read_bytes()]
    assert [file.as_posix() for file in changed] == ["vae/diffusion_pytorch_model.safetensors"]
    names = differing(tmp_path / "new" / changed[0], folder / changed[0])
    assert names == {name for name in trained.state_dict() if name.startswith(("decoder.", "post_quant_conv."))}
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(decoded(pipeline.vae), decoded(trained), rtol=0, atol=0)


def test_a_folder_of_two_versions_and_old_names(trained, folder, tmp_path):
    """Early folders call the layers of attention otherwise, and some hold the half-precision version besides."""
    shutil.copytree(folder, tmp_path / "old")
    file = tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        for new, old in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
            name = name.replace(new, old)
        renamed[name] = tensor
    save_file(renamed, file)
    save_file(
        {name: tensor.half() for name, tensor in renamed.items()},
        file.with_name("diffusion_pytorch_model.fp16.safetensors"),
    )
    merge_decoder(trained, tmp_path / "old", tmp_path / "new")
    for name, dtype in (("diffusion_pytorch_model", torch.float32), ("diffusion_pytorch_model.fp16", torch.float16)):
        tensors = load_file(tmp_path / "new" / "vae" / f"{name}.safetensors")
        query = trained.decoder.mid_block.attentions[0].to_q.weight
        assert torch.equal(tensors["decoder.mid_block.attentions.0.query.weight"], query.to(dtype))
        assert torch.equal(tensors["encoder.conv_in.weight"], trained.encoder.conv_in.weight.to(dtype))
    torch.testing.assert_close(decoded(load_vae(tmp_path / "new")), decoded(trained), rtol=0, atol=0)


def test_another_vae_is_refused(trained, single, folder, tmp_path):
    tensors = load_file(single)
    wider = tensors | {"first_stage_model.decoder.conv_out.weight": torch.zeros(3, 16, 3, 3)}
    save_file(wider, tmp_path / "wider.safetensors")
    without = {name: tensor for name, tensor in tensors.items() if "decoder.mid" not in name}
    save_file(without, tmp_path / "without.safetensors")
    for base in ("wider", "without"):
        with pytest.raises(ValueError, match="it has another kind of VAE"):
            merge_decoder(trained, tmp_path / f"{base}.safetensors", tmp_path / "new.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="already exists"):
        merge_decoder(trained, folder, tmp_path / "taken")
    assert not (tmp_path / "new.safetensors").exists()


def test_a_copy_that_differs_in_more_is_noticed(trained, single, tmp_path, monkeypatch):
    """The base is exchanged between the writing and the comparison."""
    base, write = tmp_path / "base.safetensors", vae_export._write
    shutil.copy(single, base)

    def write_and_exchange(*arguments):
        write(*arguments)
        tensors = load_file(base)
        tensors["first_stage_model.quant_conv.bias"] += 1
        save_file(tensors, base)

    monkeypatch.setattr(vae_export, "_write", write_and_exchange)
    with pytest.raises(ValueError, match=r"more than the decoder, for example in first_stage_model\.quant_conv\.bias"):
        merge_decoder(trained, base, tmp_path / "new.safetensors")


def test_the_vae_alone(trained, folder, single, tmp_path):
    save_vae(trained, tmp_path / "vae")
    torch.testing.assert_close(decoded(load_vae(tmp_path / "vae")), decoded(trained), rtol=0, atol=0)
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert config["scaling_factor"] == 0.13025
    assert [is_whole(path) for path in (folder, single, tmp_path / "vae")] == [True, True, False]
    assert not is_whole(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
