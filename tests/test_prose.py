"""Plain English in what the user meets: no phrase of the first version that had to be read twice.

Scanned are the strings, docstrings and comments of the product, and the text of the documentation.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# pattern: what to write instead
HABITS = {
    r"\bbe had\b": "could not download / cannot be read",
    r"\b(is|are) there already\b": "already exists",
    r"\b(every|about|at most|no more than|after) so many\b": "the number itself",
    r"\bso many (of|times|steps|pictures|entries|leading|last)\b": "number of",
    r"\bgo(es|ing)? on\b": "continue / resume / keep",
    r"\bFor programs\.": "Print JSON.",
    r"\bHow many\.": "Number of ...",
    r"(: |^)how many (?!times)": "number of",
    r"\bOf (the|its) numbers\b": "Dtype",
    r"(?<![Tt]here )\b(is|are) no (?!longer\b|more\b)[a-zA-Z]": "is not a",
    r"\b(is|are) none of [^,]+,": "choose one of",
    r"\bWhat ends one\b": "if one fails, all stop",
    r"\bWhether it is so\b|^Whether\b": "True if",
    r"\bof its own accord\b": "by itself",
    r"\bin place of\b": "instead of",
    r"\bleft away\b": "left out",
    r"\b(one|put) behind the other\b": "one after another / concatenated",
    r"\band if so\b|, if so,": "name the condition",
    r"\bsee there\b": "say what it is",
    r"\bat the least\b": "at least",
    r"\beach for itself\b": "separately",
}
# Rooms that are scanned, besides the files at the root.
ROOMS = {"samplers", "figures", "checkpoints", "diagnostics", "data", "nodes", "training", "demo", "cli", "benchmarks",
         "examples", "docs", "web/docs", "README.md"}  # fmt: skip
ELSEWHERE = {"RESULTS.md", "zh.md"}  # rendered from the scripts; in Chinese
KINDS = {".py", ".md", ".toml", ".html"}


def files():
    yield from sorted(ROOT.glob("*.py"))
    for room in sorted(ROOMS):
        place = ROOT / room
        paths = [place] if place.is_file() else sorted(place.rglob("*"))
        yield from (path for path in paths if path.suffix in KINDS and path.name not in ELSEWHERE)


def passages(path):
    """(line, text) of the prose in a file; of Python, the strings as Python joins them, and the comments.

    Other files are cut into paragraphs, which are numbered.
    """
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.split("\n\n"), 1)
        return
    nodes = list(ast.walk(ast.parse(source)))
    joined = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in joined for part in node.values}
    for node in joined:
        yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def habits_in(path):
    for line, text in passages(path):
        words = " ".join(text.split())
        for pattern, instead in HABITS.items():
            for match in re.finditer(pattern, words):
                there = words[max(0, match.start() - 30) : match.end() + 30]
                yield f"{path.relative_to(ROOT)}:{line}: {there!r}; rather {instead!r}"


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_habit_of_the_first_version(path):
    found = list(habits_in(path))
    assert not found, "\n" + "\n".join(found)


def test_habits_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "a.py"
    path.write_text('raise UserError(f"{path} is there "\n    f"already")  # going on from step 4\n')
    assert [line.split(":")[1] for line in habits_in(path)] == ["1", "2"]
