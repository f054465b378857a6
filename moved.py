"""Modules of version 0.1.0 under their old names, for one version more."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

DATA = (
    "arrow_file bucketing bucket_plots bucket_report captions dataset epoch_plan keyed_random latent_cache "
    "latent_stats make_latent_cache picture_boxes pictures prefetch quarantine sources tag_weights tokens"
)
MOVED = {
    "checkpoints.atomic": "files",
    "training.vae": "checkpoints.vae",
    "diagnostics.output": "files",
    "diagnostics.demo": "demo.exact_models",
    "diagnostics.leak_plots": "diagnostics.leak_figure",
    "diagnostics.schedule_picture": "figures.schedule_picture",
    "training.data": "training.run_data",
    "training.decoder_training": "training.decoder.step",
    "training.perceptual": "training.decoder.perceptual",
    "training.reconstruction": "training.decoder.reconstruction",
    "training.small_model": "demo.small_model",
    "training.vae_decoder": "training.decoder.trainer",
    "training.vae_export": "training.decoder.export",
    "training.vae_settings": "training.decoder.settings",
    **{f"training.{name}": f"data.{name}" for name in DATA.split()},
}


class OldNames(MetaPathFinder, Loader):
    """Imports a module by its new name when the old one is asked for, and says so."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an old name; None for every other."""
        return ModuleSpec(name, self) if _new_name(name) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module under its new name, which is the same object."""
        new = _new_name(spec.name)
        warnings.warn(f"{spec.name} is now {new}; the old name is removed in 0.3", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Undo the one change that the import system makes to a module that was imported before."""
        module.__spec__ = module.__spec__.loader_state


def _new_name(name: str) -> str | None:
    if not name.startswith(f"{__package__}.") or (new := MOVED.get(name[len(__package__) + 1 :])) is None:
        return None
    return f"{__package__}.{new}"


def keep_old_names() -> None:
    """Let old names be imported."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
