"""``ztsnr buckets``: which buckets a folder's pictures go to, what that costs, and who is left out and why."""

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

NOVELAI_RATIO_ERROR = 0.033  # mean |w / h - W / H| that NovelAI reported of its 5.3 million pictures
UNUSABLE = "cannot be read as pictures"


@dataclass(frozen=True)
class BucketRow:
    """A bucket and its pictures.

    Attributes:
        pictures: how many, each counted once.
        share: of all pictures that have a bucket.
        aspect_error: mean |log(w / h) - log(W / H)|; None where there are no pictures.
        crop_loss: mean share of a picture's area that is cut off; None where there are no pictures.
        enlarged: pictures that are smaller than the bucket on a side.
        steps: of the first epoch.
        waiting: pictures that the first epoch leaves to the second, repeats counted.
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
    """(width, height) of a text such as 1024x768.

    Raises:
        UserError: it is something else.
    """
    found = re.fullmatch(r"\s*([0-9]+)x([0-9]+)\s*", text)
    if found is None:
        raise UserError(f"{text!r} is no size: write width and height in pixels, such as 1024x768")
    return int(found[1]), int(found[2])


def parse_buckets(text: str, step: int = 64, limit: int = 2048) -> list[Size]:
    """The buckets that a text names: sdxl, novelai, or sizes such as 1024x1024,832x1216.

    Args:
        text: the name, or the list.
        step: what every side must be a multiple of.
        limit: the longest side of ``sdxl``.

    Raises:
        UserError: it cannot be read, or a side is off the step.
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
    """One set of buckets a resolution: those of ``parse_buckets``, and those made for areas such as "512x512".

    Raises:
        UserError: text that is none of these.
    """
    sets = [parse_buckets(name, step, limit) for name in names]
    return sets + [area_buckets(parse_size(area), step, limit) for area in areas]


def bucket_rows(bucketing: Bucketing, plan: EpochPlan) -> list[BucketRow]:
    """What becomes of each bucket, in their order, those without pictures too."""
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
    """Numbers of the whole dataset; means are over the pictures that have a bucket."""
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
    """key, path, width, height and reason of every picture without a bucket; no size where none could be read."""
    numbers = np.flatnonzero(bucketing.assignment < 0)
    table = index.table.select(["key", "path", "width", "height"]).take(numbers)
    reasons = [REASONS[reason] for reason in bucketing.reason[numbers]]
    table = table.append_column("reason", pa.array(reasons, pa.string()))
    return pa.concat_tables([table, unusable], promote_options="default")


# ----------------------------------------------------------------------------------------------------------------------
# Text


def table(rows: Sequence[BucketRow]) -> str:
    """One line a bucket that has pictures."""
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
        f"the first epoch, and {found['waiting']} pictures that wait for the second.",
        f"Mean aspect error {found['mean_aspect_error']:.4f}, mean crop loss {found['mean_crop_loss']:.2%}, "
        f"{found['enlarged']} pictures are enlarged.",
        f"Mean |w/h - W/H| {found['mean_ratio_error']:.4f}; NovelAI reported {NOVELAI_RATIO_ERROR} of its pictures.",
    ]
    if found["moved"]:
        lines.append(f"Moved: {found['moved']} to another bucket than the nearest, which cannot fill a step.")
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
        folder: or another source of pictures (``sources``).
        out: folder for the files; made if missing.
        bucket_sets, batch_size, max_aspect_error, minimum_size, no_upscale: see ``bucket_pictures``.
        outside: see ``Source``.
        say: where text goes, one call a paragraph.

    Returns:
        What buckets.json holds.

    Raises:
        UserError: no pictures, or none that has a bucket; buckets that cannot be used; files that cannot be written,
            or that would be among the pictures.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out} is in {folder}, where its plot would be one of the pictures: choose another --out")
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
            f"none of the {len(index)} pictures in {folder} has a bucket: the first is "
            f"{REASONS[bucketing.reason[0]]}, the others are in {out / 'left_out.csv'}"
        )
    plan = EpochPlan(bucketing.assignment, bucketing.buckets, batch_size=batch_size, repeats=index.repeats)
    rows = bucket_rows(bucketing, plan)
    found = totals(bucketing, rows, len(unusable))
    say(f"{table(rows)}\n{summary(found, batch_size)}\n")

    report = {
        "ztsnr": __version__,
        "source": str(folder),
        **settings,
        "max_aspect_error": max_aspect_error if max_aspect_error < math.inf else None,  # which JSON does not have
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
