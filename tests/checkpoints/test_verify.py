"""Sound and unsound checkpoints, and what changed between two."""

import hashlib
import json
import math
import struct

import diffusers
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from ztsnr.checkpoints import forward, to_single_file, verify
from ztsnr.checkpoints.header import BITS
from ztsnr.checkpoints.verify import AT_ONCE, verify_checkpoint
from ztsnr.cli import main

from ..tiny_pipelines import make_tiny_sdxl

UNKNOWN = "No published model has this architecture, so missing tensors may go unnoticed."


def tensors(**changes):
    generator = torch.Generator().manual_seed(0)
    made = {
        "a.weight": torch.randn(4, 3, generator=generator),
        "a.bias": torch.randn(4, generator=generator).half(),
        "b.weight": torch.randn(2, 2, generator=generator).bfloat16(),
        "scale": torch.tensor(1.0),
        "position_ids": torch.arange(5),
    }
    return made | changes


def save(path, metadata=None, **changes):
    save_file({name: tensor for name, tensor in tensors(**changes).items() if tensor is not None}, path, metadata)
    return path


def test_a_sound_file(tmp_path):
    report = verify_checkpoint(save(tmp_path / "a.safetensors"))
    assert report.sound
    assert report.tensors == 5
    assert report.remarks == (UNKNOWN,)
    assert report.changes is None
    assert "No problem" in str(report)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("place", [0, 17, AT_ONCE - 1, AT_ONCE, -1])
def test_values_that_are_not_finite(tmp_path, bad, dtype, place):
    weight = torch.linspace(-3, 3, AT_ONCE + 18).to(dtype)
    weight[place] = bad
    report = verify_checkpoint(save(tmp_path / "a.safetensors", **{"a.weight": weight.view(-1, 2)}))
    assert report.problems == ("Weights hold NaN or infinite values: 'a.weight'.",)


def test_nan_of_the_type_that_has_no_infinity(tmp_path):
    weight = torch.tensor([[1, math.nan], [2, 3]]).to(torch.float8_e4m3fn)
    report = verify_checkpoint(
        save(tmp_path / "a.safetensors", **{"a.weight": weight, "scale": torch.tensor(math.nan)})
    )
    assert sorted(report.problems) == [
        "Vectors hold NaN or infinite values: 'scale'.",
        "Weights hold NaN or infinite values: 'a.weight'.",
    ]


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32),
        *(torch.int64, torch.uint16, torch.uint32, torch.uint64),
    ],
)
def test_weights_of_one_value(tmp_path, dtype):
    other = torch.ones(4, 3)
    other[3, 2] = 0
    changes = {
        "a.weight": torch.zeros(4, 3).to(dtype),
        "b.weight": torch.ones(2, 1, 3, 3).to(dtype),
        "c.weight": other.to(dtype),
        "d.weight": torch.zeros(1, 1).to(dtype),  # cannot be but constant
        "e.weight": torch.zeros(0, 4).to(dtype),
    }
    report = verify_checkpoint(save(tmp_path / "a.safetensors", **changes))
    assert report.problems == (
        "Weights are zero throughout: 'a.weight'.",
        "Weights hold one value throughout: 'b.weight'.",
    )
    assert report.remarks == (UNKNOWN,)


def test_a_difference_in_the_last_of_many_numbers(tmp_path):
    weight = torch.ones(3, AT_ONCE)
    assert not verify_checkpoint(save(tmp_path / "a.safetensors", **{"a.weight": weight})).sound
    weight[-1, -1] = 2
    assert verify_checkpoint(save(tmp_path / "a.safetensors", **{"a.weight": weight})).sound


def test_vectors_of_one_value_are_noted(tmp_path):
    report = verify_checkpoint(save(tmp_path / "a.safetensors", **{"a.bias": torch.ones(4), "norm": torch.zeros(8)}))
    assert report.sound  # fresh norms and biases are like that
    assert report.remarks == (
        UNKNOWN,
        "Vectors hold one value throughout: 'a.bias'.",
        "Vectors are zero throughout: 'norm'.",
    )


def test_layers_of_a_lora_that_were_not_trained_are_noted(tmp_path):
    name = "lora_unet_input_blocks_4_1_proj_in.lora_{}.weight".format
    lora = {name("down"): torch.randn(4, 8), name("up"): torch.zeros(8, 4)}
    save_file(lora, tmp_path / "a.safetensors")
    report = verify_checkpoint(tmp_path / "a.safetensors")
    assert report.sound
    assert report.remarks == (f"Weights are zero throughout: {name('up')!r}.",)
    save_file(lora | {name("up"): torch.full((8, 4), math.nan)}, tmp_path / "a.safetensors")
    assert not verify_checkpoint(tmp_path / "a.safetensors").sound


def test_a_model_that_is_not_whole(tmp_path):
    """As small as a file can be that is taken for SD 1.x."""
    generator = torch.Generator().manual_seed(0)
    prefix = "model.diffusion_model."
    shapes = {
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (320,),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "out.2.weight": (4, 320, 3, 3),
    }
    there = {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(there, tmp_path / "a.safetensors")
    report = verify_checkpoint(tmp_path / "a.safetensors")
    (problem,) = report.problems
    assert problem.startswith("SD 1.x U-Net: 682 of 686 tensors are missing or have another shape: ")
    assert f"Problem: {problem}" in str(report)


# ----------------------------------------------------------------------------------------------------------------------
# The header


def test_the_hash(tmp_path):
    plain = save(tmp_path / "plain.safetensors")
    content = plain.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    digest = hashlib.sha256(content[8 + length :]).hexdigest()
    right = save(tmp_path / "right.safetensors", {"modelspec.hash_sha256": f"0x{digest}"})
    assert verify_checkpoint(right).sound
    wrong = save(tmp_path / "wrong.safetensors", {"modelspec.hash_sha256": f"0x{digest[::-1]}"})
    (problem,) = verify_checkpoint(wrong).problems
    assert digest in problem


def write(path, entries, pad=0):
    """A file of these (name, dtype, shape, bytes), its data pad bytes behind a multiple of 8."""
    content, end = {}, 0
    for name, dtype, shape, data in entries:
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    header = json.dumps(content).encode()
    header += b" " * (-len(header) % 8 + pad)
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(data for *_, data in entries))
    return path


def test_the_hash_is_of_the_bytes_in_their_order(tmp_path):
    """Whatever the order of the names in the header."""
    path = write(tmp_path / "a.safetensors", [("z", "U8", [3], b"abc"), ("a", "U8", [2], b"de")])
    content = json.loads(path.read_bytes()[8:-5])
    content = {
        "__metadata__": {"modelspec.hash_sha256": hashlib.sha256(b"abcde").hexdigest().upper()},
        "a": content["a"],
        "z": content["z"],
    }
    header = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"abcde")
    assert verify_checkpoint(path).sound
    path.write_bytes(path.read_bytes()[:-1] + b"f")
    assert not verify_checkpoint(path).sound


def test_the_hash_of_onetrainer_is_of_the_names_in_their_order(tmp_path):
    path = write(tmp_path / "a.safetensors", [("z", "U8", [3], b"abc"), ("a", "U8", [2], b"de")])
    content = json.loads(path.read_bytes()[8:-5])
    content["__metadata__"] = {"modelspec.hash_sha256": f"0x{hashlib.sha256(b'deabc').hexdigest()}"}
    header = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"abcde")
    assert verify_checkpoint(path).sound
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"abcdf")
    assert not verify_checkpoint(path).sound


def test_numbers_at_odd_places_are_noted(tmp_path):
    number, text = struct.pack("<f", 1.5), b"abc"
    sound = [("number", "F32", [1], number), ("text", "U8", [3], text), ("mark", "F32", [0], b"")]
    assert verify_checkpoint(write(tmp_path / "a.safetensors", sound)).remarks == (UNKNOWN,)
    for entries, pad in ((sound, 2), ([sound[1], sound[0]], 0)):
        _, remark = verify_checkpoint(write(tmp_path / "a.safetensors", entries, pad)).remarks
        assert "not aligned to the size of their numbers" in remark
        assert remark.endswith(": 'number'.")


@pytest.mark.parametrize("dtype", BITS)
def test_every_type_is_read_or_said_not_to_be(tmp_path, dtype):
    """Some of them PyTorch has not."""
    data = bytes(i % 251 for i in range(8 * BITS[dtype]))
    path = write(tmp_path / "a.safetensors", [("a", dtype, [8, 8], data)])
    other = write(tmp_path / "b.safetensors", [("a", dtype, [8, 8], data[::-1])])
    report = verify_checkpoint(path, other)
    assert report.tensors == 1
    assert len(report.changes) == 1
    known = dtype not in ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "C64")
    assert ("Weights have types whose numbers are not checked: 'a'." in report.remarks) == (not known)
    assert verify_checkpoint(path, path).changes == ()


def test_changes_against_another(tmp_path):
    before = save(tmp_path / "before.safetensors")
    weight = tensors()["a.weight"].clone()
    weight[0, 0] += 0.5
    after = save(
        tmp_path / "after.safetensors",
        **{"a.weight": weight, "b.weight": None, "c": torch.ones(2), "a.bias": tensors()["a.bias"].float()},
    )
    report = verify_checkpoint(after, before)
    (change,) = report.changes  # the bias only changed its type
    assert change.name == "a.weight"
    assert change.largest == pytest.approx(0.5)
    assert change.relative == pytest.approx(0.5 / tensors()["a.weight"].norm().item())
    assert report.only_here == ("c",)
    assert report.only_there == ("b.weight",)
    assert verify_checkpoint(before, before).changes == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measures_of_a_change(tmp_path, dtype):
    """Of a tensor that is read in several pieces, against the formula."""
    weight = torch.randn(5, AT_ONCE // 2, generator=torch.Generator().manual_seed(0))
    before = save(tmp_path / "before.safetensors", **{"a.weight": weight})
    weight = weight.to(dtype)
    weight[1, 7] += 9  # the largest is in the first piece
    weight[4] *= 1.5
    (change,) = verify_checkpoint(save(tmp_path / "after.safetensors", **{"a.weight": weight}), before).changes
    there = load_file(before)["a.weight"].double()
    difference = weight.double() - there
    assert change.relative == pytest.approx((difference.norm() / there.norm()).item())
    assert change.largest == difference.abs().max().item() > 8


def test_another_shape_is_a_change_beyond_measure(tmp_path):
    before = save(tmp_path / "before.safetensors")
    after = save(tmp_path / "after.safetensors", **{"a.bias": torch.randn(5)})
    assert verify_checkpoint(after, before).changes[0].relative == math.inf


def test_a_folder(tmp_path):
    folder = make_tiny_sdxl(tmp_path / "tiny")
    report = verify_checkpoint(folder, folder)
    assert report.sound
    assert report.changes == ()
    assert report.only_here == report.only_there == ()


def test_text_encoders_that_transformers_4_refuses_are_noted(tmp_path):
    folder = make_tiny_sdxl(tmp_path / "tiny")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(unet), unet, {"title": "mine"})  # diffusers does not mind
    for metadata, noted in (({"format": "pt"}, False), (None, False), ({"title": "mine"}, True)):
        save_file(tensors, file, metadata)
        assert any("transformers 4" in remark for remark in verify_checkpoint(folder).remarks) == noted


def test_a_folder_with_two_versions_of_a_network(tmp_path):
    folder = make_tiny_sdxl(tmp_path / "tiny")
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(plain).items()}
    before = verify_checkpoint(folder)
    tensors["conv_out.bias"][0] = math.nan
    save_file(tensors, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    report = verify_checkpoint(folder)
    assert report.tensors == before.tensors + len(tensors)
    assert report.problems == (
        "Vectors hold NaN or infinite values: 'unet/diffusion_pytorch_model.fp16.safetensors: conv_out.bias'.",
    )
    plain.unlink()  # one version has the plain names, so that it can be compared
    assert verify_checkpoint(folder).problems == ("Vectors hold NaN or infinite values: 'unet.conv_out.bias'.",)


def test_a_folder_in_parts_is_the_same(tmp_path):
    folder = make_tiny_sdxl(tmp_path / "tiny")
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    report = verify_checkpoint(tmp_path / "parts", folder)
    assert report.sound
    assert (report.changes, report.only_here, report.only_there) == ((), (), ())


def test_latents_that_are_scaled_differently_are_noted(tmp_path):
    """No tensor shows it, and pictures have other colours."""
    folder, file = make_tiny_sdxl(tmp_path / "folder"), tmp_path / "a.safetensors"
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    factor = config["scaling_factor"]
    path.write_text(json.dumps(config | {"latents_mean": [0.1] * 4, "latents_std": [0.7 * factor, 1.1, 1.3, 0.9]}))
    to_single_file(folder, file)
    assert not any("scaled" in remark for remark in verify_checkpoint(file, folder).remarks)
    path.write_text(json.dumps(config | {"latents_mean": [0.1] * 4, "latents_std": [0.6 * factor, 1.1, 1.3, 0.9]}))
    report = verify_checkpoint(file, folder)
    assert report.changes == ()
    (remark,) = (remark for remark in report.remarks if "scaled" in remark)
    assert remark.startswith("Latents are scaled differently: here by mean 0.1, 0.1, 0.1, 0.1, std 0.7, ")
    path.write_text(json.dumps(config))
    assert any(
        remark.endswith("in the other checkpoint as published.") for remark in verify_checkpoint(file, folder).remarks
    )


def test_a_file_and_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "CHUNK", 4096)  # that queries, keys and values come in other pieces than stacked
    folder = make_tiny_sdxl(tmp_path / "tiny")
    file = tmp_path / "tiny.safetensors"
    to_single_file(folder, file)
    for path, other in ((file, folder), (folder, file)):
        report = verify_checkpoint(path, other)
        assert (report.changes, report.only_here, report.only_there) == ((), (), ())
    changed = load_file(file)
    name = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    changed[name][-1, -1] += 1
    del changed["first_stage_model.quant_conv.bias"]
    save_file(changed, file)
    report = verify_checkpoint(file, folder)
    (change,) = report.changes
    assert (change.name, change.largest) == (name, pytest.approx(1))
    assert (report.only_here, report.only_there) == ((), ("first_stage_model.quant_conv.bias",))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    report = verify_checkpoint(file, folder)
    assert report.changes is None
    assert any("cannot be compared with" in problem for problem in report.problems)


def test_running_it(tmp_path, monkeypatch):
    """What is run and compared is in test_forward.py."""
    monkeypatch.setattr(forward, "find_comfyui", lambda: None)
    folder = make_tiny_sdxl(tmp_path / "tiny")
    file = tmp_path / "tiny.safetensors"
    to_single_file(folder, file)
    result = CliRunner().invoke(main, ["verify", str(file), str(folder), "--run"])
    assert result.exit_code == 0
    assert "0 tensors differ" in result.stdout
    assert "Run in diffusers, tiny: prediction is the same." in result.stdout
    changed = load_file(file)
    changed["model.diffusion_model.out.2.bias"] += 1
    save_file(changed, file, {"modelspec.prediction_type": "v"})
    result = CliRunner().invoke(main, ["verify", str(folder), str(file), "--run"])
    assert result.exit_code == 1
    assert "Problem: diffusers, tiny.safetensors: prediction differs by " in result.stdout
    result = CliRunner().invoke(main, ["verify", str(file), "--run"])
    assert result.exit_code == 2
    assert "there is nothing to compare" in result.stderr
    result = CliRunner().invoke(main, ["verify", str(file), "--config", str(folder)])
    assert result.exit_code == 2
    assert "--config and --comfyui need --run" in result.stderr


def test_the_command(tmp_path):
    good = save(tmp_path / "good.safetensors")
    bad = save(tmp_path / "bad.safetensors", **{"a.weight": torch.full((4, 3), math.nan)})
    result = CliRunner().invoke(main, ["verify", str(good), str(good)])
    assert result.exit_code == 0
    assert "0 tensors differ" in result.stdout
    result = CliRunner().invoke(main, ["verify", str(bad)])
    assert result.exit_code == 1
    assert "Problem" in result.stdout
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-4])
    result = CliRunner().invoke(main, ["verify", str(cut)])
    assert result.exit_code == 2
    assert "incomplete" in result.stderr
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}).encode()
    cut.write_bytes(struct.pack("<Q", len(header)) + header)
    assert CliRunner().invoke(main, ["verify", str(cut)]).exit_code == 2
