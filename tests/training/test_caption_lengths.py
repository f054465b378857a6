"""Captions that are cut at ``data.max_chunks`` are counted and said, not cut in silence."""

import types
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from ztsnr.data.tokens import token_chunks
from ztsnr.training.caption_lengths import cut_captions
from ztsnr.training.config import DataSettings, FinetuneSettings, TrainingCaptions
from ztsnr.training.settings_file import parse_settings
from ztsnr.training.trainer import run_finetune

from ..tiny_pipelines import END, make_tokenizer
from .tiny_run import make_content

SETTINGS = DataSettings(sources=(), batch_size=1, max_chunks=2)  # 150 tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A letter a token."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer", pad=END)


def data(captions, assignment=None):
    table = pa.table({"captions": pa.array(captions, pa.list_(pa.string()))})
    plan = types.SimpleNamespace(assignment=np.array(assignment or [0] * len(captions)))
    return types.SimpleNamespace(index=types.SimpleNamespace(table=table), plan=plan)


def test_captions_that_fit_are_not_said(tokenizer):
    assert cut_captions(data([["a" * 150], ["b", ""], []]), SETTINGS, tokenizer) == ""
    assert cut_captions(data([["a " * 150]]), SETTINGS, tokenizer) == ""  # 299 bytes
    assert cut_captions(data([[]]), SETTINGS, tokenizer) == ""


def test_captions_that_are_cut(tokenizer):
    captions = [["a" * 151, "b"], ["c" * 400], ["d" * 150]]
    line = cut_captions(data(captions), SETTINGS, tokenizer)
    assert line.startswith("2 of 4 captions are longer than data.max_chunks = 2 (150 tokens)")
    assert "the longest has 400 tokens" in line
    assert len(token_chunks("a" * 151, tokenizer, 0)) == 3  # as the trainer cuts it
    assert len(token_chunks("d" * 150, tokenizer, 0)) == 2


def test_what_is_put_around_a_caption_counts(tokenizer):
    chosen = replace(SETTINGS, captions=TrainingCaptions(prefix="ab", suffix="c"))
    assert cut_captions(data([["d" * 145]]), chosen, tokenizer) == ""  # and two commas
    assert "has 151 tokens" in cut_captions(data([["d" * 146]]), chosen, tokenizer)


def test_pictures_that_are_not_trained_do_not_count(tokenizer):
    assert cut_captions(data([["a" * 200], ["b"]], [-1, 0]), SETTINGS, tokenizer) == ""


def test_many_long_captions_are_estimated(tokenizer):
    captions = [["a" * 200] if number % 2 else ["a " * 100] for number in range(400)]  # 100 tokens in 200 bytes
    line = cut_captions(data(captions), SETTINGS, tokenizer, most=101)
    assert line.startswith("about ")
    assert int(line.split()[1]) == pytest.approx(200, rel=0.1)


def test_a_run_says_so(place, tmp_path):
    content = make_content(place, tmp_path / "run", data__captions={"suffix": "x" * 230})
    said = []
    run_finetune(parse_settings(FinetuneSettings, content), dry_run=True, say=said.append)
    assert len([line for line in said if line.startswith("40 of 40 captions are longer than data.max_chunks = 3")]) == 1
