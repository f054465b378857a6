"""A solver of your own, checked against a model whose exact answer is known.

A solver gets the state x and the network's answer x0, and returns the next state: docs/architecture.md.
"""

import math

import torch

from ztsnr.diagnostics import GaussianCanvas
from ztsnr.samplers import NoiseSchedule, sample, step_schedule


def straight(run, x, x0, noise):
    """Second order: x0 as a straight line in phi = atan(sigma), taken at the middle of the step."""
    history = run.remember(x0, 2)
    start, end = map(math.atan, run.ends)  # pi/2 at infinity
    if len(history) == 2:
        length, last = start - end, math.atan(run.sigmas[run.step - 1]) - start
        x0 = x0 + (x0 - history[1]) * length / (2 * last)
    ratio = math.sin(end) / math.sin(start)  # of the noise that stays
    return ratio * x + (math.cos(end) - ratio * math.cos(start)) * x0


def main() -> dict[str, float]:
    model = GaussianCanvas()
    noise = torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    sigmas = step_schedule(NoiseSchedule.sdxl(), 20, latent_size=(32, 32), guidance=1)
    errors = {}
    for solver in ("euler", straight, "spectral"):
        picture = sample(model, noise, sigmas, solver)
        errors[getattr(solver, "__name__", solver)] = (picture - model.exact(noise)).square().mean().sqrt().item()
    return errors


if __name__ == "__main__":
    for name, error in main().items():
        print(f"{name:10} {error:.4f} rms from the exact picture")
