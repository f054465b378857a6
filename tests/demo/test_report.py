"""The report holds what was measured and judged, and everything it shows is inside it."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from ztsnr.demo import report as module
from ztsnr.demo.claims import judge_claims
from ztsnr.demo.ideal_solids import Bound
from ztsnr.demo.objectives import OBJECTIVES, OURS, PLAIN, STARVED
from ztsnr.demo.report import HEADERS, WAYS, claims_text, summary_rows, summary_table, write_report
from ztsnr.demo.trainings import RECIPES

from .synthetic import NOISES, as_claimed, numbers_of

BOUNDS = [Bound("black", 6.4, 60.3, 4.3), Bound("no caption", 120.8, 127.2, 120.1)]


@pytest.fixture(autouse=True)
def known_bounds(monkeypatch):
    monkeypatch.setattr(module, "bounds", lambda: BOUNDS)


@pytest.fixture
def runs():
    return [as_claimed(), as_claimed(**{OURS: {"last": 0.201}})]


@pytest.fixture
def written(tmp_path, runs):
    """(claims, page, results) of two trainings."""
    claims = write_report(tmp_path, RECIPES["cpu"], runs, (0, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    return claims, page, json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))


def cells(page):
    """The text of all cells of tables, and of all items of lists."""
    return {html.unescape(cell) for cell in re.findall(r"<(?:td|th|li)[^>]*>([^<]*)</", page)}


# ----------------------------------------------------------------------------------------------------------------------
# The table


def test_a_row_for_each_way_of_sampling(runs):
    rows = summary_rows(runs)
    assert [tuple(row[:2]) for row in rows] == list(WAYS)
    assert {row[0] for row in rows} == set(OBJECTIVES)
    assert all(len(row) == len(HEADERS) for row in rows)
    assert all(isinstance(cell, str) for row in rows for cell in row)


def test_a_row_says_what_was_measured():
    run = {OURS: numbers_of(OURS, grounds={"14.6": {"black": 60.0}}, uneven={"14.6": 7.0}, first=12.5, last=0.25)}
    finite, infinite = ([dict(zip(HEADERS, row, strict=True)) for row in summary_rows([run])][i] for i in (0, 1))
    assert (finite["from"], infinite["from"]) == ("14.6", "infinity")
    assert (finite["black"], infinite["black"]) == ("60.0", "6.6")
    assert (finite["white"], finite["dark"], finite["light"]) == ("248.4", "55.0", "194.0")
    assert (finite["CIEDE2000"], finite["first prediction"]) == ("5.0", "12.5")
    assert (finite["uneven ground"], infinite["uneven ground"]) == ("7.0", "2.0")
    assert finite["explained"] == "0.90"
    assert (finite["v error at T"], infinite["v error at T"]) == ("", "0.25")  # of the network, and not of a start


def test_several_trainings_have_a_spread():
    runs = [{PLAIN: numbers_of(PLAIN, grounds={"14.6": {"black": black}})} for black in (50.0, 60.0, 73.0)]
    (row,) = summary_rows(runs)
    values = np.array([50, 60, 73.0])
    assert row[HEADERS.index("black")] == f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
    assert row[HEADERS.index("white")] == "248.4 ± 0.0"


def test_a_training_that_some_runs_lack(runs):
    del runs[1][STARVED]
    rows = {(row[0], row[1]): row for row in summary_rows(runs)}
    assert "±" not in rows[STARVED, "infinity"][2]
    assert "±" in rows[OURS, "infinity"][2]
    del runs[0][STARVED]
    assert (STARVED, "infinity") not in {tuple(row[:2]) for row in summary_rows(runs)}


def test_the_printed_table(runs):
    lines = summary_table(runs).splitlines()
    assert len(lines) == 2 + len(WAYS)
    for name in HEADERS:
        assert name in lines[0]
    for line, (name, start) in zip(lines[2:], WAYS, strict=True):
        assert re.match(rf"{re.escape(name)} +{re.escape(start)} ", line)


# ----------------------------------------------------------------------------------------------------------------------
# The claims in words


def test_claims_in_words(runs):
    claims = judge_claims(runs)
    lines = claims_text(claims).splitlines()
    assert len(lines) == sum(1 + len(claim.evidence) for claim in claims)
    assert [line for line in lines if line[0] != " "] == [
        f"{claim.number}. {claim.text}: {claim.answer}" for claim in claims
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_the_page_holds_all_claims_and_what_they_rest_on(written, runs):
    claims, page, _ = written
    assert {claim.answer for claim in claims} == {"yes"}
    there = cells(page)
    for claim in claims:
        assert f"{claim.number}. {claim.text}" in there
        for evidence in claim.evidence:
            assert str(evidence) in there
    for row in summary_rows(runs):
        assert set(row) <= there
    assert {"no caption", "121", "127", "120"} <= there
    assert page.count('class="answer yes"') == 2 * len(claims)
    assert 'class="answer no"' not in page


def test_answers_that_are_no_are_shown_so(tmp_path):
    run = as_claimed(**{OURS: {"first": 40.0}})
    claims = write_report(tmp_path, RECIPES["cpu"], [run], (0,))
    assert [claim.number for claim in claims if claim.answer == "no"] == ["3"]
    assert (tmp_path / "report.html").read_text().count('class="answer no"') >= 2


def test_the_page_asks_for_nothing_from_elsewhere(written):
    _, page, _ = written
    assert "http" not in page
    assert "<script" not in page
    assert "<link" not in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 100
    for source in sources:
        assert source.startswith("data:image/png;base64,")
    assert "url(" not in page


def test_the_pictures_on_the_page_are_those_that_were_measured(written, runs):
    _, page, _ = written
    number = 0
    for source, name in re.findall(r'src="data:image/png;base64,([^"]*)" alt="([^"]*)"', page):
        with Image.open(io.BytesIO(base64.b64decode(source))) as picture:
            pixels = np.asarray(picture)
        assert pixels.shape == (32, 32, 3)
        if html.unescape(name) == f"{OURS}, from 14.6, black":
            assert (pixels == runs[0][OURS]["solids/14.6/1/pictures/black"][0]).all()
            number += 1
    assert number == 1


def test_the_numbers_as_json(written, runs):
    claims, _, results = written
    assert results["training seeds"] == [0, 3]
    assert results["recipe"]["batch_size"] == RECIPES["cpu"].batch_size
    for claim, said in zip(claims, results["claims"], strict=True):
        assert (said["number"], said["text"], said["answer"]) == (claim.number, claim.text, claim.answer)
        for evidence, numbers in zip(claim.evidence, said["evidence"], strict=True):
            assert numbers["answer"] == evidence.answer
            assert numbers["difference"]["value"] == pytest.approx(evidence.difference.value)
            assert numbers["difference"]["seeds"] in (NOISES, 48)
    assert [list(row.values()) for row in results["rows"]] == summary_rows(runs)
    assert results["bounds"][0] == {
        "caption": "black",
        "its pictures": "6",
        "exact flow from 14.6": "60",
        "from infinity": "4",
    }


def test_an_old_report_is_replaced(tmp_path, runs):
    (tmp_path / "report.html").write_text("old")
    write_report(tmp_path, RECIPES["cpu"], runs[:1], (0,))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "One training of each." in page
    assert "standard deviation over trainings" not in page


def test_a_folder_that_is_not_there(tmp_path, runs):
    with pytest.raises(ValueError, match="there is no folder"):
        write_report(tmp_path / "none", RECIPES["cpu"], runs, (0, 3))
