"""What it costs to bucket and order ten million pictures, beside the per-picture loop of NovelAI's public code of 2022.

    python benchmarks/buckets.py [--pictures N] [--loop-pictures N] [--runs N]

Both choose the bucket of each picture and all steps of an epoch, on one core, and their answers are compared.  Then the
public code's own answer: the share of its steps that have one shape on all ranks, and the pictures it makes square.
Prints the tables and puts them into benchmarks/RESULTS.md.
"""

import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import numpy as np
from results import RESULTS, machine, markdown, write_section

from ztsnr.canvas import area_buckets, novelai_buckets
from ztsnr.data.bucketing import bucket_pictures
from ztsnr.data.epoch_plan import EpochPlan

MB = 1e6
# what the project asked for
MOST_SECONDS, MOST_MEMORY, LEAST_SPEEDUP = 10, 1000 * MB, 50

BUCKETS = area_buckets((1024, 1024))
MAX_ASPECT_ERROR = math.log(2)
# pictures in each of novelai_buckets(), as the public code's README has it
NOVELAI_COUNTS = (
    16618, 38428, 24377, 12010, 42191, 247869, 661814, 2189784, 429811, 417592,
    231463, 586743, 209557, 173294, 15046, 3478, 4512, 3704, 2326,
)  # fmt: skip
SPREAD = 0.05  # standard deviation of log(w / h) around a bucket's; the median error is then the 0.023 they reported

OURS = "bucket_pictures and EpochPlan"
PUBLIC = "the loop of 2022"
MENDED = "the same loop, copying only batches"

Steps = list[tuple[int, list[int] | np.ndarray]]  # bucket and pictures
Seconds = dict[str, float]


def draw_sizes(count: int, seed: int = 0) -> np.ndarray:
    """(count, 2) int32: aspect ratios around those of NovelAI's pictures, 1.5 million pixels give or take half."""
    generator = np.random.default_rng(seed)
    shares = np.array(NOVELAI_COUNTS) / sum(NOVELAI_COUNTS)
    centres = np.log([width / height for width, height in novelai_buckets()])
    log_ratios = generator.choice(centres, count, p=shares) + generator.normal(0, SPREAD, count)
    log_areas = generator.normal(math.log(1.5e6), 0.5, count)
    log_sides = np.stack([log_areas + log_ratios, log_areas - log_ratios], axis=1) / 2
    return np.exp(log_sides).round().astype(np.int32)


# ----------------------------------------------------------------------------------------------------------------------
# Ways to the same answer


def at_once(sizes: np.ndarray, batch_size: int) -> tuple[Seconds, np.ndarray, Steps]:
    """Ours."""
    watch = Stopwatch()
    bucketing = bucket_pictures(sizes, [BUCKETS], max_aspect_error=MAX_ASPECT_ERROR, batch_size=batch_size)
    watch.lap("buckets")
    steps = list(EpochPlan(bucketing.assignment, bucketing.buckets, batch_size=batch_size).steps(0))
    watch.lap("epoch")
    return watch.seconds, bucketing.assignment, steps


def by_loop(sizes: np.ndarray, batch_size: int, copying: bool = True) -> tuple[Seconds, np.ndarray, Steps]:
    """The public code's way, with aspect ratios compared by their logarithm, and remainders left for the next epoch.

    ``copying`` says whether a batch is taken as the public code does it, by a copy of all that remains of the bucket.
    """
    size_of = dict(enumerate(map(tuple, sizes.tolist())))
    generator = np.random.RandomState(42)
    watch = Stopwatch()
    members = assign_by_loop(size_of, batch_size)
    watch.lap("buckets")
    lines = order_by_loop(members, generator)
    for line in lines.values():
        del line[len(line) // batch_size * batch_size :]  # these wait
    steps = list(draw_by_loop(lines, batch_size, generator, copying))
    watch.lap("epoch")

    assignment = np.full(len(sizes), -1)
    for bucket, pictures in members.items():
        assignment[pictures] = bucket
    return watch.seconds, assignment, steps


def assign_by_loop(size_of: dict[int, tuple[int, int]], batch_size: int) -> dict[int, list[int]]:
    """The pictures of each bucket; buckets that do not fill a batch are closed, the emptiest first."""
    aspects = np.log([width / height for width, height in BUCKETS])
    members = {bucket: [] for bucket in range(len(BUCKETS))}
    pictures = size_of.keys()
    while True:
        for picture in pictures:
            width, height = size_of[picture]
            errors = np.abs(aspects - math.log(width / height))
            bucket = int(errors.argmin())
            if errors[bucket] <= MAX_ASPECT_ERROR:
                members[bucket].append(picture)
        too_few = [bucket for bucket, found in members.items() if 0 < len(found) < batch_size]
        if not too_few:
            return members
        closed = min(too_few, key=lambda bucket: len(members[bucket]))
        pictures, aspects[closed] = members.pop(closed), math.inf


def order_by_loop(members: dict[int, list[int]], generator: np.random.RandomState) -> dict[int, list[int]]:
    """The pictures of each bucket, in the order of one permutation of all."""
    bucket_of = {picture: bucket for bucket, pictures in members.items() for picture in pictures}
    lines = {bucket: [] for bucket in sorted(members)}
    for picture in generator.permutation(list(bucket_of)).tolist():
        lines[bucket_of[picture]].append(picture)
    # by way of an array, as in the public code: numbers that lie one after another are copied several times faster
    return {bucket: list(np.array(line, dtype=np.int64)) for bucket, line in lines.items()}


def draw_by_loop(
    lines: dict[int, list[int]], batch_size: int, generator: np.random.RandomState, copying: bool
) -> Iterator[tuple[int, list[int]]]:
    """Batches of buckets drawn in proportion to what remains of them.  Each line must be a multiple of a batch."""
    lines = {bucket: line for bucket, line in lines.items() if line}
    while lines:
        lengths = np.array([len(line) for line in lines.values()])
        bucket = int(generator.choice(list(lines), p=lengths / lengths.sum()))
        if copying:
            yield bucket, lines[bucket][:batch_size]
            lines[bucket] = lines[bucket][batch_size:]
        else:
            yield bucket, lines[bucket][-batch_size:]
            del lines[bucket][-batch_size:]
        if not lines[bucket]:
            del lines[bucket]


class Stopwatch:
    def __init__(self):
        self.seconds: Seconds = {}
        self.began = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.began = now - self.began, now


WAYS = {OURS: at_once, PUBLIC: by_loop, MENDED: partial(by_loop, copying=False)}


def measure(way: str, folder: str, batch_size: int) -> None:
    """In a process of its own: print seconds and the peak of memory as JSON, and leave the answer in the folder."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    sizes = np.load(Path(folder) / "sizes.npy")
    seconds, assignment, steps = WAYS[way](sizes, batch_size)
    status = Path("/proc/self/status").read_text()
    kilobytes = int(status.split("VmHWM:")[1].split()[0])
    buckets, pictures = zip(*steps, strict=True)
    np.savez(Path(folder) / f"{way}.npz", assignment=assignment, buckets=buckets, pictures=np.stack(pictures))
    print(json.dumps({**seconds, "all": sum(seconds.values()), "bytes": 1024 * kilobytes}))


def run(way: str, folder: str, batch_size: int) -> dict[str, float]:
    program = f"import buckets; buckets.measure({way!r}, {folder!r}, {batch_size})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def check_same(folder: str, batch_size: int) -> int:
    """That all answers are right and, but for what is random, the same.  Returns the number of steps."""
    with np.load(Path(folder) / f"{OURS}.npz") as file:
        assignment = file["assignment"]
    counts = np.bincount(assignment[assignment >= 0], minlength=len(BUCKETS))
    for way in WAYS:
        with np.load(Path(folder) / f"{way}.npz") as file:
            pictures = file["pictures"]
            assert (file["assignment"] == assignment).all(), "the buckets differ"
            assert pictures.shape[1] == batch_size, "a batch has another size"
            assert len(np.unique(pictures)) == pictures.size, "a picture comes twice"
            assert (assignment[pictures] == file["buckets"][:, None]).all(), "a step has two shapes"
            steps = np.bincount(file["buckets"], minlength=len(BUCKETS))
            assert (steps == counts // batch_size).all(), "a step is missing"
    return len(pictures)


# ----------------------------------------------------------------------------------------------------------------------
# The public code's own answer


def public_epoch(sizes: np.ndarray, batch_size: int, world_size: int, seed: int = 42) -> tuple[float, float]:
    """An epoch of the public code: linear aspect ratios, a share of the pictures a rank, remainders as squares.

    Returns:
        The share of steps in which ranks have different shapes, and the share of pictures that are trained as squares
        of 512 x 512 and belong to another bucket.
    """
    buckets = novelai_buckets()
    square = buckets.index((512, 512))
    aspects = np.array([width / height for width, height in buckets])
    assignment = np.abs(aspects - (sizes[:, :1] / sizes[:, 1:])).argmin(axis=1)
    permutation = np.random.RandomState(seed).permutation(len(sizes))
    permutation = permutation[: len(sizes) // (batch_size * world_size) * batch_size * world_size]
    shapes, squashed = [], 0
    for rank in range(world_size):
        pictures = permutation[rank::world_size]
        lines = {bucket: pictures[assignment[pictures] == bucket].tolist() for bucket in range(len(buckets))}
        remainders, generator = [], np.random.RandomState(seed)
        for line in lines.values():
            overhang = len(line) % batch_size
            remainders += line[:overhang]
            del line[:overhang]
            generator.shuffle(line)  # by which the ranks' random numbers part
        squashed += (assignment[remainders] != square).sum()
        lines[-1] = remainders  # as squares
        steps = draw_by_loop(lines, batch_size, generator, copying=False)
        shapes.append([square if bucket < 0 else bucket for bucket, _ in steps])
    differing = (np.array(shapes) != shapes[0]).any(axis=0)
    return differing.mean(), squashed / len(permutation)


# ----------------------------------------------------------------------------------------------------------------------


def compare(folder: str, pictures: int, loop_pictures: int, runs: int, batch_size: int) -> str:
    """The table of all ways and the verdicts."""
    ours = {}
    for count in dict.fromkeys((pictures, loop_pictures)):
        np.save(Path(folder) / "sizes.npy", draw_sizes(count))
        ours[count] = median([run(OURS, folder, batch_size) for _ in range(runs)])
    many, same = ours[pictures], ours[loop_pictures]
    loops = {way: run(way, folder, batch_size) for way in (PUBLIC, MENDED)}
    steps = check_same(folder, batch_size)

    speedups = {way: found["all"] / same["all"] for way, found in loops.items()}
    verdicts = {
        f"{pictures} pictures in at most {MOST_SECONDS} s": many["all"] <= MOST_SECONDS,
        f"in at most {MOST_MEMORY / MB:.0f} MB": many["bytes"] <= MOST_MEMORY,
        f"{LEAST_SPEEDUP} x as fast as the loop": speedups[PUBLIC] >= LEAST_SPEEDUP,
    }
    told = ", ".join(f"{name} {'reached' if reached else 'missed'}" for name, reached in verdicts.items())
    rows = [row(OURS, count, found) for count, found in ours.items()]
    rows += [row(way, loop_pictures, found) for way, found in loops.items()]
    public, mended = (f"{speedups[way]:.0f} x" for way in (PUBLIC, MENDED))
    return f"""\
Aspect ratios as those of NovelAI's pictures, SDXL's {len(BUCKETS)} buckets, batches of {batch_size}; one core; memory
is of the whole process; median of {runs} runs, one of the loops. Of {loop_pictures} pictures all ways put each into
the same bucket and make {steps} steps of the same shapes, each picture once. Ours is {public} as fast as the public
code's loop, which at every batch copies what remains of the bucket, and {mended} as fast as a loop that does not.
{told}.

{markdown([HEADS, *rows])}
"""


HEADS = ["way", "pictures", "buckets, s", "epoch, s", "both, s", "us a picture", "peak MB"]


def row(name: str, pictures: int, found: dict[str, float]) -> list[str]:
    seconds = [f"{found[key]:.2f}" for key in ("buckets", "epoch", "all")]
    return [name, str(pictures), *seconds, f"{1e6 * found['all'] / pictures:.3f}", f"{found['bytes'] / MB:.0f}"]


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of the times; of memory the most."""
    found = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
    return found | {"bytes": max(each["bytes"] for each in runs)}


def faults(pictures: int = 20_000, batch_size: int = 8) -> str:
    """What the public code does with an epoch, by the number of ranks."""
    sizes = draw_sizes(pictures)
    rows = []
    for world_size in (1, 8, 64):
        differing, squashed = public_epoch(sizes, batch_size, world_size)
        dropped = pictures % (batch_size * world_size)
        steps = pictures // (batch_size * world_size)
        rows.append([f"{world_size} x {batch_size}", f"{steps}", f"{differing:.1%}", f"{squashed:.1%}", f"{dropped}"])
    heads = ["ranks x batch", "steps", "steps of several shapes", "pictures cut to squares", "pictures dropped"]
    return (
        f"An epoch of the public code of 2022 itself, {pictures} pictures with the same aspect ratios, in its own 19 "
        f"buckets; squares\nare counted that belong to another bucket. Here all of these are 0.\n\n"
        f"{markdown([heads, *rows])}\n"
    )


@click.command(help=__doc__.split("\n")[0])
@click.option("--pictures", type=click.IntRange(min=1), default=10_000_000, show_default=True)
@click.option(
    "--loop-pictures", type=click.IntRange(min=1), default=10_000_000, show_default=True, help="For the loops."
)
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of ours.")
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--write/--no-write", default=True, show_default=True, help="Put the tables into RESULTS.md.")
def main(pictures: int, loop_pictures: int, runs: int, batch: int, write: bool) -> None:

    loop_pictures = min(loop_pictures, pictures)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(folder, pictures, loop_pictures, runs, batch)
    command = f"python benchmarks/{Path(__file__).name} --pictures {pictures} --loop-pictures {loop_pictures}"
    text = (
        f"`{command} --runs {runs} --batch {batch}`, {datetime.date.today().isoformat()}.\n{machine(None)}.\n\n"
        f"{found}\n{faults()}"
    )
    print(text)
    if write:
        write_section(RESULTS, "Training: buckets", text)


if __name__ == "__main__":
    main()
