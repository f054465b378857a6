"""The faults that ``replay.py`` puts in can still be put in, and name tests that exist."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import replay
from faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.where}: {fault.old[:40]}")
def test_a_fault_has_its_place(fault):
    file = replay.place_of(fault)
    assert fault.new != fault.old
    compile(file.read_text(encoding="utf-8").replace(fault.old, fault.new), str(file), "exec")
    for test in fault.tests:
        assert (replay.ROOT / "tests" / test).exists()


def test_there_are_enough():
    assert len(FAULTS) >= 150
    assert len({(fault.where, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


def test_a_text_that_is_not_there_is_told():
    with pytest.raises(LookupError, match="occurs 0 times"):
        replay.place_of(replay.Fault("canvas.py", "no such text", "", ()))
