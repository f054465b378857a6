"""States on disk: whole or not at all.  What many processes write and read is in test_parallel.py."""

import json
import os
import re
import signal

import pytest
import torch

from ztsnr.training.run_state import RunStates
from ztsnr.world import World

from ..small_files import error_under_limit

WORLD = World(0, 1, 1, torch.device("cpu"))


def make_tensors(seed=0):
    random = torch.Generator().manual_seed(seed)
    return {
        "parameter.conv": torch.randn(4, 3, 3, 3, generator=random).to(memory_format=torch.channels_last),
        "parameter.half": torch.randn(5, generator=random).bfloat16(),
        "optimizer.step": torch.tensor(float(seed)),
        "average.step": torch.tensor(seed),
        "optimizer.codes": torch.randint(0, 255, (7,), generator=random, dtype=torch.uint8),
        "bands": torch.randn(3, 2, generator=random, dtype=torch.float64),
        "parameter.large": torch.randn(10_000, generator=random),
    }


def make_states(folder, keep=2, keep_every=0):
    return RunStates(folder / "states", keep, keep_every, WORLD)


def listing(states):
    return sorted(path.name for path in states.folder.iterdir())


def assert_reads(states, step, seed):
    """The state at this step is that of this seed, as tensors and as numbers."""
    path = states.paths()[step]
    into = {name: torch.zeros_like(tensor) for name, tensor in make_tensors().items()}
    states.read_into(path, into)
    for name, tensor in make_tensors(seed).items():
        assert torch.equal(into[name], tensor)
    assert states.read_json(path) == {"step": step, "epoch": seed}


def test_round_trip(tmp_path):
    states = make_states(tmp_path)
    assert states.paths() == {}
    path = states.write(7, make_tensors(3), {"epoch": 3})
    assert path == tmp_path / "states" / "step-00000007"
    assert_reads(states, 7, 3)
    assert not any(file.suffix in (".pt", ".distcp", ".pkl") for file in path.iterdir())


def test_what_is_kept(tmp_path):
    """The last two, and every tenth."""
    states = make_states(tmp_path, keep=2, keep_every=10)
    expected = {5: [5], 10: [5, 10], 15: [10, 15], 20: [10, 15, 20], 25: [10, 20, 25], 30: [10, 20, 25, 30]}
    for step, kept in {**expected, 35: [10, 20, 30, 35]}.items():
        states.write(step, make_tensors(step), {"epoch": step})
        assert list(states.paths()) == kept
    for step in kept:
        assert_reads(states, step, step)


@pytest.fixture
def small_disk(mount_disk):
    """A file system of its own, on which one state has room and two have not."""
    return mount_disk("80k")


def test_full_disk(small_disk):
    states = make_states(small_disk)
    states.write(1, make_tensors(1), {"epoch": 1})
    with pytest.raises(ValueError, match=r"^the state at step 2 could not be written: .*(No space|os error 28)"):
        states.write(2, make_tensors(2), {"epoch": 2})
    assert listing(states) == ["step-00000001"]
    assert_reads(states, 1, 1)


def test_too_large_a_file(tmp_path):
    states = make_states(tmp_path)
    states.write(1, make_tensors(1), {"epoch": 1})
    error = error_under_limit(20_000, lambda: states.write(2, make_tensors(2), {"epoch": 2}))
    assert re.match(r"the state at step 2 could not be written: .*(File too large|error 27)", str(error))
    assert listing(states) == ["step-00000001"]
    states.write(2, make_tensors(2), {"epoch": 2})
    assert_reads(states, 1, 1)
    assert_reads(states, 2, 2)


def in_a_child(work):
    """Do something in a process of its own; what signal ended it."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_killed_while_writing(tmp_path, monkeypatch):
    """Between the tensors and the numbers: what there was stays, and the next write tidies up."""
    states = make_states(tmp_path)
    states.write(1, make_tensors(1), {"epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
        assert in_a_child(lambda: states.write(2, make_tensors(2), {"epoch": 2})) == signal.SIGKILL
    (left,) = set(listing(states)) - {"step-00000001"}
    assert re.fullmatch(r"\.step-00000002\.[0-9a-f]{8}\.unfinished", left)
    assert list((states.folder / left).glob("*.safetensors"))
    assert list(states.paths()) == [1]
    states.write(3, make_tensors(3), {"epoch": 3})  # of another step, as after a resume by another schedule
    assert listing(states) == ["step-00000001", "step-00000003"]
    assert_reads(states, 1, 1)


def test_killed_while_removing(tmp_path, monkeypatch):
    states = make_states(tmp_path, keep=1)
    states.write(1, make_tensors(1), {"epoch": 1})
    with monkeypatch.context() as patch:
        rename = os.rename
        patch.setattr("pathlib.Path.rename", lambda a, b: (rename(a, b), os.kill(os.getpid(), signal.SIGKILL)))
        assert in_a_child(lambda: states.write(2, make_tensors(2), {"epoch": 2})) == signal.SIGKILL
    assert listing(states) == [".step-00000001.removed", "step-00000002"]
    assert_reads(states, 2, 2)
    states.write(3, make_tensors(3), {"epoch": 3})
    assert listing(states) == ["step-00000003"]


def test_a_folder_without_numbers_is_no_state(tmp_path):
    states = make_states(tmp_path)
    (states.folder / "step-00000009").mkdir(parents=True)
    (states.folder / "step-00000009" / "junk").touch()
    assert states.paths() == {}
    states.write(9, make_tensors(9), {"epoch": 9})
    assert_reads(states, 9, 9)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"optimizer.exp": torch.zeros(3)}, r"lacks optimizer\.exp, one of 1 tensors"),
        ({"bands": None}, r"has bands, one of 1 tensors"),
        ({"bands": torch.zeros(3, 4, dtype=torch.float64)}, r"bands of shape \(3, 2\) .* this run's is \(3, 4\)"),
        ({"parameter.half": torch.zeros(5)}, r"parameter\.half of shape \(5,\) in torch\.bfloat16 .* torch\.float32"),
    ],
)
def test_other_tensors(tmp_path, change, sentence):
    states = make_states(tmp_path)
    path = states.write(1, make_tensors(1), {"epoch": 1})
    tensors = {name: tensor for name, tensor in (make_tensors() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=sentence + ".*: resume with the model, optimizer, trained parameters"):
        states.read_into(path, tensors)


def test_damaged_files(tmp_path):
    states = make_states(tmp_path)
    path = states.write(1, make_tensors(1), {"epoch": 1})
    (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json cannot be read: .*; remove it to resume"):
        states.read_json(path)
    (file,) = path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"step-00000001 cannot be read: .*; remove it to resume"):
        states.read_into(path, make_tensors())
    file.unlink()
    with pytest.raises(ValueError, match="one of 7 tensors"):
        states.read_into(path, make_tensors())
