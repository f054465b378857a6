"""Hashes of the files of a base model, by which a resumed run knows the base that it began with.

A file is hashed once.  Its hash is kept in the run's folder with the file's size and date, so that a resume reads
nothing while neither has changed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.pipeline import weights_variant
from ..errors import UserError
from ..files import write_atomically
from ..world import World

HASHES = "base_hashes.json"  # in the run's folder
FILE = "file"  # the only part of a single file
PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")
# of a network's config.json: which program wrote it, and in which dtype it was saved
PASSING = {"transformers_version", "torch_dtype", "dtype"}


def base_hashes(base: Path, cache: Path, world: World) -> dict[str, str]:
    """Part of the base -> SHA-256 of its content.  All processes call this; the first reads the files.

    Args:
        base: single file or diffusers folder.
        cache: file of the hashes that are known; it is written anew when one is added.
        world: the processes of the run.

    Raises:
        UserError: a file cannot be read, or the cache cannot be written; in all processes.
    """
    return world.by_first(lambda: _hash_parts(base, cache))


def changed_parts(base: Path, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The parts whose content differs, in words; "" if none does."""
    names = [name for name in (FILE, *PARTS) if before.get(name) != now.get(name)]
    if (FILE in before) != (FILE in now):
        kind = "a single file" if FILE in before else "a diffusers folder"
        return f"it was {kind}, and {base} is not"
    differing = [str(base if name == FILE else base / name) for name in names]
    if not differing:
        return ""
    return f"{' and '.join(differing)} {'has' if len(differing) == 1 else 'have'} another content"


def _hash_parts(base: Path, cache: Path) -> dict[str, str]:
    known = _read_cache(cache)
    before = dict(known)
    try:
        if base.is_file():
            found = {FILE: _hash_file(base, known)}
        else:
            variant = weights_variant(base)
            parts = [base / name for name in PARTS if (base / name).is_dir()]
            found = {part.name: _hash_part(part, variant, known) for part in parts}
    except OSError as error:
        raise UserError(f"{error.filename or base} cannot be read: {error.strerror or error}") from None
    if known != before:
        write_atomically(cache, (json.dumps(known, indent=2) + "\n").encode())
    return found


def _read_cache(cache: Path) -> dict[str, dict[str, Any]]:
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or one that somebody edited: hash again
        return {}
    return known if isinstance(known, dict) else {}


def _hash_part(part: Path, variant: str | None, known: dict[str, dict[str, Any]]) -> str:
    """The hash of a network's settings and weights."""
    digest = hashlib.sha256(_settings(part / "config.json"))
    for file in _weights(part, variant):
        digest.update(_hash_file(file, known).encode())
    return digest.hexdigest()


def _weights(part: Path, variant: str | None) -> list[Path]:
    """The files that are loaded: of the variant if the network has it, else those without one."""
    files = sorted(part.glob("*.safetensors"))
    of_variant = [file for file in files if variant and f".{variant}" in file.name.removesuffix(".safetensors")]
    plain = [file for file in files if re.fullmatch(r"\w+(-\d+-of-\d+)?\.safetensors", file.name)]
    return of_variant or plain or files


def _settings(path: Path) -> bytes:
    """The content of a config.json, whoever wrote it last."""
    content = path.read_bytes() if path.is_file() else b""
    try:
        config = json.loads(content)
    except ValueError:
        return content
    if not isinstance(config, dict):
        return content
    kept = {key: value for key, value in config.items() if key not in PASSING and not key.startswith("_")}
    return json.dumps(kept, sort_keys=True).encode()


def _hash_file(path: Path, known: dict[str, dict[str, Any]]) -> str:
    """A file's SHA-256, from ``known`` if its size and date are those of the last time."""
    name, about = str(path.resolve()), path.stat()
    stamp = {"size": about.st_size, "mtime_ns": about.st_mtime_ns}
    entry = known.get(name)
    if not (isinstance(entry, dict) and {key: entry.get(key) for key in stamp} == stamp and "sha256" in entry):
        with path.open("rb") as file:
            entry = known[name] = {**stamp, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return entry["sha256"]
