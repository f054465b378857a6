"""Lists of many processes read as one, and when the pictures on them are too many."""

import subprocess
import sys

import numpy as np
import pytest

from ztsnr.data.epoch_plan import EpochPlan
from ztsnr.data.quarantine import ALLOWED, FEW, Quarantine, UnusableShare

PROGRAM = """
import sys
from ztsnr.data.quarantine import Quarantine

quarantine = Quarantine(sys.argv[1])
for i in range(200):
    quarantine.add(f"{sys.argv[2]}/{i}", "it is empty")
    quarantine.add(f"all/{i}", "it is cut short")
"""


def test_what_is_added_is_listed(tmp_path):
    quarantine = Quarantine(tmp_path / "new" / "folder")
    assert quarantine.listed() == {}
    reasons = {'a "b"\n\\.png': "line 1\nline 2", "猫.png": "空", "b.png": "damaged: \udc80", "": ""}
    for key, reason in reasons.items():
        quarantine.add(key, reason)
    assert quarantine.listed() == reasons
    assert Quarantine(tmp_path / "new" / "folder").listed() == reasons


def test_the_first_reason_is_kept(tmp_path):
    quarantine = Quarantine(tmp_path)
    quarantine.add("a", "it is empty")
    quarantine.add("a", "it has vanished")
    assert quarantine.listed() == {"a": "it is empty"}


def test_processes_at_the_same_time(tmp_path):
    running = [subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path, str(i)]) for i in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 3
    expected = {f"{i}/{j}": "it is empty" for i in range(3) for j in range(200)}
    assert Quarantine(tmp_path).listed() == expected | {f"all/{j}": "it is cut short" for j in range(200)}


def test_two_runs_with_one_process_id_have_files_of_their_own(tmp_path):
    for key in "ab":
        Quarantine(tmp_path).add(key, "it is empty")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_line_that_is_being_written_is_none_yet(tmp_path):
    quarantine = Quarantine(tmp_path)
    quarantine.add("a", "it is empty")
    quarantine.add("b", "it is empty")
    path = next(tmp_path.iterdir())
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        assert list(quarantine.listed()) == ["a", "b"][: data[:end].count(b"\n")]


def test_report(tmp_path):
    quarantine = Quarantine(tmp_path)
    for key in "abcde":
        quarantine.add(key, "it is empty")
    assert quarantine.report(2) == (
        f"5 pictures are listed in {tmp_path} (remove it to try them again); the first are a: it is empty; "
        "b: it is empty"
    )


@pytest.mark.parametrize("content", [b"{}\n", b"[]\n", b"3\n", b"a picture\n", b"\xff\n", b'{"picture": 3}\n'])
def test_something_else_is_no_list(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jsonl is not a list of unusable pictures"):
        Quarantine(tmp_path).listed()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"file/lists cannot be made: Not a directory"):
        Quarantine(tmp_path / "file" / "lists")


def test_a_list_that_cannot_be_written(tmp_path):
    quarantine = Quarantine(tmp_path / "lists")
    (tmp_path / "lists").rmdir()
    with pytest.raises(ValueError, match=r"jsonl cannot be written: No such file"):
        quarantine.add("a", "it is empty")


# ----------------------------------------------------------------------------------------------------------------------
# Too many


def make_share(folder, pictures, limit):
    plan = EpochPlan(np.zeros(pictures, int), [(64, 64)], batch_size=1)
    return UnusableShare(plan, Quarantine(folder), limit)


def steps_until_stopped(share, planned, unusable):
    """The step, one for each row of pictures, that is refused; None if none is."""
    shown = np.where(np.isin(planned, unusable), -1, planned)
    for step, rows in enumerate(zip(planned, shown, strict=True)):
        try:
            share.check(*rows)
        except ValueError:
            return step
    return None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [0.0, 0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("pictures", [20, 200, 2000])
def test_stops_at_the_first_step_with_more_than_the_limit(tmp_path, pictures, limit, seed):
    """Two epochs of random order, against counting all from the beginning."""
    random = np.random.default_rng(seed)
    unusable = random.permutation(pictures)[: int(random.uniform(0, 2) * limit * pictures + 1)]
    planned = np.concatenate([random.permutation(pictures) for _ in range(2)])

    found, places = np.unique(planned, return_index=True)  # where each picture is seen first
    ends = np.arange(10, len(planned) + 1, 10)
    seen = np.searchsorted(np.sort(places), ends)
    bad = np.searchsorted(np.sort(places[np.isin(found, unusable)]), ends)
    too_many = np.flatnonzero(bad > np.maximum(limit * np.maximum(seen, min(1000, pictures)), ALLOWED * (limit > 0)))
    expected = too_many[0] if len(too_many) else None
    share = make_share(tmp_path, pictures, limit)
    assert steps_until_stopped(share, planned.reshape(-1, 10), unusable) == expected


def test_one_at_the_beginning_is_not_too_much(tmp_path):
    assert FEW == 1000
    planned = np.arange(5000).reshape(-1, 10)
    assert steps_until_stopped(make_share(tmp_path, 5000, 0.01), planned, range(10)) is None
    assert steps_until_stopped(make_share(tmp_path, 5000, 0.01), planned, range(11)) == 1


def test_a_picture_seen_again_counts_once(tmp_path):
    planned = np.tile(np.arange(100), 50).reshape(-1, 10)
    assert steps_until_stopped(make_share(tmp_path, 100, 0.07), planned, range(7)) is None
    assert steps_until_stopped(make_share(tmp_path, 100, 0.07), planned, [*range(7), 55]) == 5


@pytest.mark.parametrize("pictures", [10, 60, 400])
def test_a_few_in_a_small_set_are_allowed(tmp_path, pictures):
    """One bad picture of 60 is more than 1 %, and no reason to end a run in its middle."""
    assert ALLOWED == 5
    planned = np.arange(pictures).reshape(-1, 10)
    assert steps_until_stopped(make_share(tmp_path, pictures, 0.01), planned, range(5)) is None
    assert steps_until_stopped(make_share(tmp_path, pictures, 0.01), planned, range(6)) == 0
    assert steps_until_stopped(make_share(tmp_path, pictures, 0.0), planned, [3]) == 0  # none is none


def test_many_good_epochs_excuse_nothing(tmp_path):
    share = make_share(tmp_path, 100, 0.01)
    pictures = np.arange(100)
    for _ in range(50):
        share.check(pictures, pictures)
    share.check(pictures, np.where(pictures < 5, 8, pictures))
    with pytest.raises(ValueError, match=r"6 of the 100 pictures seen so far \(6\.00%\)"):
        share.check(pictures, np.where(pictures == 9, 8, pictures))


def test_the_sentence(tmp_path):
    share = make_share(tmp_path, 50, 0.01)
    share.quarantine.add("cats/a.png", "it is empty")
    sentence = (
        r"^6 of the 40 pictures seen so far \(15\.00%\) cannot be used, more than data\.max_unusable = 0\.01 allows: "
        rf"mend or remove them, or raise data\.max_unusable; 1 pictures are listed in {tmp_path} \(.*\); the first are "
        r"cats/a\.png: it is empty$"
    )
    with pytest.raises(ValueError, match=sentence):
        share.check(np.arange(40), np.arange(40) + (np.arange(40) < 6))


@pytest.mark.parametrize("limit", [-0.1, 1.5, float("nan")])
def test_a_limit_that_is_no_share(tmp_path, limit):
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        make_share(tmp_path, 10, limit)
