"""Help pages and translations say what the nodes are.  The nodes are read, not imported: that would take a ComfyUI."""

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from ztsnr.samplers import SOLVERS, SPACINGS

ROOT = Path(__file__).resolve().parent.parent
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Slot:
    """An input or output; the name of an output is its display name."""

    name: str
    tooltip: str


@dataclass(frozen=True)
class Node:
    name: str
    display_name: str
    description: str
    search_aliases: list[str]
    inputs: list[Slot]
    outputs: list[Slot]

    def page(self, language: str) -> str:
        """The help page, from where ComfyUI's frontend fetches it."""
        file = f"{self.name}.md" if language == "en" else f"{self.name}/{language}.md"
        return (ROOT / "web" / "docs" / file).read_text(encoding="utf-8")


def text(expression: ast.expr | None) -> str:
    return expression.value if isinstance(expression, ast.Constant) and isinstance(expression.value, str) else ""


def keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords}


def read_nodes(source: str) -> list[Node]:
    """All nodes of a file, from its calls of schema(...)."""
    nodes = []
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "schema"):
            continue
        fields = keywords(call)
        inputs = [Slot(text(slot.args[0]), text(keywords(slot).get("tooltip"))) for slot in fields["inputs"].elts]
        outputs = [keywords(slot) for slot in fields["outputs"].elts]
        nodes.append(
            Node(
                name=text(fields["node_id"]),
                display_name=text(fields["display_name"]),
                description=text(fields.get("description")),
                search_aliases=[text(alias) for alias in fields["search_aliases"].elts],
                inputs=inputs,
                outputs=[Slot(text(slot["display_name"]), text(slot.get("tooltip"))) for slot in outputs],
            )
        )
    return nodes


SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "nodes").glob("*.py"))}
NODES = [node for source in SOURCES.values() for node in read_nodes(source)]
CHINESE_TEXTS = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))

each_node = pytest.mark.parametrize("node", NODES, ids=lambda node: node.name)
each_page = pytest.mark.parametrize("language", ["en", "zh"])


def test_all_nodes_are_read():
    classes = {
        definition.name
        for source in SOURCES.values()
        for definition in ast.walk(ast.parse(source))
        if isinstance(definition, ast.ClassDef) and any(ast.unparse(b) == "io.ComfyNode" for b in definition.bases)
    }
    assert {node.name for node in NODES} == classes
    assert len(classes) >= 6


@each_node
def test_nodes_explain_themselves(node):
    assert node.display_name
    assert node.description
    assert node.search_aliases
    assert all(node.search_aliases)
    assert node.inputs
    assert [slot.name for slot in (*node.inputs, *node.outputs) if not (slot.name and slot.tooltip)] == []


# ----------------------------------------------------------------------------------------------------------------------
# Help pages


@each_page
@each_node
def test_help_pages_are_complete(node, language):
    page = node.page(language)
    title = node.display_name if language == "en" else CHINESE_TEXTS[node.name]["display_name"]
    assert page.startswith(f"# {title}\n\n")
    assert [slot.name for slot in (*node.inputs, *node.outputs) if f"`{slot.name}`" not in page] == []
    if language == "zh":
        assert len(CHINESE.findall(page)) > 200


def test_there_is_no_page_of_an_unknown_node():
    docs = ROOT / "web" / "docs"
    assert {page.stem for page in docs.glob("*.md")} == {node.name for node in NODES}
    assert {page.parent.name for page in docs.glob("*/*.md")} == {node.name for node in NODES}


@each_page
@pytest.mark.parametrize(("name", "choices"), [("ZTSNRScheduler", SPACINGS), ("ZTSNRSampler", SOLVERS)])
def test_help_pages_name_every_choice(name, choices, language):
    (node,) = (node for node in NODES if node.name == name)
    assert [choice for choice in choices if f"`{choice}`" not in node.page(language)] == []


@each_page
@each_node
def test_links_of_help_pages_leave_the_page(node, language):
    """The frontend leaves a relative link as it is, so it would lead nowhere."""
    targets = re.findall(r"\]\(([^)]*)\)", node.page(language))
    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []


def messages_of(page: str) -> list[str]:
    """What the page quotes: the bold beginnings of its list of messages."""
    (section,) = re.findall(r"^## (?:Messages|提示信息)\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)
    return re.findall(r"^- \*\*(.*?)\*\*", section, re.MULTILINE)


@each_page
def test_quoted_messages_are_those_of_the_code(language):
    said = [
        constant.value
        for room in ("nodes", "samplers", "checkpoints")
        for path in (ROOT / room).glob("*.py")
        for constant in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    ]
    quoted = [message for node in NODES for message in messages_of(node.page(language))]
    assert len(quoted) > 20
    assert [message for message in quoted if not any(message in sentence for sentence in said)] == []


@each_node
def test_both_pages_quote_the_same_messages(node):
    assert messages_of(node.page("en")) == messages_of(node.page("zh"))


# ----------------------------------------------------------------------------------------------------------------------
# Translations


def test_every_node_is_translated_and_nothing_else():
    assert set(CHINESE_TEXTS) == {node.name for node in NODES}


@each_node
def test_translations_are_complete(node):
    texts = CHINESE_TEXTS[node.name]
    assert set(texts) == {"display_name", "description", "inputs", "outputs"}
    assert list(texts["inputs"]) == [slot.name for slot in node.inputs]
    assert list(texts["outputs"]) == [str(index) for index in range(len(node.outputs))]
    slots = [*texts["inputs"].values(), *texts["outputs"].values()]
    for slot in slots:
        assert set(slot) == {"name", "tooltip"}
        assert slot["name"]
    for sentence in (texts["display_name"], texts["description"], *(slot["tooltip"] for slot in slots)):
        assert CHINESE.search(sentence)
        assert not re.search(r"[{}@|]", sentence)  # which the frontend's translator takes for its own syntax


# ----------------------------------------------------------------------------------------------------------------------
# Templates

WORKFLOWS = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "workflows").glob("*.json"))
}
NOTES = {
    node["title"]: node["widgets_values"][0]
    for workflow in WORKFLOWS.values()
    for node in workflow["nodes"]
    if node["type"] == "MarkdownNote"
}
TEMPLATE_TEXTS = json.loads((ROOT / "web" / "templates" / "zh.json").read_text(encoding="utf-8"))


def test_templates_are_translated_and_nothing_else():
    titles = {
        item["title"]
        for workflow in WORKFLOWS.values()
        for item in workflow["nodes"] + workflow["groups"]
        if "title" in item
    }
    assert set(TEMPLATE_TEXTS["titles"]) == titles
    assert set(TEMPLATE_TEXTS["notes"]) == set(NOTES)


def test_templates_say_that_they_are():
    """The page translates these alone, and takes the mark off, so that what a user saves stays as it is."""
    assert all(workflow["extra"]["ztsnr_template"] is True for workflow in WORKFLOWS.values())


@pytest.mark.parametrize("title", NOTES)
def test_translated_notes_say_the_same(title):
    """As many paragraphs, the same numbers, links and names in code."""
    english, chinese = NOTES[title], TEMPLATE_TEXTS["notes"][title]
    assert len(CHINESE.findall(chinese)) > 50
    for pattern in (r"\n\n", r"\d+(?:\.\d+)?", r"https?://[^)]+", r"`(?:ztsnr_\w+|dpmpp_2m|euler|simple)`"):
        assert sorted(re.findall(pattern, chinese)) == sorted(re.findall(pattern, english))


def test_the_chinese_readme_has_the_numbers_of_the_english_one():
    english, chinese = (
        [
            re.findall(r"[-+]?\d+\.\d+", line)
            for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
            if line.startswith("|")
        ]
        for name in ("README.md", "README.zh.md")
    )
    measured = [numbers for numbers in chinese if len(numbers) >= 4]
    assert len(measured) == 8
    assert measured == [numbers for numbers in english if len(numbers) >= 4]
