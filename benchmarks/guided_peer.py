"""Solver and spacing pairs on the guided problems, and the worker that runs a real ComfyUI's.

Run by ComfyUI's own Python, which knows neither diffusers nor scikit-image.  The worker reads EXCHANGE/problems.npz and
EXCHANGE/columns.json, and writes EXCHANGE/records.json.

    python guided_peer.py COMFYUI EXCHANGE
"""

import asyncio
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from comfyui_peer import ComfyModel, load_package, unpack
from tqdm import tqdm

if TYPE_CHECKING:  # the package is not installed in ComfyUI's Python: the worker loads it first
    from guided_problems import Guidance, GuidedProblem

    from ztsnr.samplers.sampling import Denoise

# Of ComfyUI, all that add no noise, follow the guided flow and take the number of steps that they are told; without
# ``ddim``, which is ``euler``.  RES4LYF's are called ``_ode`` where they add no noise.
SAMPLERS = ("euler", "heun", "heunpp2", "exp_heun_2_x0", "dpm_2", "lms", "dpm_fast", "dpmpp_2m", "ipndm", "ipndm_v",
            "deis", "res_multistep", "gradient_estimation", "uni_pc", "uni_pc_bh2")  # fmt: skip
RES4LYF_SAMPLERS = ("res_2m_ode", "res_3m_ode")
# Of this package, all that begin at infinity; without ``polyexponential``, which is ``exponential`` unless told more.
SPACINGS = ("spectral", "trailing", "linspace", "beta", "ays", "karras", "exponential", "kl_optimal")

Record = dict[str, str | int | float]


class Run(Protocol):
    """A sampler on one problem: pictures (B, ...)."""

    def __call__(
        self, problem: "GuidedProblem", guidance: "Guidance", denoise: "Denoise", steps: int
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Pair:
    """A solver and a spacing."""

    program: str
    solver: str
    spacing: str
    run: Run

    @property
    def name(self) -> str:
        return f"{self.program} {self.solver} / {self.spacing}"

    def measure(
        self, problems: Sequence["GuidedProblem"], guidances: Sequence["Guidance"], steps: Sequence[int]
    ) -> Iterator[Record]:
        """The names, network calls and scores of every problem, guidance and number of steps."""
        names = {"program": self.program, "solver": self.solver, "spacing": self.spacing}
        for guidance in guidances:
            for n in steps:
                for problem in problems:
                    denoise = _Counted(problem.denoise(guidance))
                    scores = problem.score(self.run(problem, guidance, denoise, n), guidance)
                    about = {"guidance": str(guidance), "steps": n, "calls": denoise.calls, "problem": problem.name}
                    yield names | about | scores


class _Counted:
    """A model that counts how often it is asked."""

    def __init__(self, denoise: "Denoise"):
        self.denoise, self.calls = denoise, 0

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        self.calls += 1
        return self.denoise(x, sigma)


def latents(problem: "GuidedProblem") -> torch.Tensor:
    """The noise as samplers take it, (B, 1, 1, D) float32."""
    return problem.noise.float()[:, None, None]


# ----------------------------------------------------------------------------------------------------------------------
# The worker.


class StockModel(ComfyModel):
    """A model at one noise level for the whole batch; RES4LYF also asks for its device and network."""

    def __init__(self, model_sampling, network):
        super().__init__(model_sampling, network)
        self.inner_model.device = torch.device("cpu")
        self.diffusion_model = self.inner_model.diffusion_model = torch.nn.Identity()

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, model_options=None, seed=None) -> torch.Tensor:
        return super().__call__(x, sigma[:1])  # ComfyUI would look up the timestep of each sample


class ExactModel(StockModel):
    """A model whose sampler asks for the very sigma it means, as behind this package's node."""

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, model_options=None, seed=None) -> torch.Tensor:
        level = float(sigma[0])
        return self.network(x / math.hypot(1, level), level)


def stock(sampling, sampler: str, scheduler: str) -> Run:
    """ComfyUI as it is: from 4518.76, its stand-in for infinity, and at the nearest whole timesteps."""
    import comfy.samplers

    from ztsnr.diagnostics import v_network
    from ztsnr.samplers import NoiseSchedule

    discards = sampler in comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS

    def run(problem, guidance, denoise, steps):
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps + discards)
        if discards:
            sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
        network = v_network(denoise, NoiseSchedule.sdxl())
        model = StockModel(sampling, lambda x, t: network(x.double(), t).to(x.dtype))
        return _sample(model, sampler, sigmas, latents(problem), torch.zeros_like(latents(problem)))

    return run


def from_infinity(sampling, sampler: str, spacing: str) -> Run:
    """ComfyUI's sampler behind an exact first step: from infinity the state becomes x0 + sigma * noise."""
    from ztsnr.samplers import NoiseSchedule, step_schedule

    def run(problem, guidance, denoise, steps):
        sigmas = step_schedule(NoiseSchedule.sdxl(), steps, spacing, latent_size=problem.latent_size)
        noise = latents(problem)
        return _sample(ExactModel(sampling, denoise), sampler, sigmas[1:].float(), noise, denoise(noise, math.inf))

    return run


def _sample(
    model: ComfyModel, sampler: str, sigmas: torch.Tensor, noise: torch.Tensor, latent: torch.Tensor
) -> torch.Tensor:
    import comfy.samplers

    options = {"model_options": {"transformer_options": {}}, "seed": 0}
    return comfy.samplers.sampler_object(sampler).sample(
        model, sigmas, extra_args=options, callback=None, noise=noise, latent_image=latent, disable_pbar=True
    )


def comfyui_pairs(comfyui: Path) -> list[Pair]:
    """Every sampler with every scheduler of the ComfyUI at this path; from infinity those that this package lacks."""
    sys.path.insert(0, str(comfyui))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # before model_management looks for a device
    import comfy.model_base
    import comfy.samplers

    from ztsnr.samplers import SOLVERS

    config = SimpleNamespace(sampling_settings={"beta_schedule": "linear", "zsnr": True})
    sampling = comfy.model_base.model_sampling(config, comfy.model_base.ModelType.V_PREDICTION)
    samplers = [*SAMPLERS, *_res4lyf(comfyui)]
    return [
        Pair("ComfyUI", sampler, scheduler, stock(sampling, sampler, scheduler))
        for sampler in samplers
        for scheduler in comfy.samplers.SCHEDULER_NAMES
    ] + [
        Pair("ComfyUI from infinity", sampler, spacing, from_infinity(sampling, sampler, spacing))
        for sampler in samplers
        if sampler not in SOLVERS
        for spacing in SPACINGS
    ]


def find_res4lyf(comfyui: Path) -> Path | None:
    """Where the node pack RES4LYF is, if this ComfyUI has it."""
    return next((path for path in (comfyui / "custom_nodes").glob("*") if path.name.lower() == "res4lyf"), None)


def _res4lyf(comfyui: Path) -> tuple[str, ...]:
    """RES4LYF's samplers, which it adds to ComfyUI's own when it is loaded."""
    folder = find_res4lyf(comfyui)
    if folder is None:
        return ()
    import server

    import nodes

    async def load() -> bool:
        server.PromptServer(asyncio.get_running_loop())  # packs add their pages to it
        return await nodes.load_custom_node(str(folder))

    if not asyncio.run(load()):
        raise RuntimeError(f"ComfyUI cannot load {folder}")
    return RES4LYF_SAMPLERS


def main(comfyui: Path, exchange: Path) -> None:
    load_package()
    from guided_problems import Guidance, GuidedProblem

    with np.load(exchange / "problems.npz") as file:
        problems = [GuidedProblem.from_arrays(name, arrays) for name, arrays in unpack(file).items()]
    columns = json.loads((exchange / "columns.json").read_text())
    guidances = [Guidance(*values) for values in columns["guidances"]]
    pairs = [pair for pair in comfyui_pairs(comfyui) if re.search(columns["rows"], pair.name)]
    records = []
    for pair in tqdm(pairs, desc="ComfyUI", leave=False):
        records += pair.measure(problems, guidances, columns["steps"])
    (exchange / "records.json").write_text(json.dumps(records))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
