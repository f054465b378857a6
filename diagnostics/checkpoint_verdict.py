"""The mean-leak test's verdict on a checkpoint: does its network follow the mean of pure noise at t = T?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..samplers import NoiseSchedule
from ..samplers.prediction import alpha_s
from .estimates import Estimate, at_least_two
from .leak_probes import NetworkProbe

TABLE_UP_TO = 0.8  # share of T up to which every network learns how much noise there is, whatever the loss weights
LEAK_SHARE = 0.2  # of the peak slope: a network that follows the noise this much at t = T leaks
LEAST_PEAK = 1.5  # slope below which a prompt leaves too little open: V = 9, where sigma 14.6 would leak little


@dataclass(frozen=True)
class CheckpointAnswer:
    """The verdict on a checkpoint: does its network follow the mean of the noise at t = T?

    Attributes:
        verdict: "zero SNR", "starved" (the schedule is zero-SNR, but t = T was not learned), "not zero SNR", or
            "cannot tell".
        sentence: the verdict in words, with its evidence.
        timesteps, sigmas: (T,) where the network was probed; sigmas as the file states them.
        slopes: (T, C) of x0's channel means on the noise's.
        share: slope at t = T, as a share of the peak.
        slope: slope of the channel that follows most at t = T.
        marked: True if the schedule that the file states has zero terminal SNR.
        table: name of the table of noise levels that the network's responses fit, or None.
        believed_sigma: noise level that the network assumes for its input at t = T; None if it cannot be measured.
        seeds_needed: number of seeds for a verdict, if these are too few; None if more do not help.
    """

    verdict: str
    sentence: str
    timesteps: list[float]
    sigmas: list[float]
    slopes: list[list[Estimate]]
    share: Estimate
    slope: Estimate
    table: str | None
    believed_sigma: float | None
    marked: bool
    seeds_needed: int | None = None


def judge_network(
    probes: Sequence[NetworkProbe], schedule: NoiseSchedule | None, tables: Mapping[str, NoiseSchedule] | None = None
) -> CheckpointAnswer:
    """The verdict on a checkpoint, from one probe per seed.

    Args:
        schedule: the one the file states, with which the probes were made; None for flow matching, whose noise levels
            end at infinity by construction.
        tables: the candidates by name, "zero SNR" among them; by default Stable Diffusion's two if the schedule is one
            of them.

    Raises:
        UserError: fewer than two probes.
    """
    at_least_two(probes)
    slopes = np.stack([probe.slopes for probe in probes])  # (K, T, C)
    sigmas = probes[0].sigmas.tolist()
    timesteps = [alpha_s(sigma)[1] if schedule is None else schedule.timestep(sigma) for sigma in sigmas]
    by_level = [[Estimate.over_seeds(channel) for channel in level.T] for level in slopes.swapaxes(0, 1)]
    peak = max(slopes.mean(0), key=np.linalg.norm)  # (C,)
    share = Estimate.over_seeds(slopes[:, -1] @ peak / (peak @ peak))
    slope = max(by_level[-1], key=lambda estimate: abs(estimate.value))
    fine = np.stack([probe.fine_response for probe in probes])
    response = Estimate.over_seeds(fine[:, -1])
    tables = _candidates(schedule) if tables is None else tables
    last = timesteps[-1]
    table, variance = closest_table(timesteps, fine.mean(0), tables, TABLE_UP_TO * last)
    believed = (1 - variance) / response.value if table is not None and response.low > 0 else None

    leaves_open = np.abs(peak).max()
    verdict, sentence, needed = _verdict(share, slope, table, believed, leaves_open, len(probes))
    return CheckpointAnswer(
        verdict,
        sentence,
        timesteps,
        sigmas,
        by_level,
        share,
        slope,
        table,
        believed,
        math.isinf(sigmas[-1]),
        needed,
    )


def _verdict(
    share: Estimate, slope: Estimate, table: str | None, believed: float | None, leaves_open: float, seeds: int
) -> tuple[str, str, int | None]:
    """The verdict, its sentence, and the number of seeds needed if these are too few.

    Args:
        leaves_open: the largest slope at the peak, which a prompt that fixes the brightness keeps small.
    """
    follows = f"x0 at t = T follows the noise mean (slope {slope}, {share.value:.0%} of its peak)"
    takes = "" if believed is None else f" and treats its input as one of sigma {believed:.3g}"
    side = share.side(LEAK_SHARE)
    if leaves_open < LEAST_PEAK:
        return (
            "cannot tell",
            f"cannot tell: this prompt fixes the brightness (x0 follows the noise mean with slope {leaves_open:.2g} at "
            "most); use one that leaves it open, such as the empty prompt",
            None,
        )
    if side < 0:
        return (
            "zero SNR",
            f"zero-SNR trained: x0 at t = T does not follow the noise mean (slope {slope}, {share.value:.0%} of its "
            "peak)",
            None,
        )
    if side > 0 and table == "zero SNR":
        return (
            "starved",
            "trained on a zero-SNR schedule, but its last timestep was not learned, as happens with Min-SNR weights "
            f"without a floor: {follows}",
            None,
        )
    if side > 0:
        return "not zero SNR", f"not zero-SNR trained: {follows}{takes}", None
    needed = share.seeds_to_tell(LEAK_SHARE)
    return (
        "cannot tell",
        f"cannot tell: {seeds} seeds are too few, use {needed} (x0 at t = T follows the noise mean by {share} of its "
        f"peak; the limit is {LEAK_SHARE})",
        needed,
    )


def closest_table(
    timesteps: Sequence[float], responses: Sequence[float], tables: Mapping[str, NoiseSchedule], up_to: float
) -> tuple[str | None, float]:
    """The table of noise levels that a network's responses to the finest noise fit.

    If the finest detail of pictures has variance V, v follows it with alpha s (1 - V) / (alpha^2 V + s^2), which is
    1 / sigma(t) for small V.  V is fitted for each table.

    Returns:
        A name, or None if two tables fit about as well; and V.
    """
    from scipy.optimize import minimize_scalar

    asked = [(t, q) for t, q in zip(timesteps, responses, strict=True) if t <= up_to]
    if len(tables) < 2 or len(asked) < 2 or any(q <= 0 for _, q in asked):
        return None, 0.0
    measured = np.log([q for _, q in asked])

    def fit(table: NoiseSchedule) -> tuple[float, float]:
        scales = [alpha_s(table.sigma(t)) for t, _ in asked]

        def squares(variance: float) -> float:
            expected = [alpha * s * (1 - variance) / (alpha**2 * variance + s**2) for alpha, s in scales]
            return float(((measured - np.log(expected)) ** 2).sum())

        best = minimize_scalar(squares, bounds=(0, 0.99), method="bounded")
        return float(best.fun), float(best.x)

    (misfit, variance, name), (next_misfit, *_), *_ = sorted((*fit(table), name) for name, table in tables.items())
    return (name if misfit < next_misfit / 4 else None), variance


def _candidates(schedule: NoiseSchedule | None) -> dict[str, NoiseSchedule]:
    """Stable Diffusion's plain and zero-SNR tables, if the schedule is one of them."""
    if schedule is None:
        return {}
    tables = {"zero SNR": NoiseSchedule.sdxl(), "plain": NoiseSchedule.sdxl(zero_terminal_snr=False)}
    own = schedule.alphas_cumprod
    known = any(len(own) == len(t.alphas_cumprod) and torch.allclose(own, t.alphas_cumprod, rtol=1e-3, atol=1e-6)
                for t in tables.values())  # fmt: skip
    return tables if known else {}
