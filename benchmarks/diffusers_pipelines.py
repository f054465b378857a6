"""Our scheduler in the pipelines of diffusers as they are, against diffusers' own DDIM.

    python benchmarks/diffusers_pipelines.py [--only CONTROLNET] [--no-write]

``euler`` on ``trailing`` steps is DDIM, and 5 of them lie on whole timesteps, so both schedulers must make the same
pictures in every pipeline; the default solver shows that the comparison can tell two samplers apart.  Networks are tiny
and random, nothing is downloaded.  Prints the table and puts it into benchmarks/RESULTS.md.
"""

import datetime
import inspect
import itertools
import math
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import diffusers
import numpy as np
import torch
from diffusers_cases import ENTRIES, STEPS, Entry
from results import RESULTS, machine, write_section
from tabulate import tabulate
from tiny_diffusers import LATENT, SIZE
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from ztsnr.samplers import DEFAULT_SOLVER, DEFAULT_SPACING, ZTSNRScheduler

HEADING = "diffusers pipelines"
SEED = 0
DTYPES = (torch.float32, torch.bfloat16)

Tensor = torch.Tensor

SCHEDULERS = {
    "DDIM": partial(
        diffusers.DDIMScheduler,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    ),
    "euler": partial(ZTSNRScheduler, solver="euler", spacing="trailing", latent_size=(LATENT, LATENT)),
    "default": partial(ZTSNRScheduler, latent_size=(LATENT, LATENT)),
}


# ----------------------------------------------------------------------------------------------------------------------
# Runs


class RoundedNoise(TorchFunctionMode):
    """Noise of any dtype is the rounded float32 noise; torch would draw other numbers in bfloat16."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.randn and kwargs.get("dtype"):
            return func(*args, **{**kwargs, "dtype": torch.float32}).to(kwargs["dtype"])
        return func(*args, **kwargs)


def make_pipeline(entry: Entry, scheduler: Any, dtype: torch.dtype) -> Any:
    """A pipeline with the same weights each time.

    Raises:
        TypeError: the class replaces the scheduler by one of its own.
    """
    parts = {**entry.parts(), "scheduler": scheduler}
    taken = inspect.signature(entry.kind.__init__).parameters
    pipe = entry.kind(**{name: part for name, part in parts.items() if name in taken} | _absent(taken, parts))
    if pipe.scheduler is not scheduler:
        raise TypeError(f"the pipeline replaces the scheduler by {type(pipe.scheduler).__name__}")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def _absent(taken: Any, parts: dict[str, Any]) -> dict[str, None]:
    """Parts that a class insists on and that no run here needs, as a depth estimator beside a depth map."""
    required = [name for name, parameter in taken.items() if parameter.default is inspect.Parameter.empty]
    return {name: None for name in required if name not in parts and name not in ("self", "kwargs")}


def run_pipeline(entry: Entry, scheduler: Any, dtype: torch.dtype) -> Tensor:
    """The pictures of a pipeline, in float64; the same weights, prompts and noise for every scheduler."""
    with torch.random.fork_rng(), RoundedNoise(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(SEED)
        pipe = make_pipeline(entry, scheduler, dtype)
        given = {key: value.to(dtype) if "embeds" in key else value for key, value in entry.arguments.items()}
        generator = torch.Generator().manual_seed(SEED)
        output = entry.run(pipe, given | {"num_inference_steps": STEPS, "generator": generator, "output_type": "np"})
    return to_tensor(output)


def to_tensor(output: Any) -> Tensor:
    """What a pipeline shows, in float64.  Of LDM3D the colours: its depth is rounded to 16 bits."""
    if isinstance(output, torch.Tensor):
        return output.double()
    (shown,) = (output[key] for key in ("images", "frames", "rgb", "prediction") if key in output)
    return torch.from_numpy(np.asarray(shown)).double()


Key = tuple[str, torch.dtype]  # a scheduler and a precision


@dataclass(frozen=True)
class Found:
    """What a pipeline does with each scheduler in each precision.

    Attributes:
        pictures: The values of its pictures, where it runs.
        failures: What it says, where it does not run or its pictures are not finite.
    """

    entry: Entry
    pictures: dict[Key, Tensor]
    failures: dict[Key, str]

    def difference(self, one: Key, other: Key) -> float:
        """rms difference of two runs over the spread of the other one's values; NaN if either is missing."""
        if one in self.failures or other in self.failures:
            return math.nan
        a, b = self.pictures[one], self.pictures[other]
        return float((a - b).square().mean().sqrt() / b.std(correction=0))

    def from_ddim(self, scheduler: str) -> float:
        """How far a scheduler is from DDIM in float32."""
        return self.difference((scheduler, torch.float32), ("DDIM", torch.float32))

    def rounding(self, scheduler: str) -> float:
        """How far bfloat16 is from float32 with one scheduler."""
        return self.difference((scheduler, torch.bfloat16), (scheduler, torch.float32))

    def runs(self, scheduler: str) -> bool:
        """True if it runs in both precisions and all values are finite."""
        return all((scheduler, dtype) in self.pictures and (scheduler, dtype) not in self.failures for dtype in DTYPES)


def examine(entry: Entry, schedulers: Mapping[str, Callable[[], Any]] = SCHEDULERS) -> Found:
    """Run a pipeline with each scheduler in both precisions."""
    found = Found(entry, {}, {})
    for key in itertools.product(schedulers, DTYPES):
        try:
            found.pictures[key] = run_pipeline(entry, schedulers[key[0]](), key[1])
        except Exception as error:  # whatever a pipeline raises is a result
            found.failures[key] = f"{type(error).__name__}: {error}"
            continue
        if not found.pictures[key].isfinite().all():
            found.failures[key] = "the pictures are not finite, and nothing is said"
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The table


def table(results: Sequence[Found]) -> str:
    """A row for each pipeline."""

    def number(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.1e}"

    rows = [
        [
            found.entry.name,
            *(number(found.from_ddim(scheduler)) for scheduler in ("euler", "default")),
            *(number(found.rounding(scheduler)) for scheduler in ("euler", "DDIM")),
            *("yes" if found.runs(scheduler) else "no" for scheduler in ("DDIM", "default")),
        ]
        for found in results
    ]
    heads = [
        "pipeline",
        "float32: euler\nfrom DDIM",
        "float32: default\nfrom DDIM",
        "bfloat16 from\nfloat32: euler",
        "bfloat16 from\nfloat32: DDIM",
        "DDIM\nruns",
        "default\nruns",
    ]
    return tabulate(rows, heads, disable_numparse=True, colalign=["left", *["right"] * 6])


def remarks(found: Found) -> str:
    """Who fails with which words, and why; empty if all run."""
    if not found.failures:
        return ""
    said: dict[str, list[str]] = {}
    for (scheduler, dtype), sentence in found.failures.items():
        both = all(found.failures.get((scheduler, other)) == sentence for other in DTYPES)
        who = scheduler if both else f"{scheduler} in {str(dtype).removeprefix('torch.')}"
        said.setdefault(sentence, []).append(who)
    words = "; ".join(f"{', '.join(dict.fromkeys(who))}: `{sentence}`" for sentence, who in said.items())
    return f"- {found.entry.name}. {words}. {found.entry.note}".rstrip()


def summary(results: Sequence[Found]) -> str:
    """The table in a few sentences."""
    compared = [found for found in results if found.runs("euler") and found.runs("DDIM")]
    if not compared:
        return "In none of them both schedulers run."
    worst = max(found.from_ddim("euler") for found in compared)
    least = min(found.from_ddim("default") for found in compared)
    ratio = statistics.median(found.rounding("euler") / found.rounding("DDIM") for found in compared)
    return textwrap.fill(
        f"`euler` and DDIM both run in {len(compared)} of {len(results)}; they differ by {worst:.1e} at most, the "
        f"default solver and DDIM by {least:.1e} at least. bfloat16 moves `euler` {ratio:.2f} times as far as DDIM "
        "(median).",
        width=120,
    )


@click.command(help=__doc__.split("\n")[0])
@click.option("--only", default="", help="Pipelines whose names contain this; prints them and writes nothing.")
@click.option("--write/--no-write", default=True, show_default=True, help="Put the table into RESULTS.md.")
def main(only: str, write: bool) -> None:
    diffusers.utils.logging.set_verbosity_error()
    begin = time.process_time()
    wanted = [entry for name, entry in ENTRIES.items() if only.lower() in name.lower()]
    results = [examine(entry) for entry in tqdm(wanted, unit="pipeline")]
    text, told = table(results), "\n".join(filter(None, map(remarks, results)))
    print(text, told, summary(results), sep="\n\n")
    took = time.process_time() - begin
    section = f"""`python benchmarks/{Path(__file__).name}`, {datetime.date.today().isoformat()}, \
{took:.0f} CPU seconds.
{machine(None)}.

`ZTSNRScheduler` in the pipelines of diffusers as they are, made of tiny random networks ({SIZE} x {SIZE} pictures,
{STEPS} steps, each pipeline's default guidance). `euler` on `trailing` steps is DDIM, so it must make the pictures that
diffusers' own `DDIMScheduler` (zero terminal SNR, v-prediction, trailing) makes of the same weights, prompts and noise.
*From DDIM*: rms difference of the pictures over the standard deviation of their values. *Default*: {DEFAULT_SOLVER} on
{DEFAULT_SPACING} steps, which shows how far apart two samplers are here. *bfloat16 from float32*: networks and latents
of that dtype, from the same noise, rounded. *Runs*: in both dtypes, and every value is finite.

{summary(results)}

```
{text}
```

What does not run:

{told}
"""
    if write and not only:
        write_section(RESULTS, HEADING, section)


if __name__ == "__main__":
    main()
