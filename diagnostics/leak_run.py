"""``ztsnr leak``: the mean-leak test on a diffusers pipeline, prompt by prompt, resumable, with a report to keep.

The first prompt leaves the brightness open and also tests the checkpoint; prompts for solid colours show how much
of the brightness that they ask for is left.  With guidance, every prompt also shows how far that moves brightness.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..errors import UserError
from ..extras import no_matplotlib
from ..files import prepare_folder, write_atomically
from ..samplers import NoiseSchedule, exposure_true_guidance, guide, sample
from . import pipelines
from .checkpoint_verdict import judge_network
from .guidance_shift import EXPOSURE_TRUE, GuidanceAnswer, judge_guidance, moved_most
from .ideal_models import Model
from .leak import check_seeds, exact_flow
from .leak_probes import LUMA, NetworkProbe, Run, SamplerProbe, noise_pair, probe_network, probe_sampler, probed_sigmas
from .leak_report import (
    COLOURS,
    LeakRun,
    Prompt,
    Settings,
    guidance_table,
    report_html,
    report_json,
    report_table,
    row_of_pictures,
)
from .plain import plain
from .sampler_verdict import judge_sampler
from .verdict import LeakReport

STARTS = (math.inf, 20000.0, 4518.0, 136.0, 56.0, 14.6)  # rows of the sheet, as in NovelAI V3's figure 2
SHEET_STEPS, SHEET_SEEDS = 28, 3
STRIP = 6  # predictions shown of a run
PROMPTS = (Prompt(""), *(Prompt(f"solid {name} background", colour) for name, colour in COLOURS.items()))


def parse_prompt(text: str) -> Prompt:
    """``text``, or ``text=colour`` with a name of ``COLOURS`` or #rrggbb; ``text=`` for a text that holds a =."""
    words, separator, colour = text.rpartition("=")
    if not separator or not colour:
        return Prompt(words if separator else text)
    if colour in COLOURS:
        return Prompt(words, COLOURS[colour])
    if len(colour) == 7 and colour[0] == "#":
        try:
            red, green, blue = bytes.fromhex(colour[1:])
            return Prompt(words, (red, green, blue))
        except ValueError:
            pass
    raise UserError(
        f"{colour!r} is not a colour: write text=#rrggbb, text= and one of {', '.join(COLOURS)}, or text= alone if the "
        "text contains ="
    )


class Measurements:
    """One JSON line per measurement, in the output folder, so that an interrupted run resumes where it stopped.

    The first line states the settings; only the seeds may differ, so more can be added later.  A line that was cut
    short is measured again.
    """

    def __init__(self, path: Path, settings: Settings):
        self.path = path
        self.done: dict[str, Any] = {}
        kept = {name: value for name, value in asdict(settings).items() if name != "seeds"}
        header = json.loads(json.dumps({"ztsnr": __version__, "settings": plain(kept)}))
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        if lines and json.loads(lines[0]) != header:
            raise UserError(
                f"{path.parent} contains measurements of another model or with other settings; choose another folder "
                f"with --out, or delete {path.name} there."
            )
        for line in lines[1:]:
            self.done |= json.loads(line)
        write_atomically(path, "".join(f"{line}\n" for line in lines or [json.dumps(header)]).encode())

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """The measurement under a key, from an earlier run if there is one."""
        if key not in self.done:
            line = json.dumps({key: plain(measure())}, allow_nan=False)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.done |= json.loads(line)
        return self.done[key]


def as_probe(kind: type, values: dict) -> NetworkProbe | SamplerProbe:
    """A probe from its line, where infinity is a word."""

    def array(value: Any) -> Any:
        return np.array(value, dtype=object).astype(float) if isinstance(value, list) else value

    return kind(**{field.name: array(values[field.name]) for field in fields(kind)})


# ----------------------------------------------------------------------------------------------------------------------
# The run


def run_leak(
    loaded: Any,
    out: Path,
    *,
    prompts: Sequence[Prompt] = PROMPTS,
    negative_prompt: str | None = None,
    seeds: Sequence[int] = range(8),
    size: tuple[int, int] = (1024, 1024),
    steps: int = 28,
    scheduler: str = "ztsnr",
    spacing: str | None = None,
    guidance_scale: float = 5.0,
    reference_steps: int = 40,
    offset: float = 1.0,
    gate: float | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Run the mean-leak test: print the table, write report.json, report.html and pictures.

    Args:
        loaded: what ``checkpoints.pipeline.load_pipeline`` returned.
        out: folder for the files; an interrupted run there is resumed.
        prompts: the first also tests the checkpoint, and should leave the brightness open.
        size: width and height of the pictures.
        scheduler, spacing: as in ``pipelines.use_scheduler``.
        guidance_scale: at least 1.  Above 1, the test also measures how far guidance moves brightness.
        reference_steps: steps of the exact flow.
        offset: offset of the noise means, in their standard deviations.
        gate: the largest pull toward grey that passes, in levels of 255.

    Returns:
        True if the gate was passed, or without one.

    Raises:
        UserError: settings that cannot be run, or results that are not finite.
    """
    from tqdm import tqdm

    pipe = loaded.pipeline
    seeds = check_seeds(seeds)
    if not prompts:
        raise UserError("prompts is empty: give at least one prompt")
    if any(side % pipe.vae_scale_factor for side in size):
        raise UserError(f"width and height must be multiples of {pipe.vae_scale_factor}, not {size[0]} x {size[1]}")
    prepare_folder(out)
    latent_size = (size[1] // pipe.vae_scale_factor, size[0] // pipe.vae_scale_factor)
    schedule = NoiseSchedule.from_config(pipe.scheduler.config)
    scheduler_name = pipelines.use_scheduler(pipe, scheduler, spacing, latent_size)
    settings = Settings(
        model=loaded.description,
        weights=pipelines.fingerprint(pipe),
        prediction_type=loaded.prediction_type,
        zero_terminal_snr=loaded.zero_terminal_snr,
        prompts=tuple(prompts),
        negative_prompt=negative_prompt,
        seeds=tuple(seeds),
        size=(size[0], size[1]),
        steps=steps,
        scheduler=scheduler_name,
        guidance_scale=guidance_scale,
        reference_steps=reference_steps,
        offset=offset,
        dtype=str(pipe.unet.dtype).removeprefix("torch."),
    )
    measurements = Measurements(out / "measurements.jsonl", settings)
    for sentence in (loaded.description, *loaded.evidence, *(f"Warning: {w}" for w in loaded.warnings)):
        say(sentence)

    bench = _Bench(pipe, loaded.prediction_type, schedule, settings, out / "pictures")
    probes = len(seeds) * (len(prompts) * (1 + len(bench.guidances)) + 1)
    rows = len(bench.starts) + (len(bench.guidances) if bench.guided else 0)
    with tqdm(total=probes + rows, unit="probe", desc="Measuring", leave=False) as bar:
        reports = [bench.measure(number, measurements, bar.update) for number in range(len(prompts))]
        sheet = bench.sheet(measurements, bar.update)
        guidance_sheet = bench.guidance_sheet(reports, measurements, bar.update) if bench.guided else []
    made = LeakRun(settings, loaded.evidence, loaded.warnings, reports, sheet, guidance_sheet, out / "pictures")
    write_atomically(out / "report.json", report_json(made))
    write_atomically(out / "report.html", report_html(made))
    say(f"\n{report_table(made)}\n\n{reports[0]}")
    if bench.guided:
        say(f"\n{guidance_table(made)}")
    if missing := no_matplotlib():
        say(missing)
    say(f"\nReport:   {out / 'report.html'}\nNumbers:  {out / 'report.json'}")
    return gate is None or _passes(prompts, reports, gate, say)


class _Bench:
    """A pipeline under test, with everything that all prompts share."""

    def __init__(self, pipe: Any, prediction_type: str, schedule: NoiseSchedule, settings: Settings, pictures: Path):
        self.pipe, self.prediction_type, self.schedule, self.settings = pipe, prediction_type, schedule, settings
        self.pictures = pictures
        self.to_rgb = pipelines.vae_to_rgb(pipe)
        width, height = settings.size
        self.latent_size = (height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
        self.shape = (pipe.unet.config.in_channels, *self.latent_size)
        self.starts = [sigma for sigma in STARTS if sigma <= schedule.sigma_max] or [schedule.sigma_max]
        scale = settings.guidance_scale
        self.guided = scale > 1
        # kinds of exact flow; without guidance all three are one
        self.guidances: dict[str, tuple[float, pipelines.Guidance]] = {"reference": (scale, guide)}
        if self.guided:
            self.guidances |= {"unguided": (1.0, guide), "exposure-true": (scale, exposure_true_guidance)}

    def network(self, embeddings: dict[str, torch.Tensor], *guidance: Any) -> Model:
        return pipelines.network(self.pipe, embeddings, self.schedule, self.prediction_type, *guidance)

    def flows(self, embeddings: dict[str, torch.Tensor]) -> dict[str, Run]:
        """The exact flow under each kind of guidance."""
        steps = self.settings.reference_steps
        return {
            kind: exact_flow(self.network(embeddings, *guidance), self.schedule, self.latent_size, steps)
            for kind, guidance in self.guidances.items()
        }

    def measure(self, number: int, measurements: Measurements, update: Callable[[], object]) -> LeakReport:
        """One prompt: the network's probes for the first, the sampler's and the exact flow's for all."""
        settings, prompt = self.settings, self.settings.prompts[number]
        embeddings = self._embeddings(number)
        asked: dict[str, Callable[[torch.Tensor, int], Any]] = {
            "sampler": lambda noise, seed: self._sample(embeddings, noise, seed, number),
        }
        for kind, flow in self.flows(embeddings).items():
            asked[kind] = partial(self._follow, flow, prompt)
        if number == 0:
            network = self.network(embeddings)
            sigmas = probed_sigmas(self.schedule)
            asked["network"] = lambda noise, seed: probe_network(network, noise, sigmas, seed)
        probes: dict[str, list] = {kind: [] for kind in asked}
        for index, seed in enumerate(settings.seeds):
            noise = noise_pair(seed, index, self.shape, settings.offset).to(self.pipe.device)
            for kind, ask in asked.items():
                values = measurements.get(f"{number}/{kind}/{index}/{seed}", partial(ask, noise, seed))
                probes[kind].append(as_probe(NetworkProbe if kind == "network" else SamplerProbe, values))
                update()
        start = float(probes["sampler"][0].sigmas[0])
        reference = f"the exact flow of the same network, {settings.reference_steps} steps of this package's solver"
        return LeakReport(
            checkpoint=judge_network(probes["network"], self.schedule) if number == 0 else None,
            sampler=judge_sampler(probes["sampler"], probes["reference"], start, reference),
            seeds=list(settings.seeds),
            offset=settings.offset,
            brightness_through="through the VAE",
            network_probes=probes.get("network", []),
            sampler_probes=probes["sampler"],
            reference_probes=probes["reference"],
            guidance=self._judge_guidance(probes) if self.guided else None,
        )

    def _judge_guidance(self, probes: dict[str, list]) -> GuidanceAnswer:
        guided = {self.name_of(kind): probes[kind] for kind in ("reference", "exposure-true")}
        return judge_guidance(probes["unguided"], guided)

    def name_of(self, kind: str) -> str:
        """The name of a kind of guidance, for tables and sentences."""
        names = {"unguided": "no guidance", "exposure-true": EXPOSURE_TRUE}
        return names.get(kind, f"CFG {self.settings.guidance_scale:g}")

    def _follow(self, flow: Run, prompt: Prompt, noise: torch.Tensor, seed: int) -> SamplerProbe:
        return probe_sampler(flow, noise, self.to_rgb, prompt.target, seed)

    def _sample(self, embeddings: dict[str, torch.Tensor], noise: torch.Tensor, seed: int, number: int) -> SamplerProbe:
        """The sampler's probe; for the first seed, its predictions are saved as pictures too."""
        settings = self.settings
        first = seed == settings.seeds[0]
        seen: list[tuple[Any, torch.Tensor]] = []

        def keep(sigma: Any, x0: torch.Tensor) -> None:
            seen.append((sigma, x0[:1].clone()))

        run = pipelines.sampler(self.pipe, embeddings, settings.steps, settings.guidance_scale, keep if first else None)
        probe = probe_sampler(run, noise, self.to_rgb, settings.prompts[number].target, seed)
        if first:
            shown = [seen[i] for i in sorted(set(np.linspace(0, len(seen) - 1, STRIP).round().astype(int).tolist()))]
            pictures = np.concatenate([self._show(x0) for _, x0 in shown])
            names = [f"{float(sigma):.6g}" for sigma, _ in shown]
            self._save(f"strip_{number}", pictures, names)
        return probe

    def sheet(self, measurements: Measurements, update: Callable[[], object]) -> list[dict[str, Any]]:
        """The same prompt and seeds from infinity and from finite noise: brightness of each picture.

        After NovelAI V3's figure 2 (arXiv 2409.15997): 28 Euler steps, even in t from where the noise begins.
        """
        prompts = self.settings.prompts
        number = next((i for i, prompt in enumerate(prompts) if prompt.target is not None), 0)
        embeddings = self._embeddings(number)
        denoise = self.network(embeddings, self.settings.guidance_scale)

        def measure(start: float) -> dict[str, Any]:
            sigmas = steps_from(self.schedule, start, SHEET_STEPS)
            row = self._row(f"start_{start:g}", number, lambda noise: sample(denoise, noise, sigmas, "euler"))
            return {"start_sigma": start} | row

        rows = []
        for start in self.starts:
            rows.append(measurements.get(f"sheet/{start:g}/{self._sheet_seeds()}", partial(measure, start)))
            update()
        return rows

    def guidance_sheet(
        self, reports: Sequence[LeakReport], measurements: Measurements, update: Callable[[], object]
    ) -> list[dict[str, Any]]:
        """The prompt whose brightness guidance moves most, from the same noise under each kind of guidance."""
        number = moved_most([report.guidance for report in reports if report.guidance is not None])
        flows = self.flows(self._embeddings(number))
        rows = []
        for kind in ("unguided", "reference", "exposure-true"):
            file = f"guidance_{number}_{kind}"
            measure = partial(self._row, file, number, lambda noise, flow=flows[kind]: flow(noise)[0])
            row = measurements.get(f"{file}/{self._sheet_seeds()}", measure)
            rows.append({"guidance": self.name_of(kind), "file": file} | row)
            update()
        return rows

    def _embeddings(self, number: int) -> dict[str, torch.Tensor]:
        settings = self.settings
        return pipelines.encode(self.pipe, settings.prompts[number].text, settings.negative_prompt)

    def _sheet_seeds(self) -> list[int]:
        return list(self.settings.seeds[:SHEET_SEEDS])

    def _row(self, name: str, number: int, make: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """Save a row of a sheet, one picture per seed, and return its prompt, seeds and brightness."""
        seeds = self._sheet_seeds()
        noise = [torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        pictures = np.concatenate([self._show(make(n.to(self.pipe.device))) for n in noise])
        self._save(name, pictures, [str(seed) for seed in seeds])
        return {
            "prompt": self.settings.prompts[number].text,
            "seeds": seeds,
            "brightness": (pictures.mean((1, 2), dtype=float) @ LUMA).tolist(),
        }

    def _show(self, latents: torch.Tensor) -> np.ndarray:
        """Latents as pictures (B, H, W, 3) uint8."""
        pictures = self.to_rgb(latents).clamp(0, 1).mul(255).round().byte()
        return pictures.permute(0, 2, 3, 1).cpu().numpy()

    def _save(self, name: str, pictures: np.ndarray, labels: list[str]) -> None:
        prepare_folder(self.pictures)
        write_atomically(self.pictures / f"{name}.png", row_of_pictures(pictures, labels))


def steps_from(schedule: NoiseSchedule, start: float, steps: int) -> list[float]:
    """(steps + 1,) noise levels, even in t from where the noise is ``start`` down to 0."""
    first = schedule.timestep(start)
    return [start, *(schedule.sigma(first * (1 - i / steps)) for i in range(1, steps)), 0.0]


def _passes(prompts: Sequence[Prompt], reports: Sequence[LeakReport], gate: float, say: Callable[[str], None]) -> bool:
    """True if nothing leaks beyond the gate; whatever does is printed."""
    failed = [
        f"{prompt.name}: pull toward grey {pull} levels"
        for prompt, report in zip(prompts, reports, strict=True)
        if report.sampler is not None and (pull := report.sampler.pull) is not None and pull.value > gate
    ]
    checkpoint = reports[0].checkpoint
    if checkpoint is not None and checkpoint.verdict != "zero SNR":  # "cannot tell" does not pass the gate
        failed.insert(0, checkpoint.sentence)
    for sentence in failed:
        say(f"Gate failed: {sentence}.")
    return not failed
