"""What several rooms' tests use."""

import json
import math
import struct
import subprocess
import threading

import pytest
import torch
from tqdm import tqdm

# the tests' tensors are small, and the threads of two workers would only wait for each other
torch.set_num_threads(1)

# Progress bars share a lock with the processes that are forked here.  One that a test kills while a bar is drawn would
# keep it, and the next bar, of whatever test, would wait for ever.
tqdm.set_lock(threading.RLock())

LONG = ("slow", "comfyui", "gpu")

# Files that train, render, run pipelines or start programs; the tests of all others are the inner loop, pytest -m fast.
NOT_FAST = {
    "tests": {
        "benchmarks",
        "cli",
        "cli_stderr",
        "completely_black",
        "docs",
        "examples",
        "extras",
        "float32_device",
        "guided_benchmark",
    }
    | {"leak_command", "locks", "pipelines_benchmark", "publishing", "windows"},
    "checkpoints": {
        "complete",
        "diffusers_folder",
        "forward",
        "fuzz_corpus",
        "header",
        "latent_scaling",
        "lora",
        "mark",
    }
    | {"pipeline", "published", "schedule_shift", "single_file", "strangers", "verify"},
    "data": {"bucket_report", "buckets_benchmark", "latent_cache", "windows_files"},
    "decoder": {"export", "trainer"},
    "demo": {"evaluation", "example", "ideal_solids", "networks", "networks_sheet", "reproduction_benchmark", "shipped"}
    | {"small_model", "trainings", "workers"},
    "diagnostics": {"guidance_shift", "leak", "leak_plots", "leak_trained"},
    "mutation": set(),
    "samplers": {"diffusers_guidance", "diffusers_guider", "diffusers_pipelines", "diffusers_run"},
    "training": {"export", "flops", "main_job", "memory_plan", "networks", "optimizers", "parallel", "previews"}
    | {"speed", "torchrun", "train_throughput", "trainer"},
}

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1}


def pytest_collection_modifyitems(items):
    for item in items:
        if any(map(item.get_closest_marker, LONG)):
            item.add_marker(pytest.mark.timeout(3600))
        elif item.path.stem.removeprefix("test_") not in NOT_FAST.get(item.path.parent.name, ()):
            item.add_marker("fast")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a tiny SDXL and pictures, for ``tiny_run.make_content``."""
    from .tiny_pipelines import make_tiny_sdxl
    from .training.tiny_run import write_pictures

    folder = tmp_path_factory.mktemp("place")
    make_tiny_sdxl(folder / "tiny", prediction_type="epsilon", zero_snr=False)
    write_pictures(folder / "pictures")
    return folder


@pytest.fixture
def one_thread():
    """Whatever ran before, a test of small tensors computes with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def mount_disk(tmp_path):
    """``mount_disk("64k")`` makes a file system of its own, of that size, and gives its folder."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
        ).returncode:
            pytest.skip("only root may mount")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="session")
def write_checkpoint():
    """Checkpoint files that are all header, their tensors being holes:

    write(path, {name: shape or (dtype, *shape)}, metadata=None, default dtype) -> path
    """

    def write(path, shapes, metadata=None, dtype="F16"):
        content, end = ({"__metadata__": metadata} if metadata else {}), 0
        for name, shape in shapes.items():
            kind, shape = (shape[0], shape[1:]) if shape and isinstance(shape[0], str) else (dtype, shape)
            begin, end = end, end + math.prod(shape) * BYTES[kind]
            content[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(content).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        return path

    return write


@pytest.fixture
def float32_device(monkeypatch):
    """A stand-in for a device without float64, on which everything has to run that runs on a device."""
    from . import float32_device

    device = float32_device.make_device()
    if device is None:
        pytest.skip("this torch has an accelerator already, or makes none in Python")
    monkeypatch.setattr(torch, "Generator", float32_device.Generator)
    # a module that goes to a device keeps its parameters otherwise, and takes over numbers that are stored elsewhere
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield device
    torch.__future__.set_overwrite_module_params_on_conversion(before)
