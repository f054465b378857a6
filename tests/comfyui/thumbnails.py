"""Thumbnails of the templates whose picture is the nodes themselves, photographed in ComfyUI's page.

    python tests/comfyui/thumbnails.py [COMFYUI]

Writes workflows/<template>.jpg.  completely_black's is made by benchmarks/black_and_white.py.
"""

import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comfyui.browser import CHROMIUM_ARGUMENTS, Frontend
from comfyui.server import PACK, running_server
from comfyui.worker import own_python

NAME = "comfyui-ztsnr"  # of the folder in custom_nodes, which nodes show
SIDE = 512
LABEL = 60  # pixels that ComfyUI's label takes at the upper left
SENTENCE = "v-prediction, zero terminal SNR, exact first step from infinity."
# What is seen of each: node id -> (left, top), in the graph's units
PLACES = {
    "text_to_image": {2: (0, 0), 6: (130, 330)},
    "high_resolution": {2: (0, 0), 3: (0, 330)},
    "image_to_image": {3: (0, 0), 6: (440, 0), 9: (440, 240)},
    "inpainting": {3: (0, 0), 7: (440, 0), 9: (440, 180), 10: (440, 390)},
}
SENTENCES = {"high_resolution": SENTENCE.replace(".", "; every sigma times 1.5.")}
ALONE = """([places, sentence]) => {
    for (const node of [...app.graph.nodes]) {
        if (!(node.id in places)) app.graph.remove(node);
        else {
            node.pos = places[node.id];
            if (node.type === 'ZTSNRModelSampling')
                app.api.dispatchCustomEvent('progress_text', {nodeId: String(node.id), text: sentence});
        }
    }
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [500, 400];
    app.graph.setDirtyCanvas(true, true);
}"""
BOX = """() => {
    const boxes = app.graph.nodes.map(n => document.querySelector(`[data-node-id="${n.id}"]`).getBoundingClientRect());
    const [left, top] = ['left', 'top'].map(side => Math.min(...boxes.map(box => box[side])));
    return [left, top, Math.max(...boxes.map(box => box.right)) - left, Math.max(...boxes.map(b => b.bottom)) - top];
}"""


def photograph(frontend: Frontend, name: str) -> Image.Image:
    """The chosen nodes of a template, in a square that leaves room for the label."""
    frontend.load(json.loads((PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8")))
    frontend.page.wait_for_timeout(2000)  # pictures of inputs come
    frontend.page.evaluate(ALONE, [PLACES[name], SENTENCES.get(name, SENTENCE)])
    frontend.page.wait_for_timeout(1500)
    left, top, width, height = frontend.page.evaluate(BOX)
    side = max(width / 0.9, height / (0.95 - LABEL / SIDE))
    bottom = top + height + (side * (1 - LABEL / SIDE) - height) / 2
    clip = {"x": left + width / 2 - side / 2, "y": bottom - side, "width": side, "height": side}
    with Image.open(io.BytesIO(frontend.page.screenshot(clip=clip))) as shot:
        return shot.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main(comfyui: Path) -> None:
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(comfyui, own_python(comfyui), Path(folder), {NAME: PACK}, {}) as server,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=executable, args=CHROMIUM_ARGUMENTS) as chromium,
    ):
        shutil.copy(comfyui / "input" / "example.png", server.base / "input")
        context = chromium.new_context(viewport={"width": 1920, "height": 1400}, device_scale_factor=2)
        context.set_default_timeout(240_000)
        frontend = Frontend(context, server.url, NAME)
        frontend.open(nodes_2=True)
        # nothing but the nodes
        frontend.page.add_style_tag(content="[data-testid*=minimap], .litegraph-minimap {display: none !important}")
        for name in PLACES:
            photograph(frontend, name).save(PACK / "workflows" / f"{name}.jpg", quality=90)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "~/comfy/ComfyUI").expanduser().resolve())
