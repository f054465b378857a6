"""How often does the mean-leak test say something false?  On networks trained here, and on ideal models.

Checkpoints: a good zero-SNR network, a starved one and a plain one (``leak_networks``, trained first if need be), each
as its file says and with the wrong mark, asked about pure noise over and over with other noise.  Samplers: exact from
infinity, and what is usual instead, on the zero-SNR networks, under a prompt that leaves the colour open and one that
asks for black; and the plain network from its own end.

    python benchmarks/leak_verdicts.py

prints the tables and puts them into benchmarks/RESULTS.md.
"""

import datetime
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from leak_networks import FOLDER, KINDS, SHAPE, denoiser, schedule_of, trained
from PIL import Image
from results import RESULTS, machine, markdown, write_section
from scipy.stats import binomtest
from tqdm import tqdm

from ztsnr.diagnostics import GaussianCanvas
from ztsnr.diagnostics.checkpoint_verdict import CheckpointAnswer
from ztsnr.diagnostics.latent_stats import LatentMeanRecorder
from ztsnr.diagnostics.leak import exact_flow, mean_leak
from ztsnr.diagnostics.leak_figure import leak_figure
from ztsnr.diagnostics.leak_probes import Run, noise_pair
from ztsnr.diagnostics.verdict import LeakReport
from ztsnr.figures.png import to_image
from ztsnr.figures.strip import Strip
from ztsnr.samplers import NoiseSchedule, from_denoised, sample, step_schedule, to_denoised
from ztsnr.samplers.sampling import Denoise

NOISES = 8  # K of a run
STEPS = 20
ZERO, PLAIN = NoiseSchedule.sdxl(), NoiseSchedule.sdxl(zero_terminal_snr=False)
STATED = {  # row: kind of network, schedule that its file states
    "good": ("good", ZERO),
    "good, not marked": ("good", PLAIN),
    "starved": ("starved", ZERO),
    "plain": ("plain", PLAIN),
    "plain, marked zero SNR": ("plain", ZERO),
}
VERDICTS = {"good": "zero SNR", "starved": "starved", "plain": "not zero SNR"}
SAMPLERS = {  # of the networks with infinity. name: solver, first sigma
    "infinity, `spectral`": ("spectral", math.inf),
    "infinity, `euler`": ("euler", math.inf),
    "4518, `euler`": ("euler", 4518.0),
    "14.6, `spectral`": ("spectral", 14.6),
}
PLAIN_SAMPLERS = {"its own end, `spectral`": ("spectral", PLAIN.sigma_max)}
PROMPTED = (("good", "open"), ("good", "black"), ("starved", "open"), ("starved", "black"), ("plain", "black"))
EXPECTED = {  # what must be said of a sampler; of the others nothing is known beforehand
    ("open", "infinity, `spectral`"): "exact",
    ("black", "infinity, `spectral`"): "exact",
    ("black", "14.6, `spectral`"): "biased",
}


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def ideal_network(kind: str, stated: NoiseSchedule, rng: np.random.Generator) -> tuple[Denoise, tuple[int, ...]]:
    """The exact network of a random canvas, with the beliefs of a kind; and the shape of its latents."""
    canvas = GaussianCanvas(rng.uniform(-2.5, 2.5), rng.uniform(0.3, 1.0), rng.uniform(0.05, 0.9))
    learned = schedule_of(kind)
    most = learned.sigma(900.0) if kind == "starved" else math.inf

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        believed = min(learned.sigma(stated.timestep(sigma)), most)
        return to_denoised(from_denoised(canvas(x, believed), x, believed), x, sigma)

    return denoise, (int(rng.integers(3, 5)), *rng.integers(12, 33, 2).tolist())


def checkpoint_answers(row: str, networks: Sequence | None, runs: int) -> list[CheckpointAnswer]:
    """One answer a run; trained networks take turns, None stands for an ideal one drawn anew."""
    (kind, stated), rng, answers = STATED[row], np.random.default_rng(0), []
    for run in tqdm(range(runs), desc=row, leave=False, disable=None):
        if networks is None:
            denoise, shape = ideal_network(kind, stated, rng)
        else:
            denoise, shape = denoiser(networks[run % len(networks)], stated), SHAPE
        answers.append(mean_leak(denoise, None, shape, schedule=stated, seeds=draw_seeds(rng)).checkpoint)
    return answers


def checkpoint_row(name: str, expected: str, answers: Sequence[CheckpointAnswer]) -> list[str]:
    counts = Counter(answer.verdict for answer in answers)
    believed = [answer.believed_sigma for answer in answers if answer.believed_sigma is not None]
    return [
        name,
        *tally(counts, expected),
        spread([answer.share.value for answer in answers], 2),
        f"{np.median(believed):.3g}" if len(believed) > len(answers) / 2 else "none",
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Samplers


def sampler(denoise: Denoise, schedule: NoiseSchedule, solver: str, start: float) -> Run:
    """From the schedule's end with the spacing that goes with the solver; from elsewhere even in the timestep."""
    if start == schedule.sigma_max:
        spacing = "spectral" if solver == "spectral" else "trailing"
        sigmas = step_schedule(schedule, STEPS, spacing, latent_size=SHAPE[1:])
    else:
        timesteps = schedule.timestep(start) * (1 - torch.arange(STEPS) / STEPS)
        sigmas = torch.cat([schedule.sigma(timesteps), torch.zeros(1)])

    def run(noise):
        recorder = LatentMeanRecorder(STEPS)
        return sample(denoise, noise, sigmas, solver, callback=recorder), recorder.read()

    return run


def at_once(run: Run, seeds: Sequence[int]) -> Run:
    """The same run on the noises of all seeds in one batch, for speed; handed out pair by pair, in their order."""
    latents, statistics = run(torch.cat([noise_pair(seed, i, SHAPE) for i, seed in enumerate(seeds)]))
    pairs = iter(range(len(seeds)))

    def hand_out(noise):
        first = 2 * next(pairs)
        own = slice(first, first + 2)
        return latents[own], replace(statistics, denoised_mean=statistics.denoised_mean[:, own])

    return hand_out


def to_rgb(latents: torch.Tensor) -> torch.Tensor:
    return (latents + 1) / 2


def sampler_reports(kind: str, prompt: str, networks: Sequence, runs: int) -> dict[str, list[LeakReport]]:
    """By sampler, one report a run; all samplers of a run, and the exact flow, begin with the same noise."""
    schedule, rng = schedule_of(kind), np.random.default_rng(0)
    samplers = SAMPLERS if schedule.zero_terminal_snr else PLAIN_SAMPLERS
    reports = {name: [] for name in samplers}
    for run in tqdm(range(runs), desc=f"{kind}, {prompt}", leave=False, disable=None):
        denoise = denoiser(networks[run % len(networks)], schedule, prompt)
        seeds = draw_seeds(rng)
        exact = exact_flow(denoise, schedule, SHAPE[1:])
        flow = exact(torch.cat([noise_pair(seed, i, SHAPE) for i, seed in enumerate(seeds)]))
        for name, (solver, start) in samplers.items():
            reports[name].append(
                mean_leak(
                    None,
                    at_once(sampler(denoise, schedule, solver, start), seeds),
                    SHAPE,
                    schedule=schedule,
                    reference=at_once(lambda noise, flow=flow: flow, seeds),
                    start_sigma=start,
                    seeds=seeds,
                    to_rgb=to_rgb,
                )
            )
    return reports


def sampler_row(kind: str, prompt: str, name: str, reports: Sequence[LeakReport]) -> list[str]:
    answers = [report.sampler for report in reports]
    counts = Counter(answer.verdict for answer in answers)
    brightness = [np.mean([probe.rgb_mean for probe in report.sampler_probes]) for report in reports]
    ratios = [answer.slope_ratio.value for answer in answers if answer.slope_ratio is not None]
    return [
        f"{kind}, {prompt}",
        name,
        *tally(counts, EXPECTED.get((prompt, name))),
        spread([answer.pull.value for answer in answers], 2),
        spread(ratios, 2) if ratios else "none",
        spread(brightness, 1),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The report


def draw_seeds(rng: np.random.Generator) -> list[int]:
    return rng.choice(2**31, NOISES, replace=False).tolist()


def tally(counts: Counter, expected: str | None) -> list[str]:
    """Verdicts in words, and the share of false ones with its interval."""
    words = ", ".join(f"{verdict} {count}" for verdict, count in counts.most_common())
    if expected is None:
        return [words, "not judged"]
    runs = counts.total()
    false = runs - counts[expected] - counts["cannot tell"]
    interval = binomtest(false, runs).proportion_ci(0.95)
    return [words, f"{false / runs:.1%} ({interval.low:.1%} to {interval.high:.1%})"]


def spread(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def draw_mismarked(network, path: Path) -> None:
    """The figure of a plain network that is sampled as if it had zero terminal SNR, as docs/leak.md shows it."""
    denoise, seen = denoiser(network, ZERO), []
    recorder = LatentMeanRecorder(STEPS, lambda sigma, x0: seen.append((sigma, x0[:1])))
    sigmas = step_schedule(ZERO, STEPS, latent_size=SHAPE[1:])

    def run(noise):
        seen.clear()
        return sample(denoise, noise, sigmas, callback=recorder), recorder.read()

    exact = exact_flow(denoise, ZERO, SHAPE[1:])
    report = mean_leak(denoise, run, SHAPE, schedule=ZERO, reference=exact, seeds=range(NOISES), to_rgb=to_rgb)
    shown = [seen[i] for i in np.linspace(0, len(seen) - 1, 6).round().astype(int)]
    pictures = torch.cat([255 * to_rgb(x0).clamp(0, 1) for _, x0 in shown]).byte().permute(0, 2, 3, 1).numpy()
    strip = Strip(pictures, np.array([float(sigma) for sigma, _ in shown]))
    Image.fromarray(to_image(leak_figure(report, strip=strip))).save(path, quality=90)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Networks of each kind.")
@click.option("--runs", type=click.IntRange(2), default=200, show_default=True, help="Runs of each row.")
@click.option(
    "--networks",
    type=click.Path(file_okay=False, path_type=Path),
    default=FOLDER,
    metavar="FOLDER",
    help="Where the trained networks are kept.  [default: build/leak_networks]",
)
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), help="Only draw docs/leak.jpg, into this file."
)
@click.option("--write/--no-write", default=True, show_default=True, help="Put the tables into RESULTS.md.")
def main(seeds: int, runs: int, networks: Path, picture: Path | None, write: bool) -> None:
    """Count the verdicts of the mean-leak test on networks whose training is known."""
    torch.set_num_threads(1)  # the tensors are small: more threads are slower
    if picture is not None:
        with torch.inference_mode():
            draw_mismarked(trained("plain", 0, networks), picture)
        return
    began = time.perf_counter()
    zoo = {kind: [trained(kind, seed, networks) for seed in range(seeds)] for kind in KINDS}
    training = time.perf_counter() - began

    began = time.perf_counter()
    false = "false (95 % interval)"
    checkpoints = [["network", "verdicts", false, "share of the peak at T", "believed sigma at T"]]
    samplers = [["network, prompt", "sampler", "verdicts", false, "pull", "slope ratio", "brightness"]]
    with torch.inference_mode():
        for origin in ("", "ideal "):
            for row, (kind, _) in STATED.items():
                answers = checkpoint_answers(row, None if origin else zoo[kind], runs)
                checkpoints.append(checkpoint_row(origin + row, VERDICTS[kind], answers))
        for kind, prompt in PROMPTED:
            reports = sampler_reports(kind, prompt, zoo[kind], runs)
            samplers += [sampler_row(kind, prompt, name, found) for name, found in reports.items()]
    seconds = time.perf_counter() - began

    trained_in = f", and {training:.0f} s to train the networks" if training > 10 else ", the networks trained before"
    text = "\n\n".join(
        [
            f"`python benchmarks/{Path(__file__).name} --seeds {seeds} --runs {runs}`, "
            f"{datetime.date.today().isoformat()}, {seconds:.0f} s{trained_in}.\n"
            f"{machine(None)}.",
            f"Each row: {runs} runs of {NOISES} noises, dealt over {seeds} networks a kind that differ in the seed of "
            "their training (32 x 32 pixels, seven prompts), or each on another ideal canvas. `false`: verdicts that "
            "are neither right nor `cannot tell`. ± is the standard deviation over the runs.",
            "### Checkpoints",
            "The open prompt. `share of the peak at T`: how much x0's mean follows the noise's at t = T; the limit "
            "is 0.2.",
            markdown(checkpoints),
            "### Samplers",
            f"{STEPS} steps, against the exact flow of the same network from the same noise. `pull`: toward grey, and "
            "`brightness`, both in levels of 255; black is 0. Open pictures are grey on average: there the pull is "
            "what the sampler takes from their differences.",
            markdown(samplers),
        ]
    )
    click.echo(text)
    if write:
        write_section(RESULTS, "Leak verdicts", text)


if __name__ == "__main__":
    main()
