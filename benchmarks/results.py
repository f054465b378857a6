"""Writing a benchmark's tables into RESULTS.md; it needs neither torch nor diffusers."""

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

from tabulate import tabulate

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


def machine(comfyui: Path | None) -> str:
    """Processor, system and versions."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text() + "model name: unknown")[1]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "numpy")]
    if comfyui is not None:
        version_file = comfyui / "comfyui_version.py"
        found = re.search(r'__version__ = "(.*)"', version_file.read_text()) if version_file.exists() else None
        versions.append(f"ComfyUI {found[1] if found else 'of unknown version'}")
    system = f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}"
    threads = f"{os.cpu_count()} cores"
    if "torch" in sys.modules:  # a table of other things must not load it
        threads += f", {sys.modules['torch'].get_num_threads()} threads"
    return f"{processor}, {threads}; {system}; {', '.join(versions)}"


def write_section(path: Path, heading: str, text: str) -> None:
    """Replace the section of level 2 with this heading in a Markdown file, or append it."""
    old = path.read_text(encoding="utf-8") if path.exists() else "# Results\n\nWritten by the scripts of this folder.\n"
    section = f"## {heading}\n\n{text.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(old):
        new = pattern.sub(lambda found: section + "\n" * (found.end() < len(old)), old, count=1)
    else:
        new = f"{old.rstrip()}\n\n{section}"
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(new, encoding="utf-8")
    os.replace(unfinished, path)


def markdown(table: list[list[str]]) -> str:
    """A table, its first row the head, as Markdown; numbers stand on the right."""
    first_number = 3 if "spacing" in table[0] else 1
    align = ["left"] * first_number + ["right" if first_number == 3 else "left"] * (len(table[0]) - first_number)
    return tabulate(table[1:], table[0], tablefmt="github", colalign=align, disable_numparse=True)
