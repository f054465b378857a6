"""The problems of ``sampler_accuracy`` as arrays, and the worker that solves them with a real ComfyUI.

Run by ComfyUI's own Python, which knows neither diffusers nor this package: torch and numpy are all that is shared.
The worker reads EXCHANGE/problems.npz and writes one EXCHANGE/row_*.npz for every sampler and scheduler.

    python comfyui_peer.py COMFYUI EXCHANGE
"""

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

SAMPLERS = ("euler", "dpmpp_2m")


def load_package() -> None:
    """Make ``import ztsnr`` work from this checkout, installed or not: its root is the package."""
    if "ztsnr" not in sys.modules:
        root = Path(__file__).resolve().parent.parent
        spec = importlib.util.spec_from_file_location(
            "ztsnr", root / "__init__.py", submodule_search_locations=[str(root)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["ztsnr"] = module
        spec.loader.exec_module(module)


def ideal_model(problem: Mapping[str, np.ndarray]) -> Callable[[torch.Tensor, float], torch.Tensor]:
    """The closed-form denoiser of a problem.

    Args:
        problem: ``kind``, and for "canvas": mean, brightness_std, texture_std; for "modes": stds (M,); for "mixture":
            means (K, ...), weights (K,), stds (K,), and a guidance scale, 1 for none: then the prompt is the first two
            modes (classifier-free guidance against all of them).
    """
    from ztsnr.diagnostics import GaussianCanvas, GaussianMixture, GaussianModes
    from ztsnr.samplers import guide

    kind = str(problem["kind"])
    if kind == "canvas":
        return GaussianCanvas(*(float(problem[key]) for key in ("mean", "brightness_std", "texture_std")))
    if kind == "modes":
        return GaussianModes(0.0, torch.from_numpy(problem["stds"]))
    means, weights, stds = (torch.from_numpy(problem[key]) for key in ("means", "weights", "stds"))
    everything, scale = GaussianMixture(means, weights, stds), float(problem["guidance"])
    if scale == 1:
        return everything
    prompt = GaussianMixture(means[:2], weights[:2], stds[:2])
    return lambda x, sigma: guide(prompt(x, sigma), everything(x, sigma), scale)


class IdealNetwork:
    """A v-prediction network that answers ``ideal_model`` and is told the timestep alone, fractional or whole.

    Input and output have the network's dtype, everything in between is float64.

    Attributes:
        calls: how often it was asked.
    """

    def __init__(self, problem: Mapping[str, np.ndarray], schedule=None):
        from ztsnr.diagnostics import v_network
        from ztsnr.samplers import NoiseSchedule

        self.dtype = getattr(torch, str(problem["dtype"]))
        self.denoise = ideal_model(problem)
        self.answer = v_network(self.denoise, schedule or NoiseSchedule.sdxl())
        self.calls = 0

    def __call__(self, x: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        """v (B, ...) for x (B, ...) variance-preserving at timestep t."""
        self.calls += 1
        return self.answer(x.to(self.dtype).double(), t).to(self.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Both sides of the exchange: every value of a problem is an array of one .npz.


def pack(problems: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{problem: {key: array}} with flat names, as np.savez takes them."""
    return {f"{name}|{key}": value for name, problem in problems.items() for key, value in problem.items()}


def unpack(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The inverse of ``pack``."""
    problems = {}
    for flat_name in arrays:
        name, key = flat_name.split("|")
        problems.setdefault(name, {})[key] = arrays[flat_name]
    return problems


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz that appears whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        np.savez(file, **arrays)
    os.replace(unfinished, path)


# ----------------------------------------------------------------------------------------------------------------------
# The worker.


class ComfyModel:
    """What ComfyUI's samplers see of a model: ``BaseModel._apply_model`` around an ideal network.

    Scaling, rounding of timesteps and denoising are those of ComfyUI's own ``model_sampling``.
    """

    cfg = 1.0

    def __init__(self, model_sampling, network: IdealNetwork):
        patcher = SimpleNamespace(model=self, get_model_object=lambda name: {"model_sampling": model_sampling}[name])
        self.model_patcher = patcher
        self.inner_model = SimpleNamespace(model_sampling=model_sampling, model_patcher=patcher)
        self.model_sampling, self.network = model_sampling, network

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, model_options=None, seed=None) -> torch.Tensor:
        t = self.model_sampling.timestep(sigma).float()
        v = self.network(self.model_sampling.calculate_input(sigma, x), t[0])
        return self.model_sampling.calculate_denoised(sigma, v.float(), x)


def solve_all(comfyui: Path, exchange: Path) -> None:
    """Every problem with all samplers and schedulers of the ComfyUI at this path, zero-SNR and v-prediction."""
    sys.path.insert(0, str(comfyui))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # before model_management looks for a device
    import comfy.model_base
    import comfy.samplers

    load_package()
    config = SimpleNamespace(sampling_settings={"beta_schedule": "linear", "zsnr": True})
    sampling = comfy.model_base.model_sampling(config, comfy.model_base.ModelType.V_PREDICTION)
    with np.load(exchange / "problems.npz") as file:
        problems = unpack(file)

    for row, (sampler, scheduler) in enumerate(itertools.product(SAMPLERS, comfy.samplers.SCHEDULER_NAMES)):
        answers = {
            "about|row": np.array([sampler, scheduler]),
            "about|torch": np.array(torch.__version__),
        }
        for name, problem in problems.items():
            noise = torch.from_numpy(problem["noise"])
            for steps in problem["steps"].tolist():
                network = IdealNetwork(problem)
                sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
                picture = comfy.samplers.sampler_object(sampler).sample(
                    ComfyModel(sampling, network),
                    sigmas,
                    extra_args={},
                    callback=None,
                    noise=noise.clone(),
                    latent_image=torch.zeros_like(noise),
                    disable_pbar=True,
                )
                answers[f"{name}|{steps}"] = picture.numpy()
                answers[f"{name}|{steps} calls"] = np.array(network.calls)
        save(exchange / f"row_{row:02d}.npz", answers)


if __name__ == "__main__":
    with torch.inference_mode():
        solve_all(Path(sys.argv[1]), Path(sys.argv[2]))
