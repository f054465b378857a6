"""One input for each outcome that ten minutes of coverage-guided fuzzing found: what was read, and every refusal."""

from pathlib import Path

import pytest

from .fuzz_header import check

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())


def test_there_is_a_corpus():
    assert len(CORPUS) >= 20


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name[:8])
def test_the_corpus(path):
    check(path.read_bytes())
