"""What the checkpoint tools cost: seconds and peak memory beside ``cp`` and beside loading and saving.

    python benchmarks/checkpoints.py [--folder FOLDER] [--runs N] [mark] [convert] [inspect] [run]

Works on random files in FOLDER, whose disk is what is measured: 2 and 7 GB for mark, a full-size SDXL of 6.9 GB for
the others (30 GB in all).  run is ``ztsnr verify --run``, for which a ComfyUI must be there (COMFYUI_PATH, or
~/comfy/ComfyUI).  Prints the tables and puts them into benchmarks/RESULTS.md.
"""

import datetime
import json
import math
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

import click
from results import RESULTS, machine, markdown, write_section
from tqdm import tqdm

from ztsnr.checkpoints.forward import LIMIT, compare_forwards, find_comfyui

ROOT = Path(__file__).resolve().parent.parent
TENSOR = 32 << 20  # numbers in each tensor of the file to mark
MB = 1e6
# what the tools are asked to reach
MARK_SPEED = 0.8  # of that of cp
MARK_MEMORY = 100 * MB
MARK_SIZES = (2_000_000_000, 7_000_000_000)
CONVERT_MEMORY = 500 * MB  # beyond the largest tensor
INSPECT_SECONDS = 0.05
INSPECT_MEMORY = 50 * MB

# Each way is two pieces of a program of its own, of which the second one is timed.  `place` is the folder with what
# there is to work on, `target` a file or folder to be written.
Ways = Mapping[str, tuple[str, str]]
Results = Mapping[str, tuple[float, float]]  # seconds, bytes of memory
COPY, COPY_TO_DISK = "cp", "cp, then sync"
PROGRAM = """
import sys, time
from pathlib import Path
place = Path(sys.argv[1])
target = place / "target.safetensors"
{prepare}
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
kilobytes = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, kilobytes)
"""


def copying(source: str) -> Ways:
    copy = f'subprocess.run(["cp", place / "{source}", target], check=True)'
    return {
        COPY: ("import subprocess", copy),
        COPY_TO_DISK: ("import subprocess", f'{copy}; subprocess.run(["sync", target], check=True)'),
        "safetensors load_file, save_file": (
            "from safetensors.torch import load_file, save_file",
            f'save_file(load_file(place / "{source}"), target)',
        ),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Marking

MARK = copying("source.safetensors") | {
    name: (
        "from ztsnr.checkpoints import mark_checkpoint",
        f'mark_checkpoint(place / "{source}.safetensors", v_pred=True, ztsnr=True, out=target)',
    )
    for name, source in (("mark", "source"), ("mark, hash", "hashed"))
}


def mark(place: Path, runs: int) -> str:
    """A small file, which ``cp`` leaves in memory, and one of the size of SDXL, which it cannot."""
    return "\n".join(mark_one(place, nbytes, runs) for nbytes in MARK_SIZES)


def mark_one(place: Path, nbytes: int, runs: int) -> str:
    for name, metadata in (("source", {}), ("hashed", {"modelspec.hash_sha256": "0x"})):
        write_random_checkpoint(place / f"{name}.safetensors", nbytes, metadata)
    nbytes = (place / "source.safetensors").stat().st_size
    results = measure(MARK, place, runs)
    for name in ("source", "hashed"):
        (place / f"{name}.safetensors").unlink()
    memory = max(results[name][1] for name in ("mark", "mark, hash"))
    verdicts = {
        f"at least {MARK_SPEED} of the speed of `{copy}`": results[copy][0] / results["mark"][0] >= MARK_SPEED
        for copy in (COPY, COPY_TO_DISK)
    } | {f"at most {MARK_MEMORY / MB:.0f} MB": memory <= MARK_MEMORY}
    text = (
        f"A file of {nbytes / 1e9:.2f} GB, read before; median seconds and largest memory of {runs} runs, the ways "
        f"taking turns. `{COPY_TO_DISK}` and `mark` return when all is on the disk, the others leave that to the "
        "system. `mark, hash`: of a file that has the data's SHA-256 in its metadata, which is computed again. "
        f"Of `mark`: {told(verdicts)}."
    )
    return paragraph(text) + table(results, nbytes) + "\n"


def write_random_checkpoint(path: Path, nbytes: int, metadata: dict[str, str]) -> None:
    """Write a U-Net's file of about this size, of random numbers, which no file system can compress."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Converting

CONVERT = copying("sdxl.safetensors") | {
    "convert to a single file": (
        "import torch; from ztsnr.checkpoints import to_single_file",
        'to_single_file(place / "sdxl", target)',
    ),
    "convert to a single file, --base": (
        "import torch; from ztsnr.checkpoints import to_single_file",
        'to_single_file(place / "sdxl", target, base=place / "sdxl.safetensors")',
    ),
    "convert to a folder": (
        "import torch, diffusers; from ztsnr.checkpoints import to_folder",
        'to_folder(place / "sdxl.safetensors", target.with_suffix(""), config=place / "sdxl")',
    ),
    "diffusers from_single_file, save_pretrained": (
        "import torch; from diffusers import StableDiffusionXLPipeline as Pipeline",
        "Pipeline.from_single_file(str(place / 'sdxl.safetensors'), config=str(place / 'sdxl'), local_files_only=True, "
        "torch_dtype=torch.float16).save_pretrained(target.with_suffix(''))",
    ),
    "verify": (
        "import torch; from ztsnr.checkpoints import verify_checkpoint",
        'verify_checkpoint(place / "sdxl.safetensors")',
    ),
    "verify, beside the folder's own": (
        "import torch; from ztsnr.checkpoints import verify_checkpoint",
        'verify_checkpoint(place / "sdxl.safetensors", place / "sdxl.safetensors")',
    ),
}


def convert(place: Path, runs: int) -> str:
    from safetensors import safe_open

    make_sdxl(place)
    source = place / "sdxl.safetensors"
    nbytes = source.stat().st_size
    with safe_open(source, "pt") as file:
        largest = max(2 * math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    results = measure(CONVERT, place, runs)
    most = largest + CONVERT_MEMORY
    verdicts = {f"`{name}`": memory <= most for name, (_, memory) in results.items() if name.startswith("convert")}
    text = (
        f"SDXL of full size in float16, of random weights; the single file has {nbytes / 1e9:.2f} GB, its largest "
        f"tensor {largest / MB:.0f} MB. Median seconds and largest memory of {runs} runs, the ways taking turns. "
        f"`convert` and `{COPY_TO_DISK}` return when all is on the disk. Memory of at most the largest tensor and "
        f"{CONVERT_MEMORY / MB:.0f} MB: {told(verdicts)}."
    )
    return paragraph(text) + table(results, nbytes)


def make_sdxl(place: Path) -> None:
    """sdxl, a diffusers folder, and sdxl.safetensors."""
    if (place / "sdxl.safetensors").exists():
        return
    sys.path.insert(0, str(ROOT))
    from tests.full_size import write_folder
    from tests.tiny_pipelines import make_tokenizer
    from ztsnr.checkpoints import to_single_file

    words = place / "words"
    if comfyui := find_comfyui():
        words = comfyui / "comfy" / "sd1_tokenizer"  # CLIP's own, so that the two read the same prompt
    else:
        make_tokenizer(words, pad="!")
    write_folder(place / "sdxl", "SDXL base", words)
    to_single_file(place / "sdxl", place / "sdxl.safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# Inspecting

INSPECT: Ways = {
    "inspect": (
        "from ztsnr.checkpoints import inspect_checkpoint",
        'inspect_checkpoint(place / "sdxl.safetensors")',
    ),
    "safetensors safe_open, keys": (
        "from safetensors import safe_open",
        'opened = safe_open(place / "sdxl.safetensors", "numpy"); opened.keys(); opened.metadata()',
    ),
}


def inspect(place: Path, runs: int) -> str:
    make_sdxl(place)
    runs = max(runs, 20)
    results = measure(INSPECT, place, runs)
    seconds, memory = results["inspect"]
    verdicts = {
        f"at most {1000 * INSPECT_SECONDS:.0f} ms": seconds <= INSPECT_SECONDS,
        f"at most {INSPECT_MEMORY / MB:.0f} MB": memory <= INSPECT_MEMORY,
    }
    rows = [[f"`{name}`", f"{1000 * s:.1f}", f"{m / MB:.0f}"] for name, (s, m) in results.items()]
    nbytes = (place / "sdxl.safetensors").stat().st_size
    text = (
        f"SDXL of full size, {nbytes / 1e9:.2f} GB; median of {runs} runs, and memory of the whole process. Of "
        f"`inspect`: {told(verdicts)}."
    )
    return paragraph(text) + markdown([["way", "ms", "peak MB"], *rows])


# ----------------------------------------------------------------------------------------------------------------------
# One forward in every program


def run(place: Path, runs: int) -> str:
    if find_comfyui() is None:
        raise click.ClickException("there is no ComfyUI: COMFYUI_PATH says where it is")
    make_sdxl(place)
    start = time.perf_counter()
    agreements, problems = compare_forwards(place / "sdxl.safetensors", place / "sdxl")
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = [[found.program, found.what, f"{found.difference:.1e}"] for found in agreements]
    text = (
        "SDXL of full size in float16, of random weights: one forward of its single file in diffusers, beside that of "
        "its folder and that of the single file in ComfyUI, in float32 on the CPU; the norm of the difference over the "
        f"norm. {seconds:.0f} s and {memory / 1e9:.1f} GB, once. At most {LIMIT}: "
        f"{'missed: ' + ' '.join(problems) if problems else 'reached'}."
    )
    return paragraph(text) + markdown([["program", "what", "difference"], *rows])


# ----------------------------------------------------------------------------------------------------------------------


def run_once(way: tuple[str, str], place: Path) -> tuple[float, float]:
    """Seconds, and peak memory in bytes, of one run in a process of its own; what it wrote is removed."""
    prepare, work = way
    os.sync()  # what was written before shall not keep the disk busy
    try:
        command = [sys.executable, "-c", PROGRAM.format(prepare=prepare, work=work), place]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    finally:
        (place / "target.safetensors").unlink(missing_ok=True)
        shutil.rmtree(place / "target", ignore_errors=True)
    seconds, kilobytes = map(float, done.stdout.split())
    return seconds, 1024 * kilobytes


def measure(ways: Ways, place: Path, runs: int) -> Results:
    """Median seconds and largest peak memory of each way, which take turns; a first round warms up."""
    results = {name: [] for name in ways}
    for i in tqdm(range(runs + 1)):
        for name, way in ways.items():
            result = run_once(way, place)
            if i:
                results[name].append(result)
    return {
        name: (statistics.median(seconds for seconds, _ in found), max(memory for _, memory in found))
        for name, found in results.items()
    }


def table(results: Results, nbytes: int) -> str:
    rows = [
        [
            f"`{name}`",
            f"{seconds:.2f}",
            f"{nbytes / seconds / 1e9:.2f}",
            *(f"{results[copy][0] / seconds:.2f}" for copy in (COPY, COPY_TO_DISK)),
            "" if name in (COPY, COPY_TO_DISK) else f"{memory / MB:.0f}",
        ]
        for name, (seconds, memory) in results.items()
    ]
    heads = ["way", "s", "GB/s", f"speed over `{COPY}`", f"over `{COPY_TO_DISK}`", "peak MB"]
    return markdown([heads, *rows])


def paragraph(text: str) -> str:
    return f"{textwrap.fill(text, 120)}\n\n"


def told(verdicts: Mapping[str, bool]) -> str:
    return ", ".join(f"{name} {'reached' if reached else 'missed'}" for name, reached in verdicts.items())


SECTIONS = {"mark": mark, "convert": convert, "inspect": inspect, "run": run}


@click.command(help=__doc__.split("\n")[0])
@click.argument("sections", nargs=-1, type=click.Choice(list(SECTIONS)))
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="On the disk to measure; by default where temporary files go.",
)
@click.option("--runs", type=click.IntRange(min=1), default=7, show_default=True, help="Runs of each way.")
@click.option("--write/--no-write", default=True, show_default=True, help="Put the tables into RESULTS.md.")
def main(sections: tuple[str, ...], folder: Path | None, runs: int, write: bool) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for name in sections or SECTIONS:
            found = SECTIONS[name](Path(place), runs)
            text = (
                f"`python benchmarks/{Path(__file__).name} --runs {runs} {name}`, "
                f"{datetime.date.today().isoformat()}.\n{machine(find_comfyui())}.\n\n{found}"
            )
            print(text)
            if write:
                write_section(RESULTS, f"Checkpoints: {name}", text)


if __name__ == "__main__":
    main()
