"""A ComfyUI to test in, and a server and a browser that the tests share."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from .server import PACK, SIZE, Server, running_server
from .worker import Inside


def find_comfyui() -> Path:
    return Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser().resolve()


def find_python(comfyui: Path) -> Path | None:
    if named := os.environ.get("COMFYUI_PYTHON"):
        return Path(named)
    candidates = [comfyui / environment / "bin" / "python" for environment in (".venv", "venv")]
    return next((python for python in candidates if python.exists()), None)


def pytest_runtest_setup(item):
    """Without ComfyUI skip all tests of this folder, here rather than in a fixture: it makes one line of the report."""
    comfyui = find_comfyui()
    if not (comfyui / "main.py").exists():
        pytest.skip(f"no ComfyUI in {comfyui}; COMFYUI_PATH says where it is")
    if find_python(comfyui) is None:
        pytest.skip(f"no .venv or venv in {comfyui}; COMFYUI_PYTHON says which interpreter runs it")


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The ComfyUI to test in."""
    return find_comfyui()


@pytest.fixture(scope="session")
def comfyui_python(comfyui_path) -> Path:
    """That ComfyUI's own interpreter."""
    return find_python(comfyui_path)


@pytest.fixture(scope="session")
def inside(comfyui_python, comfyui_path, tmp_path_factory) -> Iterator[Inside]:
    """A process of ComfyUI's own that runs the functions of inside.py and those beside it."""
    inside = Inside(comfyui_python, comfyui_path, tmp_path_factory.mktemp("comfyui") / "log.txt")
    yield inside
    inside.close()


@pytest.fixture(scope="session")
def about(inside) -> dict:
    """What that ComfyUI has: its version, samplers and schedulers, and the pack's nodes."""
    return inside("about")


@pytest.fixture(scope="session")
def small_checkpoint(request, comfyui_path, comfyui_python) -> Path:
    """A small random checkpoint that ComfyUI loads as SDXL with v-prediction and zero terminal SNR."""
    recipe = Path(__file__).with_name("small_checkpoint.py")
    folder = Path(request.config.cache.mkdir("small_checkpoint"))
    path = folder / f"{hashlib.sha256(recipe.read_bytes()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        for old in set(folder.glob("*.safetensors")) - {path}:
            old.unlink(missing_ok=True)
        subprocess.run([comfyui_python, recipe, comfyui_path, path], check=True)
    return path


def _checkpoints_in_workflows() -> set[str]:
    return {
        value
        for file in PACK.glob("workflows/*.json")
        for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]
        for value in node.get("widgets_values") or ()
        if isinstance(value, str) and value.endswith(".safetensors")
    }


@pytest.fixture(scope="session")
def server(comfyui_path, comfyui_python, small_checkpoint, tmp_path_factory) -> Iterator[Server]:
    """A server with the pack in it; the small checkpoint goes by every name that the pack's workflows ask for."""
    names = {"small.safetensors"} | _checkpoints_in_workflows()
    with running_server(
        comfyui_path,
        comfyui_python,
        tmp_path_factory.mktemp("comfyui"),
        packs={"comfyui-ztsnr": PACK},
        checkpoints=dict.fromkeys(names, small_checkpoint),
    ) as running:
        # The one picture that every ComfyUI has in its input folder, only smaller
        with Image.open(comfyui_path / "input" / "example.png") as example:
            example.resize((SIZE, SIZE)).save(running.base / "input" / "example.png")
        yield running


@pytest.fixture(scope="session")
def _frontend(server):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from .browser import CHROMIUM_ARGUMENTS, Frontend

    executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_ARGUMENTS)
        except sync_api.Error as error:
            pytest.skip(f"Chromium does not start; CHROMIUM says where it is ({str(error).splitlines()[0]})")
        with chromium:
            context = chromium.new_context(viewport={"width": 1920, "height": 1080})
            context.set_default_timeout(240_000)  # milliseconds; the machine may be busy
            yield Frontend(context, server.url, "comfyui-ztsnr")


@pytest.fixture
def frontend(_frontend, request, tmp_path):
    """The server's page in a browser, opened anew in English; a picture of it is kept when the test ends."""
    _frontend.screenshots = Path(os.environ.get("ZTSNR_SCREENSHOTS", tmp_path))
    _frontend.screenshots.mkdir(parents=True, exist_ok=True)
    _frontend.open()
    yield _frontend
    _frontend.screenshot(request.node.name.replace("/", "_"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Show the end of the server's log with a failure."""
    report = yield
    if report.failed and (server := getattr(item, "funcargs", {}).get("server")):
        report.sections.append(("log of ComfyUI", server.log()[-4000:]))
    return report
