"""ComfyUI's page in a headless Chromium, with the few things that a test does there."""

import json
from pathlib import Path

from playwright.sync_api import BrowserContext, Response, TimeoutError

# The page finds this machine and no other.  Playwright's own interception would hold up the page's requests for as long
# as a test waits for something else.
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
# No tour, no templates to welcome a new user, no workflows of the test before; and say where a workflow is malformed
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.Validation.Workflows": True,
    "Comfy.Notification.ShowVersionUpdates": False,
    # Text however small; older pages know the first name, newer ones the second
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    # samplers show what they do, as for most users
    "Comfy.Execution.PreviewMethod": "latent2rgb",
}
READY = "() => window.app?.extensionManager && app.graph && app.canvas && !app.extensionManager.spinner"
SEEN = """() => app.graph.nodes.every(node => !app.nodeOutputs[node.id]?.images
    || node.imgs?.length && node.imgs.every(image => image.naturalWidth > 0))"""
# The server's messages of a run, in short: each sampler draws, nodes that show pictures have some, ours say something
MESSAGES = """async sentence => {
    const canvas = new OffscreenCanvas(416, 608);
    canvas.getContext('2d').fillRect(0, 0, 416, 608);
    const blob = await canvas.convertToBlob();
    const images = [{filename: 'example.png', subfolder: '', type: 'input'}];
    for (const {id, type} of app.graph.nodes) {
        const send = (name, detail) => app.api.dispatchCustomEvent(name, detail);
        const node = String(id);
        if (/^(KSampler|SamplerCustom)/.test(type)) send('b_preview_with_metadata', {blob, displayNodeId: node});
        if (/^(SaveImage|ZTSNRScheduler|LatentMean(Diagnostic|Report))/.test(type))
            send('executed', {node, display_node: node, output: {images}});
        if (type === 'ZTSNRModelSampling') send('progress_text', {nodeId: node, text: sentence});
    }
}"""
# Of two nodes that lie over one another the titles; by their real sizes, which in Nodes 2.0 the page alone knows
OVERLAPPING = """() => {
    const place = node => {
        const element = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
        const title = LiteGraph.NODE_TITLE_HEIGHT;
        const [width, height] = element
            ? [element.width / app.canvas.ds.scale, element.height / app.canvas.ds.scale]
            : [node.size[0], node.size[1] + title];
        const [left, top] = [node.pos[0], node.pos[1] - title];
        return {left, top, right: left + width, bottom: top + height, title: node.title};
    };
    const meet = (a, b) => a.left < b.right && a.top < b.bottom;
    const nodes = app.graph.nodes.filter(node => !node.flags?.collapsed).map(place);
    const pairs = nodes.flatMap((a, i) => nodes.slice(i + 1).map(b => [a, b]));
    return pairs.filter(([a, b]) => meet(a, b) && meet(b, a)).map(pair => pair.map(node => node.title));
}"""


class Frontend:
    """The page of a ComfyUI server.

    Attributes:
        page: Playwright's page
        screenshots: the folder that ``screenshot`` writes to
        problems: what went wrong in the page since it was opened, one sentence each
    """

    def __init__(self, context: BrowserContext, url: str, pack: str):
        self.page = context.new_page()
        self.screenshots = Path()
        self.problems: list[str] = []
        self._url = url
        self._pack = pack
        self.page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        self.page.on("response", self._note_failure)

    def _note_failure(self, response: Response) -> None:
        # "docs/<node>/en.md" is looked for before "docs/<node>.md"
        if response.status >= 400 and self._pack in response.url and not response.url.endswith("/en.md"):
            self.problems.append(f"status {response.status}: {response.url}")

    def open(self, locale: str = "en", nodes_2: bool = False) -> None:
        """Open the page anew, in a language, and with nodes drawn on the canvas or, as Nodes 2.0, by the page."""
        settings = {**SETTINGS, "Comfy.Locale": locale, "Comfy.VueNodes.Enabled": nodes_2}
        answer = self.page.request.post(f"{self._url}/api/settings", data=settings)
        assert answer.ok, answer.text()
        self.page.goto(self._url)
        self.page.wait_for_function(READY)
        self.problems.clear()

    def screenshot(self, name: str) -> None:
        self.page.screenshot(path=self.screenshots / f"{name}.png")

    # ------------------------------------------------------------------------------------------------------------------
    # A workflow

    def load(self, workflow: dict) -> None:
        """Load a workflow as it is in a file."""
        self.page.evaluate("async workflow => { await app.loadGraphData(workflow) }", workflow)
        self.fit_view()

    def fit_view(self) -> None:
        """Show the whole graph: what is outside the window is not drawn, and pictures are fetched when drawn."""
        self.page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")

    def workflow(self) -> dict:
        """The workflow as the page would save it now."""
        return json.loads(self.page.evaluate("JSON.stringify(app.graph.serialize())"))

    def missing_nodes(self) -> list[str]:
        """Types of the nodes that ComfyUI does not know."""
        return self.page.evaluate(
            "app.graph.nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types))"
        )

    def complaints(self) -> list[str]:
        """What the page says in red."""
        return self.page.locator(".p-toast-message-error, [data-testid=error-overlay]").all_inner_texts()

    def set_widgets(self, values: dict[str, float | str]) -> None:
        """Type into the widgets of these names; a number only where it makes the one there smaller."""
        self.page.evaluate(
            """values => {
                for (const widget of app.graph.nodes.flatMap(node => node.widgets ?? [])) {
                    if (!(widget.name in values)) continue;
                    const value = values[widget.name];
                    widget.value = typeof value === 'number' ? Math.min(value, widget.value) : value;
                    widget.callback?.(widget.value);
                }
            }""",
            values,
        )

    def connect(self, source: str, output: str, target: str, slot: str) -> None:
        """Add a node and connect one of its outputs to the first node of another type."""
        self.page.evaluate(
            """([source, output, target, slot]) => {
                const node = LiteGraph.createNode(source);
                app.graph.add(node);
                node.pos = [-600, 0];
                node.connect(output, app.graph.nodes.find(node => node.type === target), slot);
            }""",
            [source, output, target, slot],
        )

    def run(self) -> str:
        """Press Run; the id that the server gave the prompt.  RuntimeError if it or the page refuses."""
        try:
            with self.page.expect_response(lambda response: response.url.endswith("/api/prompt")) as sent:
                self.page.get_by_test_id("queue-button").first.click()
        except TimeoutError:
            raise RuntimeError(f"the page does not send the graph: {self.complaints()}") from None
        answer = sent.value.json()
        if "prompt_id" not in answer:
            raise RuntimeError(f"ComfyUI refuses the graph: {json.dumps(answer)}")
        return answer["prompt_id"]

    def pictures(self) -> dict[str, list[int]]:
        """Widths of the pictures that are seen in nodes, by node type, once all have come."""
        self.fit_view()
        self.page.wait_for_function(SEEN)
        pictures = self.page.evaluate(
            "app.graph.nodes.map(node => [node.type, (node.imgs ?? []).map(image => image.naturalWidth)])"
        )
        return {node: widths for node, widths in pictures if widths}

    def says(self, sentence: str) -> bool:
        """Whether a sentence is to be read somewhere in the page."""
        return any(found.is_visible() for found in self.page.get_by_text(sentence).all())

    def wait_for_sentence(self, sentence: str) -> None:
        self.page.get_by_text(sentence).first.wait_for()

    def overlapping(self) -> list[list[str]]:
        """Pairs of node titles that lie over one another, now that nodes have grown by their pictures."""
        return self.page.evaluate(OVERLAPPING)

    def show_a_run(self, sentence: str) -> None:
        """Show what a run shows at its largest, by the server's messages alone: previews, pictures and a sentence."""
        self.page.evaluate(MESSAGES, sentence)
        self.page.wait_for_timeout(500)
        self.fit_view()  # what is outside the window is not drawn, and does not grow
        self.page.wait_for_timeout(500)

    def visible_widgets(self, node: str) -> list[str]:
        """Names of the widgets that a node of this type shows, the first of its type."""
        self.page.wait_for_timeout(200)
        return self.page.evaluate(
            """type => {
                const node = app.graph.nodes.find(node => node.type === type);
                const element = document.querySelector(`[data-node-id="${node.id}"]`);
                const rows = [...element?.querySelectorAll('[data-testid=node-widget]') ?? []];
                const shown = widget => element
                    ? rows.some(row => row.textContent.trim().startsWith(widget.name))
                    : node.isWidgetVisible(widget);
                return node.widgets.filter(shown).map(widget => widget.name);
            }""",
            node,
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Around it

    def templates(self, known: str) -> dict[str, int]:
        """Open the template browser at the pack: the width of each workflow's thumbnail, by the workflow's name.

        One of the names has to be known, to see that the pack's workflows have taken the place of all the others.
        """
        self.page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.get_by_text(self._pack, exact=True).last.click()
        self.page.wait_for_function(
            """known => {
                const cards = [...document.querySelectorAll("[data-testid^='template-workflow-']")];
                return cards.some(card => card.dataset.testid === `template-workflow-${known}`)
                    && cards.every(card => card.querySelector('img')?.naturalWidth > 0);
            }""",
            arg=known,
        )
        thumbnails = self.page.locator("[data-testid^='template-workflow-']").evaluate_all(
            "cards => cards.map(card => [card.dataset.testid, card.querySelector('img').naturalWidth])"
        )
        return {name.removeprefix("template-workflow-"): width for name, width in thumbnails}

    def open_template(self, name: str) -> None:
        """Click a workflow in the template browser, which ``templates`` has opened."""
        with self.page.expect_response(lambda response: response.url.endswith(".json")):
            self.page.get_by_test_id(f"template-workflow-{name}").click()
        self.page.get_by_test_id("template-workflows-content").wait_for(state="hidden")

    def help(self, node: str, heading: str) -> str:
        """Put a node alone on the canvas and open its help, which begins with a heading; the node's title."""
        title = self.page.evaluate(
            """async type => {
                await app.extensionManager.command.execute('Comfy.NewBlankWorkflow');
                const node = LiteGraph.createNode(type);
                app.graph.add(node);
                app.canvas.centerOnNode(node);
                app.canvas.selectNode(node);
                app.canvas.setDirty(true, true);
                return node.title;
            }""",
            node,
        )
        self.page.get_by_test_id("info-button").click()
        self.page.locator(".node-help-content").get_by_role("heading", name=heading, exact=True).first.wait_for()
        return title
