"""``ztsnr buckets`` on real files: the table, the files it writes, and what goes wrong in a sentence."""

import csv
import json
import math
import re

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from PIL import Image

from ztsnr import extras
from ztsnr.canvas import area_buckets, novelai_buckets
from ztsnr.cli import main
from ztsnr.data import bucket_plots
from ztsnr.data.bucket_report import bucket_rows, left_out_table, parse_buckets, parse_size, table, totals
from ztsnr.data.bucketing import bucket_pictures
from ztsnr.data.epoch_plan import EpochPlan
from ztsnr.data.sources import Source, build_index

BUCKETS = "64x64,64x128,128x64"


def write_pictures(folder, sizes):
    folder.mkdir(exist_ok=True)
    for i, size in enumerate(sizes):
        Image.new("L", size).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(name="pictures")
def fixture_pictures(tmp_path):
    """Nine pictures for the squares, four tall ones, and five that are of no use."""
    folder = write_pictures(tmp_path / "pictures", [(64, 64)] * 6 + [(100, 80)] * 3 + [(50, 100)] * 4 + [(128, 64)])
    Image.new("L", (20, 300)).save(folder / "thin.png")
    Image.new("L", (30, 30)).save(folder / "small.png")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    (folder / "empty.jpg").write_bytes(b"")
    return folder


def run(*arguments):
    return CliRunner().invoke(main, ["buckets", *map(str, arguments)], catch_exceptions=False)


def test_command(pictures, tmp_path):
    done = run(pictures, "--buckets", BUCKETS, "--batch", 4, "--min-size", 20, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if " x " in line]
    # 30 x 30 is a square too; 128 x 64 alone fills no step and goes to the squares, where half of it is cut off
    assert ["".join(row[:3]) for row in rows] == ["64x64", "64x128"]
    assert [row[3] for row in rows] == ["11", "4"]
    assert rows[0][4:] == ["73.33%", "0.124", "10.00%", "1", "2", "3"]
    assert rows[1][4:] == ["26.67%", "0.000", "0.00%", "4", "1", "0"]

    report = json.loads((tmp_path / "out" / "buckets.json").read_text())
    assert (report["pictures"], report["taken"], report["moved"], report["enlarged"]) == (18, 15, 1, 5)
    assert report["left_out"] == {"of an aspect ratio too far from every bucket's": 1, "cannot be read as pictures": 2}
    assert report["mean_crop_loss"] == pytest.approx((3 * 0.2 + 0.5) / 15)
    assert report["mean_aspect_error"] == pytest.approx((3 * math.log(1.25) + math.log(2)) / 15)
    assert report["mean_ratio_error"] == pytest.approx((3 * 0.25 + 1) / 15)
    assert (report["steps"], report["waiting"]) == (3, 3)
    assert report["buckets"][0]["crop_loss"] == pytest.approx((3 * 0.2 + 0.5) / 11)
    assert report["buckets"][2] == {
        "width": 128, "height": 64, "pictures": 0, "share": 0, "aspect_error": None, "crop_loss": None,
        "enlarged": 0, "steps": 0, "waiting": 0,
    }  # fmt: skip

    with open(tmp_path / "out" / "left_out.csv", newline="") as file:
        left_out = {row["key"]: row for row in csv.DictReader(file)}
    assert left_out.keys() == {"pictures/thin.png", "pictures/broken.png", "pictures/empty.jpg"}
    thin = left_out["pictures/thin.png"]
    assert (thin["width"], thin["height"], thin["path"]) == ("20", "300", str(pictures / "thin.png"))
    assert thin["reason"].startswith("of an aspect ratio too far")
    assert left_out["pictures/empty.jpg"]["reason"] == "it is empty"
    assert left_out["pictures/empty.jpg"]["width"] == ""

    with Image.open(tmp_path / "out" / "buckets.png") as plot:
        assert np.asarray(plot.convert("L")).std() > 10
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["buckets.json", "buckets.png", "left_out.csv"]
    for sentence in (
        "1 other buckets have no pictures",
        "15 of 18 pictures have a bucket: 3 steps of 4 in the first epoch; 3 pictures wait",
        "NovelAI reported 0.033",
        "Moved: 1 to another bucket, because their nearest",
        "Left out: 2 cannot be read as pictures.",
        "Left out: 1 of an aspect ratio too far from every bucket's.",
    ):
        assert sentence in done.output


def test_options_reach_the_buckets(pictures, tmp_path):
    arguments = (pictures, "--area", "64x64", "--area", "32x32", "--step", 32, "--limit", 128, "--no-upscale")
    done = run(*arguments, "--min-size", 25, "--max-aspect-error", 0.3, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "buckets.json").read_text())
    sizes = [(row["width"], row["height"]) for row in report["buckets"]]
    assert sizes == [*area_buckets((32, 32), 32, 128), *area_buckets((64, 64), 32, 128)]
    counts = {f"{row['width']}x{row['height']}": row["pictures"] for row in report["buckets"]}
    assert {size: count for size, count in counts.items() if count} == {"64x64": 9}
    assert report["left_out"] == {
        "smaller than the minimum size": 1,
        "of an aspect ratio too far from every bucket's": 5,
        "would be enlarged": 1,
        "cannot be read as pictures": 2,
    }


def test_without_matplotlib(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    done = run(pictures, "--buckets", BUCKETS, "--out", tmp_path)
    assert done.exit_code == 0
    assert "Pictures need matplotlib" in done.output
    assert not (tmp_path / "buckets.png").exists()
    assert (tmp_path / "buckets.json").exists()


def test_weights_of_a_list(pictures, tmp_path):
    lines = [{"path": f"{i:02}.png", "weight": weight} for i, weight in enumerate([3, 1, 1, 0, 0.5])]
    (pictures / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run(pictures / "list.jsonl", "--buckets", "64x64", "--batch", 4, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "buckets.json").read_text())
    assert (report["pictures"], report["taken"], report["left_out"]) == (5, 4, {"of weight 0": 1})
    assert report["steps"] * 4 + report["waiting"] in (5, 6)  # 3 + 1 + 1, and every other epoch one more


def test_any_aspect_error(pictures, tmp_path):
    done = run(pictures, "--buckets", BUCKETS, "--max-aspect-error", "inf", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "buckets.json").read_text())["max_aspect_error"] is None


def test_the_plot_is_not_put_among_the_pictures(pictures, monkeypatch):
    """It would be counted the next time, and trained with."""
    files = sorted(pictures.iterdir())
    for out in (pictures, pictures / "out"):
        done = run(pictures, "--buckets", BUCKETS, "--out", out)
        assert done.exit_code == 2
        assert done.output == (
            f"Error: {out} is in {pictures}, so its plot would become one of the pictures: choose another --out\n"
        )
    monkeypatch.chdir(pictures)
    assert run(".", "--buckets", BUCKETS).exit_code == 2
    assert sorted(pictures.iterdir()) == files


def test_lists_of_pictures_elsewhere(pictures, tmp_path):
    path = tmp_path / "lists" / "one.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"path": str(next(pictures.glob("*.png")))}))
    done = run(path, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "to allow it, use --outside" in done.output
    done = run(path, "--outside", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "buckets.json").read_text())["taken"] == 1


def test_several_resolutions_are_drawn(monkeypatch):
    monkeypatch.setattr(bucket_plots, "MOST_POINTS", 500)

    generator = np.random.default_rng(0)
    sizes = generator.integers(300, 3000, (9000, 2))
    sets = [area_buckets((1024, 1024)), area_buckets((512, 512))]
    bucketing = bucket_pictures(sizes, sets, no_upscale=True, minimum_size=400, batch_size=20)
    above, below, _ = bucket_plots.plot_buckets(bucketing, sets).axes
    heights = [bar.get_height() for bar in above.patches]
    counts = [int(text.get_text()) for text in above.texts[1:]]
    ratios = [w / h for w, h in (map(int, label.get_text().split(" x ")) for label in above.get_xticklabels())]
    assert len(heights) == len(counts) == len(ratios) == len(bucketing.buckets)
    assert ratios == sorted(ratios)
    assert sum(counts) == (bucketing.assignment >= 0).sum()
    np.testing.assert_allclose(heights, np.array(counts) / sum(counts))
    assert len({bar.get_facecolor() for bar in above.patches}) == 2
    crosses = {line.get_label(): len(line.get_xdata()) for line in below.lines if line.get_marker() == "x"}
    for label, drawn in crosses.items():
        assert f"{drawn} of them drawn" in label or label.startswith(f"{drawn} left out")
    assert sorted(crosses.values()) == [41, 500]


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def test_rows_by_slow_code():
    generator = np.random.default_rng(1)
    sizes = generator.integers(500, 2500, (300, 2))
    repeats = generator.choice([1.0, 2.0], 300)
    bucketing = bucket_pictures(sizes, [area_buckets((1024, 1024))], batch_size=8, repeats=repeats)
    plan = EpochPlan(bucketing.assignment, bucketing.buckets, batch_size=8, repeats=repeats)
    rows = bucket_rows(bucketing, plan)
    steps = [bucket for bucket, _ in plan.steps(0)]
    for number, row in enumerate(rows):
        members = [i for i in range(300) if bucketing.assignment[i] == number]
        assert (row.width, row.height) == bucketing.buckets[number]
        assert row.pictures == len(members)
        assert row.steps == steps.count(number)
        assert row.waiting == sum(repeats[members]) - 8 * row.steps
        assert row.enlarged == sum(sizes[i][0] < row.width or sizes[i][1] < row.height for i in members)
    assert sum(row.share for row in rows) == pytest.approx(1)
    found = totals(bucketing, rows, 7)
    assert found["pictures"] == found["taken"] + sum(found["left_out"].values()) == 307
    assert len(table(rows).splitlines()) == 2 + len(np.unique(bucketing.assignment[bucketing.assignment >= 0]))


def test_names_of_buckets():
    assert parse_buckets("sdxl") == area_buckets((1024, 1024))
    assert parse_buckets("sdxl", 32, 1536) == area_buckets((1024, 1024), 32, 1536)
    assert parse_buckets("novelai") == novelai_buckets()
    assert parse_buckets("1024x768, 512x512") == [(1024, 768), (512, 512)]
    assert parse_size("1024x768") == (1024, 768)
    for text in ("", "sd15", "1024", "64x", "64x64x64", "-64x64", "6.4x64", "64x64,"):
        with pytest.raises(ValueError, match=r"no buckets called|is not a size"):
            parse_buckets(text)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--buckets", "sd15"], "there are no buckets called 'sd15'"),
        (["--buckets", "64x"], "'64x' is not a size"),
        (["--buckets", "64x64,64x64"], "64 x 64 is listed twice"),
        (["--buckets", "64x0"], "at least 1 x 1"),
        (["--buckets", "64x100"], "bucket 64 x 100 must be a multiple of step = 64"),
        (["--buckets", "novelai", "--step", "128"], "bucket 320 x 1024 must be a multiple of step = 128"),
        (["--area", "1000x1000"], "must be a multiple of step = 64 on both sides, not 1000 x 1000"),
        (["--area", "1024"], "'1024' is not a size"),
        (["--area", "4096x4096"], "limit must be"),
        (["--min-size", "5000"], "none of the 16 pictures in .* has a bucket; the first is smaller than the minimum"),
        (["--batch", "100"], "the first is of a shape with too few pictures for a step"),
    ],
)
def test_mistakes_end_in_a_sentence(pictures, tmp_path, arguments, sentence):
    done = CliRunner().invoke(main, ["buckets", str(pictures), "--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error")]
    assert re.search(sentence, line)


def test_folders_without_pictures(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, sentence in (
        (tmp_path / "empty", "there are no pictures in"),
        (tmp_path / "gone", "there is no folder"),
    ):
        done = run(folder, "--out", tmp_path / "out")
        assert done.exit_code == 2
        assert sentence in done.output
    (tmp_path / "empty" / "a.png").write_bytes(b"no picture")
    done = run(tmp_path / "empty", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "none of the 1 pictures can be used" in done.output
    (tmp_path / "file").write_text("")
    done = run(tmp_path / "empty", "--out", tmp_path / "file" / "out")
    assert done.exit_code == 2
    assert "cannot write" in done.output


def test_left_out_table_without_any(pictures):
    index, unusable = build_index([Source(pictures)], allow_missing_captions=True)
    bucketing = bucket_pictures(index.sizes, [[(64, 64)]], max_aspect_error=math.inf)
    rows = left_out_table(bucketing, index, unusable)
    assert isinstance(rows, pa.Table)
    assert rows.column_names == ["key", "path", "width", "height", "reason"]
    assert rows["key"].to_pylist() == unusable["key"].to_pylist()
