"""The pack in ComfyUI's page: templates, workflows, pictures in nodes, help pages."""

import json
import re
from pathlib import Path

import pytest

from .server import PACK, SIZE

pytestmark = pytest.mark.comfyui

WORKFLOWS = sorted(PACK.glob("workflows/*.json"))
HELP_PAGES = sorted(PACK.glob("web/docs/*.md"))
WITH_PICTURES = {"PreviewImage", "SaveImage", "ZTSNRScheduler", "LatentMeanDiagnostic", "LatentMeanReport"}


def nodes_and_links(workflow: dict) -> tuple[dict, set]:
    """Type, mode and widget values of each node by its id; the links as (from, slot, to, slot)."""
    nodes = {
        str(node["id"]): (node["type"], node["mode"], node.get("widgets_values") or []) for node in workflow["nodes"]
    }
    return nodes, {tuple(map(str, link[1:5])) for link in workflow["links"]}


def changes(before: dict, after: dict) -> list[tuple]:
    """What differs between two workflows but for places and sizes: nodes as they were and are, and links."""
    (nodes, links), (nodes_now, links_now) = nodes_and_links(before), nodes_and_links(after)
    pairs = [(nodes.get(name), nodes_now.get(name)) for name in sorted(nodes | nodes_now)]
    return [(was, now) for was, now in pairs if was != now] + sorted(links ^ links_now)


def heading(page: Path) -> str:
    return re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE).group(1).strip()


# ----------------------------------------------------------------------------------------------------------------------


def test_templates_have_thumbnails_and_open(frontend):
    file = WORKFLOWS[0]
    thumbnails = frontend.templates(file.stem)
    frontend.screenshot("templates")
    assert set(thumbnails) == {file.stem for file in WORKFLOWS}
    assert min(thumbnails.values()) >= 256
    frontend.open_template(file.stem)
    workflow = json.loads(file.read_text(encoding="utf-8"))
    frontend.page.wait_for_function("count => app.graph.nodes.length === count", arg=len(workflow["nodes"]))
    assert changes(workflow, frontend.workflow()) == []
    assert frontend.problems == []


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflow_keeps_its_values_and_runs(file, frontend, server):
    server.forget()
    workflow = json.loads(file.read_text(encoding="utf-8"))
    frontend.load(workflow)
    assert frontend.missing_nodes() == []
    assert changes(workflow, frontend.workflow()) == []
    assert any(node["type"] in ("MarkdownNote", "Note") for node in workflow["nodes"])
    frontend.screenshot(f"{file.stem} as loaded")

    small = {"width": SIZE, "height": SIZE, "size": "NovelAI 2022: 256 x 1024 (1:4)", "steps": 2, "seeds": 2}
    frontend.set_widgets(small)
    outputs = server.wait_for(frontend.run())
    images = [image for output in outputs.values() for image in output.get("images", ())]
    assert images
    for image in images:
        assert server.image(image).std() > 5  # a picture of NaN is black

    seen = frontend.pictures()
    shown = {node["type"] for node in workflow["nodes"]} & WITH_PICTURES
    assert shown <= set(seen)
    sentences = [line for output in outputs.values() for text in output.get("text", ()) for line in text.splitlines()]
    assert [sentence for sentence in sentences if not frontend.says(sentence)] == []
    assert frontend.overlapping() == []
    assert frontend.complaints() == []
    assert frontend.problems == []


@pytest.mark.parametrize("locale", ["en", "zh"])
def test_help_pages(frontend, server, locale):
    frontend.open(locale)
    for english in HELP_PAGES:
        node = english.stem
        if locale == "en":
            page, title = english, server.object_info(node)["display_name"]
        else:
            page, title = english.with_suffix("") / "zh.md", server.get("/i18n")["zh"]["nodeDefs"][node]["display_name"]
        assert frontend.help(node, heading(page)) == title
        frontend.screenshot(f"{node} {locale}")
    assert frontend.problems == []
