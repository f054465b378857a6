"""A ComfyUI server on loopback with a pack and a checkpoint in it."""

import contextlib
import io
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

PACK = Path(__file__).resolve().parents[2]
SIZE = 128  # pixels of the pictures that tests make
FOLDERS = "custom_nodes", "input", "output", "temp", "user", "models/checkpoints", "models/diffusion_models"


class Server:
    """A running ComfyUI.

    Attributes:
        url: where it listens, without a slash at the end
        base: its folder with custom_nodes, models, input, output and user
    """

    def __init__(self, comfyui: Path, python: Path, base: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.base = base
        # Nothing of the tests' own environment may help the pack along
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        arguments = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
        arguments += ["--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}", "--disable-auto-launch"]
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [str(python), "main.py", *arguments, "--disable-api-nodes"],
                cwd=comfyui,
                env={**environment, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def _log_file(self) -> Path:
        return self.base / "server.log"

    def log(self) -> str:
        """What it has printed so far."""
        return self._log_file.read_text(encoding="utf-8", errors="replace")

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with status {self._process.returncode}:\n{self.log()[-4000:]}")

    def wait_until_ready(self, seconds: float = 600) -> None:
        """Until it answers; RuntimeError with the end of its log if it never does."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._check_alive()
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not answer within {seconds:.0f} s:\n{self.log()[-4000:]}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def request(self, path: str, content: object = None) -> bytes:
        """What the server answers to GET, or to POST if there is any content (sent as JSON)."""
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> dict:
        return json.loads(self.request(path))

    def object_info(self, node: str | None = None) -> dict:
        """The definition of one node, or of all by their id."""
        return self.get("/object_info") if node is None else self.get(f"/object_info/{node}")[node]

    def queue(self, prompt: dict, seconds: float = 600) -> dict[str, dict]:
        """Run a graph in the API's form; what its nodes show, by node id.

        Raises RuntimeError with ComfyUI's words if the graph is refused or a node fails.
        """
        try:
            prompt_id = json.loads(self.request("/prompt", {"prompt": prompt}))["prompt_id"]
        except urllib.error.HTTPError as refusal:
            raise RuntimeError(f"ComfyUI refuses the graph: {refusal.read().decode()}") from None
        return self.wait_for(prompt_id, seconds)

    def wait_for(self, prompt_id: str, seconds: float = 600) -> dict[str, dict]:
        """What the nodes of a queued graph show once it has run, as ``queue`` does."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._check_alive()
            if entry := self.get(f"/history/{prompt_id}").get(prompt_id):
                if entry["status"]["status_str"] != "success":
                    raise RuntimeError(_failure(entry["status"]["messages"]))
                return entry["outputs"]
            time.sleep(0.1)
        raise RuntimeError(f"ComfyUI did not finish within {seconds:.0f} s:\n{self.log()[-4000:]}")

    def forget(self) -> None:
        """Have it run every node of the next graph: what it remembers from the one before shows nothing."""
        self.request("/free", {"free_memory": True})

    def image(self, image: dict) -> np.ndarray:
        """(H, W, 3) uint8 of one entry of a node's "images"."""
        query = urllib.parse.urlencode({name: image[name] for name in ("filename", "subfolder", "type")})
        with Image.open(io.BytesIO(self.request(f"/view?{query}"))) as picture:
            return np.asarray(picture.convert("RGB"))


def _failure(messages: list) -> str:
    for kind, details in messages:
        if kind == "execution_error":
            where = f"node {details['node_id']} ({details['node_type']})"
            return f"{where}: {details['exception_type']}: {details['exception_message'].strip()}"
    return f"the graph did not run to its end: {messages}"


@contextlib.contextmanager
def running_server(
    comfyui: Path, python: Path, base: Path, packs: dict[str, Path], checkpoints: dict[str, Path]
) -> Iterator[Server]:
    """A ComfyUI server that has these packs and checkpoints, by the names they go by, and nothing else of the user's.

    Args:
        comfyui, python: the ComfyUI folder and its interpreter; neither is changed
        base: an empty folder for everything that ComfyUI writes
    """
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True)
    for name, pack in packs.items():
        (base / "custom_nodes" / name).symlink_to(pack, target_is_directory=True)
    for name, checkpoint in checkpoints.items():
        (base / "models" / "checkpoints" / name).symlink_to(checkpoint)
    server = Server(comfyui, python, base)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
