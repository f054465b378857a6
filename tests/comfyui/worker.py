"""A process of ComfyUI's own interpreter that runs the functions of inside.py on call."""

import json
import os
import select
import subprocess
from pathlib import Path


def own_python(comfyui: Path) -> Path | None:
    """The interpreter of a ComfyUI's own environment."""
    candidates = (comfyui / environment / "bin" / "python" for environment in (".venv", "venv"))
    return next((python for python in candidates if python.exists()), None)


class Inside:
    """``inside(name, **arguments)`` calls a function of inside.py; arguments and result travel as JSON.

    A process that has died or was too slow is replaced at the next call: one test's failure is not that of all others.

    Raises:
        TimeoutError: the call runs longer than its ``timeout``; the process is killed.
        RuntimeError: the call failed, with its traceback, or the process died, with the end of its log.
    """

    def __init__(self, python: Path, comfyui: Path, log: Path):
        self.python, self.comfyui, self.log = python, comfyui, log
        self._start()

    def _start(self) -> None:
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [self.python, Path(__file__).with_name("inside.py"), self.comfyui],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def __call__(self, name: str, timeout: float = 300, **arguments):
        if self.process.poll() is not None:
            self._start()
        self.process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            self.close()
            raise TimeoutError(f"{name}({arguments}) still runs after {timeout} s")
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"ComfyUI's interpreter died:\n{self.log.read_text()[-3000:]}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["result"]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
