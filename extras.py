"""The libraries that ComfyUI lacks: which extra of the package installs each, and the error for a missing one."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from traceback import walk_tb

# module: extra that installs it
EXTRAS = {
    "accelerate": "diffusers",
    "diffusers": "diffusers",
    "huggingface_hub": "diffusers",
    "safetensors": "diffusers",
    "transformers": "diffusers",
    "click": "cli",
    "jinja2": "cli",
    "skimage": "cli",
    "tabulate": "cli",
    "tqdm": "cli",
    "matplotlib": "plot",
    "peft": "train",
    "pyarrow": "train",
    "pydantic": "train",
    "tensorboard": "train",
    "tomli_w": "train",
    "torchao": "lowbit",
    "lpips": "vae",
    "torchvision": "vae",
}
# Raised by imports that fail because of a missing or broken library: diffusers and transformers import on first use and
# raise RuntimeError, torchvision fails in C++.
IMPORT_ERRORS = (ImportError, RuntimeError, AttributeError, OSError)
PROJECTS = {
    "huggingface_hub": "huggingface-hub",
    "skimage": "scikit-image",
    "tomli_w": "tomli-w",
}  # module: project, where the names differ


class MissingLibraryError(ImportError):
    """A library of an extra is missing or broken.  The message says what to install."""


def how_to_install(module: str) -> str:
    """The commands that install a library, to end a sentence with."""
    project = PROJECTS.get(module, module)
    plainly = f"pip install {project}"
    return f'pip install "comfyui-ztsnr[{EXTRAS[module]}]", or {plainly}' if module in EXTRAS else plainly


def needs(what: str, module: str) -> str:
    """The sentence for something that needs a missing library."""
    return f"{what} needs {PROJECTS.get(module, module)}: {how_to_install(module)}"


def no_matplotlib() -> str | None:
    """The sentence to print instead of drawing pictures, or None if matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return f"Pictures need matplotlib: {how_to_install('matplotlib')}."
    return None


def explain(what: str, error: BaseException) -> str | None:
    """The sentence for an import that failed because of a library of an extra, or None for any other error.

    diffusers and transformers import on first use and raise their own errors, so causes are searched too.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and (module := (cause.name or "").split(".")[0]) in EXTRAS:
            return needs(what, module)
        if _ended_import_of("torchvision", cause):
            return (
                f"torchvision {_version('torchvision')} does not fit torch {_version('torch')} ({cause}), and "
                f"{what} imports transformers, which imports it: pip uninstall torchvision, or install the build for "
                "this torch"
            )
        cause = cause.__cause__
    return None


@contextmanager
def extras_named(what: str) -> Iterator[None]:
    """Replace the error of an import that fails because of a library of an extra.

    Raises:
        MissingLibraryError: Instead of that error.
    """
    try:
        yield
    except IMPORT_ERRORS as error:
        if sentence := explain(what, error):
            raise MissingLibraryError(sentence) from error
        raise


def _ended_import_of(package: str, error: BaseException) -> bool:
    """True if the error was raised while a package was imported, not by its functions later."""
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    return any(f.f_code.co_name == "<module>" and f.f_globals["__name__"].split(".")[0] == package for f in frames)


def _version(project: str) -> str:
    try:
        return version(project)
    except PackageNotFoundError:
        return "(of unknown version)"
