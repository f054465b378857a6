"""``ztsnr buckets``: how pictures are distributed over buckets, how much is cut off, and which are left out and why."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from tabulate import tabulate

from .. import __version__
from ..canvas import Size, area_buckets, novelai_buckets
from ..errors import UserError
from ..extras import no_matplotlib
from ..figures.png import png
from ..files import atomic_write, prepare_folder
from .bucketing import REASONS, TAKEN, Bucketing, bucket_pictures
from .epoch_plan import EpochPlan
from .sources import PictureIndex, Source, build_index

NOVELAI_RATIO_ERROR = 0.033  # mean |w / h - W / H| that NovelAI reported for its 5.3 million pictures
UNUSABLE = "cannot be read as pictures"


@dataclass(frozen=True)
class BucketRow:
    """A bucket and its pictures.

    Attributes:
        pictures: number of pictures, each counted once.
        share: share of all pictures that have a bucket.
        aspect_error: mean |log(w / h) - log(W / H)|; None without pictures.
        crop_loss: mean share of a picture's area that is cut off; None without pictures.
        enlarged: number of pictures with a side shorter than the bucket's.
        steps: number of steps in the first epoch.
        waiting: number of pictures that the first epoch leaves to the second, counting repeats.
    """

    width: int
    height: int
    pictures: int
    share: float
    aspect_error: float | None
    crop_loss: float | None
    enlarged: int
    steps: int
    waiting: int


# ----------------------------------------------------------------------------------------------------------------------
# Buckets by name


def parse_size(text: str) -> Size:
    """Parse a size such as 1024x768 to (width, height).

    Raises:
        UserError: the text has another form.
    """
    found = re.fullmatch(r"\s*([0-9]+)x([0-9]+)\s*", text)
    if found is None:
        raise UserError(f"{text!r} is not a size: write width and height in pixels, such as 1024x768")
    return int(found[1]), int(found[2])


def parse_buckets(text: str, step: int = 64, limit: int = 2048) -> list[Size]:
    """Parse buckets: sdxl, novelai, or a list of sizes such as 1024x1024,832x1216.

    Args:
        text: name or list.
        step: number of which every side must be a multiple.
        limit: longest side allowed in ``sdxl``.

    Raises:
        UserError: the text has another form, or a side is not a multiple of the step.
    """
    if text == "sdxl":
        return area_buckets((1024, 1024), step, limit)
    if text == "novelai":
        buckets = novelai_buckets()
    elif "x" in text:
        buckets = [parse_size(part) for part in text.split(",")]
    else:
        raise UserError(f"there are no buckets called {text!r}: choose sdxl or novelai, or list sizes as WxH,WxH")
    for width, height in buckets:
        if width % step or height % step:
            raise UserError(f"bucket {width} x {height} must be a multiple of step = {step} on both sides")
    return buckets


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def bucket_sets(names: Sequence[str], areas: Sequence[str], step: int = 64, limit: int = 2048) -> list[list[Size]]:
    """Sets of buckets, one a resolution: those named for ``parse_buckets``, then those for areas such as "512x512".

    Raises:
        UserError: a name or an area cannot be parsed.
    """
    sets = [parse_buckets(name, step, limit) for name in names]
    return sets + [area_buckets(parse_size(area), step, limit) for area in areas]


def bucket_rows(bucketing: Bucketing, plan: EpochPlan) -> list[BucketRow]:
    """A row for each bucket in order, including those without pictures."""
    numbers, error, crop_loss = bucketing.assignment, bucketing.aspect_error, bucketing.crop_loss
    enlarged = bucketing.scale > 1
    rows = []
    for number, count in enumerate(plan.counts(0)):
        members = np.flatnonzero(numbers == number)
        rows.append(
            BucketRow(
                *count.size,
                pictures=len(members),
                share=len(members) / (numbers >= 0).sum(),
                aspect_error=error[members].mean() if len(members) else None,
                crop_loss=crop_loss[members].mean() if len(members) else None,
                enlarged=int(enlarged[members].sum()),
                steps=count.steps,
                waiting=count.waiting + count.pictures - count.steps * plan.batch_size,
            )
        )
    return rows


def totals(bucketing: Bucketing, rows: Sequence[BucketRow], unusable: int) -> dict:
    """Totals of the dataset; means are over the pictures that have a bucket."""
    taken = bucketing.assignment >= 0
    widths, heights = np.array(bucketing.buckets)[bucketing.assignment[taken]].T
    ratios = bucketing.sizes[taken, 0] / bucketing.sizes[taken, 1]
    counts = np.bincount(bucketing.reason, minlength=len(REASONS))
    return {
        "pictures": len(taken) + unusable,
        "taken": int(taken.sum()),
        "moved": bucketing.moved,
        "empty_buckets": sum(not row.pictures for row in rows),
        "enlarged": sum(row.enlarged for row in rows),
        "mean_aspect_error": float(bucketing.aspect_error[taken].mean()),
        "mean_ratio_error": float(np.abs(ratios - widths / heights).mean()),
        "mean_crop_loss": float(bucketing.crop_loss[taken].mean()),
        "steps": sum(row.steps for row in rows),
        "waiting": sum(row.waiting for row in rows),
        "left_out": {
            reason: int(count)
            for reason, count in [*zip(REASONS, counts, strict=True), (UNUSABLE, unusable)]
            if count and reason != REASONS[TAKEN]
        },
    }


def left_out_table(bucketing: Bucketing, index: PictureIndex, unusable: pa.Table) -> pa.Table:
    """key, path, width, height and reason of every picture without a bucket; unreadable ones have no size."""
    numbers = np.flatnonzero(bucketing.assignment < 0)
    table = index.table.select(["key", "path", "width", "height"]).take(numbers)
    reasons = [REASONS[reason] for reason in bucketing.reason[numbers]]
    table = table.append_column("reason", pa.array(reasons, pa.string()))
    return pa.concat_tables([table, unusable], promote_options="default")


# ----------------------------------------------------------------------------------------------------------------------
# Text


def table(rows: Sequence[BucketRow]) -> str:
    """A line for each bucket that has pictures."""
    heads = ["bucket", "pictures", "share", "aspect error", "crop loss", "enlarged", "steps", "waiting"]
    cells = [
        [
            f"{row.width} x {row.height}",
            row.pictures,
            f"{row.share:.2%}",
            f"{row.aspect_error:.3f}",
            f"{row.crop_loss:.2%}",
            row.enlarged,
            row.steps,
            row.waiting,
        ]
        for row in rows
        if row.pictures
    ]
    return tabulate(cells, heads, colalign=("right",) * len(heads), disable_numparse=True)


def summary(found: dict, batch_size: int) -> str:
    """The totals in words."""
    lines = [
        f"{found['empty_buckets']} other buckets have no pictures.\n",
        f"{found['taken']} of {found['pictures']} pictures have a bucket: {found['steps']} steps of {batch_size} in "
        f"the first epoch; {found['waiting']} pictures wait for the second.",
        f"Mean aspect error {found['mean_aspect_error']:.4f}, mean crop loss {found['mean_crop_loss']:.2%}, "
        f"{found['enlarged']} pictures are enlarged.",
        f"Mean |w/h - W/H| {found['mean_ratio_error']:.4f}; NovelAI reported {NOVELAI_RATIO_ERROR} for its pictures.",
    ]
    if found["moved"]:
        lines.append(f"Moved: {found['moved']} to another bucket, because their nearest cannot fill a step.")
    lines += [f"Left out: {count} {reason}." for reason, count in found["left_out"].items()]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------


def run_buckets(
    folder: Path,
    out: Path,
    bucket_sets: Sequence[Sequence[Size]],
    *,
    batch_size: int,
    max_aspect_error: float,
    minimum_size: int,
    no_upscale: bool,
    outside: bool = False,
    say: Callable[[str], None],
) -> dict:
    """Print the report on a folder's pictures and write buckets.json, left_out.csv and buckets.png.

    Args:
        folder: folder or another source of pictures (``sources``).
        out: folder for the files; created if missing.
        bucket_sets, batch_size, max_aspect_error, minimum_size, no_upscale: see ``bucket_pictures``.
        outside: see ``Source``.
        say: called with each paragraph of text.

    Returns:
        The content of buckets.json.

    Raises:
        UserError: there are no pictures, none has a bucket, the buckets cannot be used, or the files cannot be written
            or would be among the pictures.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out} is in {folder}, so its plot would become one of the pictures: choose another --out")
    prepare_folder(out)
    index, unusable = build_index([Source(folder, outside=outside)], allow_missing_captions=True)
    settings = {
        "batch_size": batch_size,
        "max_aspect_error": max_aspect_error,
        "minimum_size": minimum_size,
        "no_upscale": no_upscale,
    }
    bucketing = bucket_pictures(index.sizes, bucket_sets, **settings, repeats=index.repeats)
    with atomic_write(out / "left_out.csv") as file:
        pyarrow.csv.write_csv(left_out_table(bucketing, index, unusable), file)
    if not (bucketing.assignment >= 0).any():
        raise UserError(
            f"none of the {len(index)} pictures in {folder} has a bucket; the first is "
            f"{REASONS[bucketing.reason[0]]}: see {out / 'left_out.csv'} for the others, and choose other buckets"
        )
    plan = EpochPlan(bucketing.assignment, bucketing.buckets, batch_size=batch_size, repeats=index.repeats)
    rows = bucket_rows(bucketing, plan)
    found = totals(bucketing, rows, len(unusable))
    say(f"{table(rows)}\n{summary(found, batch_size)}\n")

    report = {
        "ztsnr": __version__,
        "source": str(folder),
        **settings,
        "max_aspect_error": max_aspect_error if max_aspect_error < math.inf else None,  # JSON has no infinity
        **found,
        "buckets": [asdict(row) for row in rows],
    }
    with atomic_write(out / "buckets.json") as file:
        file.write((json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    missing = no_matplotlib()
    if missing is None:
        from .bucket_plots import plot_buckets

        with atomic_write(out / "buckets.png") as file:
            file.write(png(plot_buckets(bucketing, bucket_sets)))
    say(
        f"{missing or 'Plot:      ' + str(out / 'buckets.png')}\n"
        f"Numbers:   {out / 'buckets.json'}\n"
        f"Left out:  {out / 'left_out.csv'}"
    )
    return report
