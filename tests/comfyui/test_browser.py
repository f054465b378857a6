"""The pack in ComfyUI's page: templates, workflows, pictures in nodes, help pages."""

import json
import re
from pathlib import Path

import pytest

from .server import PACK, SIZE

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(900)]  # the page waits for whatever else the machine does

WORKFLOWS = sorted(PACK.glob("workflows/*.json"))
HELP_PAGES = sorted(PACK.glob("web/docs/*.md"))
WITH_PICTURES = {"PreviewImage", "SaveImage", "ZTSNRScheduler", "LatentMeanDiagnostic", "LatentMeanReport"}
SENTENCE = "v-prediction, zero terminal SNR, exact first step from infinity."

each_workflow = pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
both_renderers = pytest.mark.parametrize("nodes_2", [False, True], ids=["canvas", "nodes 2.0"])


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


@each_workflow
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


@both_renderers
@pytest.mark.parametrize("locale", ["en", "zh"])
def test_nothing_covers_anything(frontend, locale, nodes_2):
    """Also with the previews, pictures and sentences of a run."""
    frontend.open(locale, nodes_2)
    for file in WORKFLOWS:
        frontend.load(json.loads(file.read_text(encoding="utf-8")))
        frontend.show_a_run(SENTENCE)
        frontend.screenshot(f"{file.stem} {locale}{' nodes 2.0' * nodes_2}")
        assert frontend.says(SENTENCE) == ("ZTSNRModelSampling" in file.read_text(encoding="utf-8"))
        assert frontend.overlapping() == [], file.stem
    assert frontend.problems == []


@both_renderers
def test_widgets_that_do_nothing_are_hidden(frontend, nodes_2):
    frontend.open(nodes_2=nodes_2)
    frontend.load(json.loads((PACK / "workflows" / "custom_sampling.json").read_text(encoding="utf-8")))
    bucket, sampler, scheduler = "ZTSNRBucketLatent", "ZTSNRSampler", "ZTSNRScheduler"
    heights = {node["type"]: node["size"][1] for node in frontend.workflow()["nodes"]}
    assert frontend.visible_widgets(bucket) == ["size", "batch_size"]
    assert frontend.visible_widgets(sampler) == ["solver", "cfg_pp"]
    assert frontend.visible_widgets(scheduler) == ["steps", "spacing", "denoise", "cfg", "sigma_start"]

    frontend.set_widgets({"size": "SDXL: nearest to image or ratio", "solver": "lcm", "spacing": "karras"})
    assert frontend.visible_widgets(bucket) == ["size", "ratio_width", "ratio_height", "batch_size"]
    assert frontend.visible_widgets(sampler) == ["solver", "s_noise", "cfg_pp"]
    assert frontend.visible_widgets(scheduler) == ["steps", "spacing", "denoise", "sigma_start"]

    frontend.connect("LoadImage", "IMAGE", bucket, "image")
    frontend.set_widgets({"solver": "er_sde", "spacing": "trailing"})
    assert frontend.visible_widgets(bucket) == ["size", "batch_size"]
    assert frontend.visible_widgets(sampler) == ["solver", "eta", "s_noise", "cfg_pp"]
    assert frontend.visible_widgets(scheduler) == ["steps", "spacing", "denoise"]

    # a saved workflow comes back as it was
    saved = frontend.workflow()
    frontend.load(saved)
    assert changes(saved, frontend.workflow()) == []
    assert frontend.visible_widgets(bucket) == ["size", "batch_size"]
    assert frontend.visible_widgets(sampler) == ["solver", "eta", "s_noise", "cfg_pp"]

    frontend.set_widgets({"solver": "spectral", "spacing": "spectral"})
    assert frontend.visible_widgets(sampler) == ["solver", "cfg_pp"]
    if not nodes_2:  # where the page itself makes nodes as high as they have to be
        now = {node["type"]: node["size"][1] for node in frontend.workflow()["nodes"]}
        assert {node: now[node] for node in (sampler, scheduler)} == {
            node: heights[node] for node in (sampler, scheduler)
        }
    assert frontend.problems == []


def test_the_sentence_comes_back(frontend, server):
    """In a page that is opened anew: at once if the graph is as it was, and else when it has come from the cache."""
    server.forget()
    workflow = json.loads((PACK / "workflows" / "text_to_image.json").read_text(encoding="utf-8"))
    small = {"size": "NovelAI 2022: 256 x 1024 (1:4)", "steps": 1}
    frontend.load(workflow)
    frontend.set_widgets(small)
    server.wait_for(frontend.run())
    frontend.wait_for_sentence(SENTENCE)

    frontend.open()
    frontend.load(workflow)
    frontend.wait_for_sentence(SENTENCE)
    frontend.load(json.loads(json.dumps(workflow).replace('"exact infinity"', '"as ComfyUI does it"')))
    frontend.page.wait_for_timeout(2000)
    assert not frontend.says(SENTENCE)  # of another choice

    server.request("/history", {"clear": True})
    frontend.open()
    frontend.load(workflow)
    frontend.set_widgets(small)
    frontend.page.wait_for_timeout(2000)
    assert not frontend.says(SENTENCE)
    log = len(server.log())
    server.wait_for(frontend.run())
    frontend.wait_for_sentence(SENTENCE)
    assert SENTENCE not in server.log()[log:]  # the node did not run
    assert frontend.problems == []


def test_templates_are_in_chinese(frontend):
    """The note, and titles of nodes and groups; what is computed stays the same, and so does what a user has saved."""
    file = PACK / "workflows" / "completely_black.json"
    frontend.open("zh")
    frontend.templates(file.stem)
    frontend.screenshot("templates zh")
    frontend.open_template(file.stem)
    frontend.page.wait_for_function("() => app.graph.nodes.some(node => node.type === 'MarkdownNote')")
    workflow = frontend.workflow()
    (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    assert note["title"] == "“全黑”"
    assert note["widgets_values"][0].startswith("**检查点")
    assert workflow["groups"][0]["title"].startswith("1  精确")
    was = json.loads(file.read_text(encoding="utf-8"))
    assert {kind for (kind, *_), _ in changes(was, workflow)} == {"MarkdownNote"}

    note["title"], note["widgets_values"] = "Guidance", ["mine"]
    frontend.load(workflow)
    assert changes(workflow, frontend.workflow()) == []
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
