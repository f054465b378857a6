"""Put every fault of ``faults.py`` into a copy of the repository and see whether a test fails.

    python tests/mutation/replay.py [--jobs N] [WORD ...]

WORD chooses the faults whose place or text contains it.  Prints those that no test notices, and the score.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(0, str(Path(__file__).resolve().parent))
from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", "*.egg-info", "__pycache__", ".*_cache", "build", "dist")
MINUTES = 15  # for the tests of one fault: a loop without end is noticed as well


def place_of(fault: Fault, root: Path = ROOT) -> Path:
    """The one file that holds the fault's text.

    Raises:
        LookupError: no file does, or it occurs more than once.
    """
    where = root / fault.where
    files = [where] if where.is_file() else sorted(where.rglob("*.py"))
    counts = {file: file.read_text(encoding="utf-8").count(fault.old) for file in files}
    if sum(counts.values()) != 1:
        raise LookupError(f"{fault.where}: {fault.old!r} occurs {sum(counts.values())} times")
    return max(counts, key=counts.get)


def is_noticed(fault: Fault, root: Path) -> bool:
    """True if a test fails on a copy of the repository that has the fault."""
    file = place_of(fault, root)
    original = file.read_text(encoding="utf-8")
    file.write_text(original.replace(fault.old, fault.new), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
            + [f"tests/{test}" for test in fault.tests],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root.parent), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60 * MINUTES,
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        file.write_text(original, encoding="utf-8")
    if done.returncode not in (0, 1, 2):  # passed, failed, could not even be imported
        raise RuntimeError(f"pytest ended with {done.returncode} on {fault}")
    return done.returncode != 0


def main() -> None:
    """Replay the chosen faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    faults = [f for f in FAULTS if not chosen.words or any(word in f.where + f.old for word in chosen.words)]
    begun, missed, copies = time.perf_counter(), [], SimpleQueue()

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(chosen.jobs) as pool:
        for job in range(chosen.jobs):
            root = Path(folder) / str(job) / "ztsnr"  # under this name it is imported
            shutil.copytree(ROOT, root, ignore=LEFT_OUT)
            copies.put(root)

        def replay(fault: Fault) -> bool:
            root = copies.get()
            try:
                return is_noticed(fault, root)
            finally:
                copies.put(root)

        for fault, noticed in zip(faults, pool.map(replay, faults), strict=True):
            if not noticed:
                missed.append(fault)
                print(f"missed: {fault.where}: {fault.old!r} -> {fault.new!r}", flush=True)
    score = 1 - len(missed) / len(faults)
    print(f"{len(faults) - len(missed)} of {len(faults)} faults noticed ({score:.1%}) in "
          f"{time.perf_counter() - begun:.0f} s")  # fmt: skip
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
