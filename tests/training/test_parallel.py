"""Real processes, joined by gloo, train what one process trains at the same global batch.

The slow tests have torchrun start them; the others save the time of its imports (``forked_ranks``).
"""

import re
import shutil

import pytest
import torch
from torch.cuda._utils import _get_device_index
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from ztsnr.world import start_world

from .forked_ranks import in_processes
from .tiny_run import difference, make_content, metrics, states, train, under_torchrun

CLOSE = 1e-6  # relative, of every step's loss in float32
PARTS = {"optimizer__accumulation": 2, "save_every": 3}
MUCH = {
    "stages": [{"groups": ["up"], "steps": 3, "learning_rate": 0.5}, {"groups": ["all"]}],
    "objective__weighting": "learned",
    "model__text_encoders": True,
    "average__decay": 0.9,
    "watch__validate_every": 2,  # with an average in place of the weights, and back
    "watch__preview_every": 4,
    "data__validation_share": 0.2,
}
STEPS = 6
RUNS = ("whole", "parts", "bad")


def once(place, folder, **changes):
    """The run of one process, made if no test has made it."""
    out = folder / "one"
    if not out.exists():
        train(make_content(place, out, steps=STEPS, **changes))
    return out


@pytest.fixture(scope="module")
def parts(place, tmp_path_factory):
    return once(place, tmp_path_factory.mktemp("parts"), **PARTS)


@pytest.fixture(scope="module")
def much(place, tmp_path_factory):
    return once(place, tmp_path_factory.mktemp("much"), **MUCH)


def tensors(out, step):
    """The tensors in a state of a run, whole, however many processes have written it."""
    path = str(out / "states" / f"step-{step:08d}")
    found = HuggingFaceStorageReader(path).read_metadata().state_dict_metadata
    rows = {name: torch.zeros(about.size, dtype=about.properties.dtype) for name, about in found.items()}
    load(rows, storage_reader=HuggingFaceStorageReader(path), no_dist=True)
    return rows


def assert_close_averages(out, other):
    """To a hundredth of the learning rate, and nearly all of them much closer: where a gradient is nothing but
    rounding, Adam makes a step of full length of it."""
    ours, theirs = tensors(out, STEPS), tensors(other, STEPS)
    assert ours.keys() == theirs.keys()
    names = [name for name in theirs if name.startswith("average.")]
    apart = torch.cat([(ours[name] - theirs[name]).double().abs().flatten() for name in names])
    assert apart.quantile(0.99) < 1e-6
    assert apart.max() < 5e-3


def assert_close_metrics(out, other):
    """Losses by bands of timesteps, validation and previews too."""
    for ours, theirs in zip(metrics(out), metrics(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def check(out, other):
    print(f"{out.name}: {difference(out, other):.2e}")  # shown with -s
    assert difference(out, other) <= CLOSE
    assert_close_metrics(out, other)
    assert_close_averages(out, other)


def jobs_of(place, folder, strategies, **changes):
    return [
        {"content": make_content(place, folder / strategy, steps=STEPS, speed__strategy=strategy, **changes)}
        for strategy in strategies
    ]


def halfway(run, out):
    """The folder of a run as it was when half of its steps were done."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "states" / f"step-{STEPS:08d}")


@pytest.mark.parametrize(
    ("changed", "start"), [("fsdp", in_processes), pytest.param("ddp", under_torchrun, marks=pytest.mark.slow)]
)
def test_two_processes(place, tmp_path, parts, changed, start):
    """With accumulation; and a run goes from one process to two, and from two to one."""
    jobs = jobs_of(place, tmp_path, ["ddp", "fsdp"], **PARTS)
    to_two, to_one = tmp_path / "to two", tmp_path / "to one"
    halfway(parts, to_two)
    content = make_content(place, to_two, steps=STEPS, speed__strategy=changed, **PARTS)
    start([*jobs, {"content": content, "resume": True}], 2, tmp_path)
    halfway(tmp_path / changed, to_one)
    train(make_content(place, to_one, steps=STEPS, **PARTS), resume=True)
    for run in (tmp_path / "ddp", tmp_path / "fsdp", to_two, to_one):
        check(run, parts)


@pytest.mark.slow
def test_stopped_and_poisoned(place, tmp_path):
    """A signal to one process stops all, and they go on to the last bit; one's bad batch is left out by all."""
    jobs = []
    for strategy in ("ddp", "fsdp"):
        changes = {"steps": STEPS, "speed__strategy": strategy, **MUCH, "save_every": 100}
        whole, parts, bad = (make_content(place, tmp_path / f"{strategy} {name}", **changes) for name in RUNS)
        jobs += [{"content": whole}, {"content": parts, "stopped": 3}, {"content": parts, "resume": True}]
        few = bad["optimizer"] | {"max_skipped": 2}
        jobs.append({"content": {**bad, "optimizer": few, "save_every": 1, "keep": 9}, "poisoned": [2]})
        jobs.append({"content": {**bad, "optimizer": few, "out": bad["out"] + " 2"}, "poisoned": [3, 4]})
        jobs[-1]["raises"] = "not finite in 2 steps in a row, up to step 4"
    under_torchrun(jobs, 2, tmp_path)
    for strategy in ("ddp", "fsdp"):
        whole, parts, bad = (tmp_path / f"{strategy} {name}" for name in RUNS)
        assert states(parts) == [4, STEPS]
        ours, theirs = tensors(parts, STEPS), tensors(whole, STEPS)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        before, behind = tensors(bad, 2), tensors(bad, 3)
        same = [name for name in before if name.startswith(("parameter.", "optimizer."))]
        assert [name for name in same if not torch.equal(before[name], behind[name])] == []
        assert len(list((bad / "bad_batches").iterdir())) == 2  # of each process


@pytest.fixture
def two_gpus(monkeypatch):
    """Stand-ins for two GPUs, and what the current one was set to, which torch's own function has looked at."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(_get_device_index(device)))
    return current


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_one_process_on_a_gpu(two_gpus, device, index):
    with start_world(device) as world:
        assert world.device == torch.device("cuda", index)
    assert two_gpus == [index]


@pytest.mark.parametrize(
    ("device", "processes", "sentence"),
    [
        ("cuda:1", 4, "speed.device = 'cuda:1' names one device for 4 processes: leave out the number"),
        ("auto", 4, "the device cuda:3 cannot be used: this machine has 2 GPUs, numbered from 0"),
        ("cuda:2", 1, "the device cuda:2 cannot be used: this machine has 2 GPUs, numbered from 0"),
    ],
)
def test_gpus_that_are_not_there(two_gpus, monkeypatch, device, processes, sentence):
    for name, number in (("WORLD_SIZE", processes), ("RANK", processes - 1), ("LOCAL_RANK", processes - 1)):
        monkeypatch.setenv(name, str(number))
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"), start_world(device):
        pass
    assert two_gpus == []


def test_what_one_process_knows_ends_both(place, tmp_path):
    """The one that waits for it too; and the run after it is a run as any other."""
    broken, plain = (make_content(place, tmp_path / name, steps=2) for name in ("broken", "plain"))
    first = {"content": broken, "broken": 1, "raises": "^what one process alone knows$"}
    in_processes([first, {"content": plain}], 2, tmp_path)
    assert states(tmp_path / "plain") == [2]


def test_pictures_that_cannot_be_read_end_both_behind_a_saved_state(place, tmp_path):
    """Each reads its own share of a step, so one of them has too many first."""
    pictures = shutil.copytree(place / "pictures", tmp_path / "pictures")
    for path in sorted(pictures.glob("*.png"))[:20]:
        path.write_bytes(path.read_bytes()[:60])
    changes = {"data__sources": [{"path": str(pictures)}], "steps": 40, "save_every": 100, "data__max_unusable": 0.01}
    content = make_content(place, tmp_path / "run", **changes)
    under_torchrun([{"content": content, "raises": "more than data.max_unusable = 0.01 allows"}], 2, tmp_path)
    assert len(states(tmp_path / "run")) == 1


def test_no_room_for_a_snapshot_of_shares(place, tmp_path):
    """The first process, which writes, says so; the other one, which sends its shares, does not wait for ever."""
    content = make_content(
        place, tmp_path / "run", steps=4, save_every=100, speed__strategy="fsdp", average__snapshots=2
    )
    job = {"content": content, "small_files": 2, "raises": "^the state at step 4 could not be written"}
    said = in_processes([job], 2, tmp_path)
    assert re.search(r"a snapshot of step 4 could not be written: .*File too large; training continues", said)
    (path,) = (tmp_path / "run" / "snapshots").iterdir()
    assert path.name == "power_0.05-step-00000002.safetensors"


@pytest.mark.slow
def test_two_processes_with_much(place, tmp_path, much):
    """Stages, text encoders, a learned weight, averages, validation and previews."""
    under_torchrun(jobs_of(place, tmp_path, ["ddp", "fsdp"], **MUCH), 2, tmp_path)
    for strategy in ("ddp", "fsdp"):
        check(tmp_path / strategy, much)


@pytest.mark.slow
def test_four_processes(place, tmp_path, parts, much):
    for folder, changes, other in (("parts", PARTS | {"optimizer__accumulation": 1}, parts), ("much", MUCH, much)):
        (tmp_path / folder).mkdir()
        under_torchrun(jobs_of(place, tmp_path / folder, ["ddp", "fsdp"], **changes), 4, tmp_path / folder)
        for strategy in ("ddp", "fsdp"):
            check(tmp_path / folder / strategy, other)


@pytest.mark.slow
def test_two_machines_of_two(place, tmp_path, parts, much):
    """hsdp: two groups that torchrun takes for two machines; each has all weights, in two shares."""
    batch_of_eight = {"data__batch_size": 8}
    one = once(place, tmp_path, **PARTS, **batch_of_eight)
    jobs = [
        {"content": make_content(place, tmp_path / name, steps=STEPS, speed__strategy="hsdp", **changes)}
        for name, changes in (("parts", PARTS | batch_of_eight), ("much", MUCH))
    ]
    under_torchrun(jobs, 4, tmp_path, machines=2)
    check(tmp_path / "parts", one)
    check(tmp_path / "much", much)
