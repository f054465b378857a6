"""What the checkpoint tools cost: seconds and peak memory beside ``cp`` and beside loading and saving.

    python benchmarks/checkpoints.py [--folder FOLDER] [--gigabytes N] [--runs N]

Works on a file of random tensors in FOLDER, whose disk is what is measured.  Prints the tables and puts them into
benchmarks/RESULTS.md.
"""

import datetime
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click
from sampler_accuracy import RESULTS, machine, markdown, write_section
from tqdm import tqdm

LIMIT = 0.8  # of the speed of cp
MEMORY_LIMIT = 100  # MB
TENSOR = 32 << 20  # numbers in each tensor

# Each way is two pieces of a program of its own, of which the second one is timed.  `source` and `hashed`, which has a
# hash in its metadata, are there; `target` is to be written.
Ways = Mapping[str, tuple[str, str]]
COPY, COPY_TO_DISK, HASH = "cp", "cp, then sync", "mark, hash"
MARK: Ways = {
    COPY: ("import subprocess", 'subprocess.run(["cp", source, target], check=True)'),
    COPY_TO_DISK: (
        "import subprocess",
        'subprocess.run(["cp", source, target], check=True); subprocess.run(["sync", target], check=True)',
    ),
    "mark": (
        "from ztsnr.checkpoints.mark import mark_checkpoint",
        "mark_checkpoint(source, v_pred=True, ztsnr=True, out=target)",
    ),
    HASH: (
        "from ztsnr.checkpoints.mark import mark_checkpoint",
        "mark_checkpoint(hashed, v_pred=True, ztsnr=True, out=target)",
    ),
    "safetensors load_file, save_file": (
        "import torch; from safetensors.torch import load_file, save_file; empty = torch.empty(0)",
        'save_file(load_file(source) | {"v_pred": empty, "ztsnr": empty}, target)',
    ),
}
PROGRAM = """
import sys, time
source, hashed, target = (f"{{sys.argv[1]}}/{{name}}.safetensors" for name in ("source", "hashed", "target"))
{prepare}
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
kilobytes = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, kilobytes)
"""


def write_random_checkpoint(path: Path, nbytes: int, metadata: dict[str, str]) -> None:
    """A U-Net's file of about so many bytes, of random numbers that no file system makes smaller."""
    count = math.ceil(nbytes / (2 * TENSOR))
    header = {"__metadata__": metadata} | {
        f"model.diffusion_model.{i}.weight": {
            "dtype": "F16",
            "shape": [TENSOR],
            "data_offsets": [2 * TENSOR * i, 2 * TENSOR * (i + 1)],
        }
        for i in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as safetensors does
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(count):
            file.write(os.urandom(2 * TENSOR))


def run(way: tuple[str, str], folder: Path) -> tuple[float, float]:
    """Seconds, and peak memory in MB, of one run in a process of its own; what it wrote is removed."""
    prepare, work = way
    os.sync()  # what was written before shall not keep the disk busy
    try:
        command = [sys.executable, "-c", PROGRAM.format(prepare=prepare, work=work), folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        (folder / "target.safetensors").unlink(missing_ok=True)
    seconds, kilobytes = map(float, done.stdout.split())
    return seconds, kilobytes * 1024 / 1e6


def measure(ways: Ways, folder: Path, runs: int) -> dict[str, tuple[float, float]]:
    """Median seconds and largest peak memory of each way, which take turns; a first round warms up."""
    results = {name: [] for name in ways}
    for i in tqdm(range(runs + 1)):
        for name, way in ways.items():
            result = run(way, folder)
            if i:
                results[name].append(result)
    return {
        name: (statistics.median(seconds for seconds, _ in found), max(memory for _, memory in found))
        for name, found in results.items()
    }


def mark_text(results: Mapping[str, tuple[float, float]], nbytes: int, runs: int) -> str:
    rows = [
        [
            f"`{name}`",
            f"{seconds:.2f}",
            f"{nbytes / seconds / 1e9:.2f}",
            *(f"{results[copy][0] / seconds:.2f}" for copy in (COPY, COPY_TO_DISK)),
            "" if name in (COPY, COPY_TO_DISK) else f"{memory:.0f}",
        ]
        for name, (seconds, memory) in results.items()
    ]
    heads = ["way", "s", "GB/s", f"speed over `{COPY}`", f"over `{COPY_TO_DISK}`", "peak MB"]
    verdicts = [
        f"{name} {'reached' if reached else 'missed'}"
        for name, reached in (
            (f"at least {LIMIT} of the speed of `{COPY}`", results[COPY][0] / results["mark"][0] >= LIMIT),
            (f"at least {LIMIT} of that of `{COPY_TO_DISK}`", results[COPY_TO_DISK][0] / results["mark"][0] >= LIMIT),
            (f"at most {MEMORY_LIMIT} MB", max(results[name][1] for name in ("mark", HASH)) <= MEMORY_LIMIT),
        )
    ]
    return (
        f"A file of {nbytes / 1e9:.2f} GB, in the page cache; median seconds and largest memory of {runs} runs each, "
        f"taking turns. `{COPY_TO_DISK}`\nand `mark` return when all is on the disk, the others leave that to the "
        f"system. `{HASH}`: of a file that has the data's\nSHA-256 in its metadata, which is computed again.\nTargets "
        f"of `mark`: {', '.join(verdicts)}.\n\n{markdown([heads, *rows])}\n"
    )


@click.command(help=__doc__.split("\n")[0])
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="On the disk to measure; by default where temporary files go.",
)
@click.option("--gigabytes", type=click.FloatRange(min=0.01), default=2.0, show_default=True, help="Size of the file.")
@click.option("--runs", type=click.IntRange(min=1), default=7, show_default=True, help="Runs of each way.")
@click.option("--write/--no-write", default=True, show_default=True, help="Put the tables into RESULTS.md.")
def main(folder: Path | None, gigabytes: float, runs: int, write: bool) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        source = Path(name) / "source.safetensors"
        write_random_checkpoint(source, int(gigabytes * 1e9), {})
        hashed = source.with_name("hashed.safetensors")
        write_random_checkpoint(hashed, int(gigabytes * 1e9), {"modelspec.hash_sha256": "0x"})
        text = mark_text(measure(MARK, Path(name), runs), source.stat().st_size, runs)
    text = (
        f"`python benchmarks/{Path(__file__).name} --gigabytes {gigabytes:g} --runs {runs}`, "
        f"{datetime.date.today().isoformat()}.\n{machine(None)}.\n\n{text}"
    )
    print(text)
    if write:
        write_section(RESULTS, "Checkpoints: mark", text)


if __name__ == "__main__":
    main()
