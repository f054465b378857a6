"""The claims about zero terminal SNR, on models that are trained here: four trainings that differ in nothing else.

From the same weights, the same pictures in the same order and the same noise, a small model is trained

- to predict epsilon on the plain schedule, as SDXL was,
- to predict v on the plain schedule,
- to predict v on the rescaled schedule with Min-SNR weights without a floor, as public scripts do, and
- to predict v on the rescaled schedule as this package trains it,

and each is sampled from infinity, from several finite noise levels, and as SDXL is published.  What is asked of the
pictures is in reproduction_measures, and what follows from it in reproduction_claims.

What is done stays: a run that was stopped goes on with the training, or the measurement, that it was in.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..canvas import Size
from ..checkpoints.atomic import atomic_write
from ..diagnostics.leak_report import load_row, row_of_pictures
from ..diagnostics.output import no_matplotlib
from .config import FinetuneSettings
from .make_latent_cache import run_cache
from .pictures import open_picture
from .reproduction_data import SIZES as PICTURE_SIZES
from .reproduction_data import vocabulary, write_pictures
from .reproduction_measures import (
    BANDS,
    SHAPES,
    SOLIDS,
    STARTS,
    STEPS,
    KnownPrompt,
    Row,
    TrainedModel,
    measure_prompts,
    pixel_statistics,
)
from .settings_file import parse_settings
from .small_model import SIZES, write_small_model
from .trainer import run_finetune

SEEDS = range(4)  # of the noise
LEAK_SEEDS = range(24)
REFERENCE_PICTURES = 500

# what is trained: all that differs is the objective
TRAININGS: dict[str, dict] = {
    "epsilon, plain": {"prediction_type": "epsilon", "zero_terminal_snr": False},
    "v, plain": {"zero_terminal_snr": False},
    "v, zero SNR, no floor": {"terminal_probability": 0.0, "high_noise_share": 0.0},
    "v, zero SNR": {},
}
EPSILON, PLAIN, STARVED, OURS = TRAININGS


@dataclass(frozen=True)
class Recipe:
    """How a size is trained.

    Attributes:
        pictures: that are drawn.
        scale: of them, in units of reproduction_data.SIZES.
        steps, batch_size, learning_rate: of the training.
        caption_dropout: share of the pictures without a caption, from which the unconditional answer is learned.
        dtype: to compute in.
    """

    pictures: int
    scale: int
    steps: int
    batch_size: int
    learning_rate: float
    caption_dropout: float
    dtype: str


RECIPES = {
    "cpu": Recipe(2000, 1, 800, 16, 2e-3, 0.15, "float32"),
    "gpu": Recipe(20_000, 4, 12_000, 32, 5e-4, 0.15, "bfloat16"),
}


@dataclass(frozen=True)
class Measured:
    """What a trained model does.

    Attributes:
        training: of TRAININGS.
        seed: of the training.
        rows: of reproduction_measures, without their pictures.
        large: the same of the bands, on a canvas twice as long, from the starts of ``LARGE_STARTS``.
        leak: the checkpoint's answer of the mean-leak test; None for epsilon, which says nothing at infinity.
        last_error: mean square error of the network's answer at t = T on pictures that were held out.
    """

    training: str
    seed: int
    rows: list[Row]
    large: list[Row]
    leak: dict | None
    last_error: float


LARGE_STARTS = (math.inf, 56.0, 29.0, 14.6)


class Reproduction:
    """The folder of a reproduction, and what is in it.

    Args:
        out: folder; what is finished in it stays.
        size: one of RECIPES.
        data: a folder of pictures and captions that are trained with beside those drawn here.
        recipe: another one, for tests.
        say: takes each line for the user.

    Raises:
        ValueError: the folder is one of another size, of other pictures or another recipe, or cannot be written.
    """

    def __init__(
        self,
        out: Path,
        size: str = "cpu",
        data: Path | None = None,
        recipe: Recipe | None = None,
        say: Callable[[str], None] = print,
    ):
        self.out, self.size, self.data, self.say = out, size, data, say
        self.recipe = recipe or RECIPES[size]
        about = {"size": size, "data": str(data) if data else None, "recipe": asdict(self.recipe)}
        path = out / "reproduction.json"
        try:
            out.mkdir(parents=True, exist_ok=True)
            old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except OSError as error:
            raise ValueError(f"{out} cannot be used: {error.strerror or error}") from None
        except ValueError:
            raise ValueError(f"{path} cannot be read: remove the folder, or choose another") from None
        if old is not None and old != about:
            raise ValueError(
                f"{out} holds a reproduction of other settings ({old}): choose another folder, or remove it"
            )
        if old is None and any(out.iterdir()):
            raise ValueError(f"{out} is not empty, and holds no reproduction: choose another folder")
        with atomic_write(path) as file:
            file.write(json.dumps(about, indent=2).encode())

    def run(self, seed: int = 0, trainings: Sequence[str] = tuple(TRAININGS)) -> list[Measured] | None:
        """Train and measure with one seed; None if a signal stopped it."""
        self._prepare()
        measured = []
        for training in trainings:
            folder = self._folder(training, seed)
            if not self._train(training, seed, folder):
                return None
            measured.append(self._measure(training, seed, folder))
        return measured

    # ------------------------------------------------------------------------------------------------------------------
    # Training

    @property
    def buckets(self) -> list[Size]:
        """In pixels."""
        return sorted({(w * self.recipe.scale, h * self.recipe.scale) for w, h in PICTURE_SIZES})

    def _prepare(self) -> None:
        """The pictures, the model before training, and the latents; all trainings share them."""
        pictures, base = self.out / "pictures", self.out / "base"
        if not pictures.exists():
            self.say(f"drawing {self.recipe.pictures} pictures")
            write_pictures(pictures, self.recipe.pictures, scale=self.recipe.scale)
        if not base.exists():
            write_small_model(base, vocabulary(), SIZES[self.size])
        if not (self.out / "latents" / "index.arrow").exists():
            run_cache(
                self._sources(),
                self.out / "latents",
                [self.buckets],
                vae=base,
                margin=0,
                batch_size=self.recipe.batch_size,
                say=lambda line: None,
            )

    def _sources(self) -> list[Path]:
        return [self.out / "pictures", *([self.data] if self.data else [])]

    def _folder(self, training: str, seed: int) -> Path:
        name = "".join(letter if letter.isalnum() else "-" for letter in training).replace("--", "-")
        return self.out / f"seed-{seed}" / name

    def settings(self, training: str, seed: int, folder: Path) -> FinetuneSettings:
        """Of a training, as ``ztsnr finetune`` takes them."""
        recipe = self.recipe
        return parse_settings(
            FinetuneSettings,
            {
                "out": str(folder),
                "steps": recipe.steps,
                "seed": seed,
                "save_every": max(recipe.steps // 4, 1),
                "keep": 1,
                "model": {"base": str(self.out / "base"), "text_encoders": True, "dtype": recipe.dtype},
                "data": {
                    "sources": [{"path": str(source)} for source in self._sources()],
                    "latents": str(self.out / "latents"),
                    "batch_size": recipe.batch_size,
                    "captions": {"caption_dropout": recipe.caption_dropout},
                    "max_chunks": 1,
                    "validation_share": 0.05,
                    "workers": 0,
                },
                "objective": TRAININGS[training],
                "optimizer": {
                    "learning_rate": recipe.learning_rate,
                    "betas": [0.9, 0.99],
                    "weight_decay": 0.0,
                    "warmup_steps": min(50, recipe.steps // 4),
                    "schedule": "cosine",
                },
                "average": {"sigma_rel": [0.1]},
                "speed": {"checkpointing": "off", "compile": False},
                "watch": {"log_every": 100, "validate_every": recipe.steps, "preview_every": 0, "tensorboard": False},
                "export": {"dtype": "float32", "single_file": False, "raw": False},
            },
        )

    def _train(self, training: str, seed: int, folder: Path) -> bool:
        if self._model(folder).exists():
            return True
        self.say(f"training {training}, seed {seed}: {self.recipe.steps} steps, in {folder}")
        return bool(run_finetune(self.settings(training, seed, folder), resume=True, say=lambda line: None))

    def _model(self, folder: Path) -> Path:
        return folder / "export" / folder.name

    def reference(self) -> np.ndarray:
        """Pixel statistics of the pictures that it is trained with."""
        paths = sorted((self.out / "pictures").glob("*.png"))[:REFERENCE_PICTURES]
        return pixel_statistics([np.asarray(open_picture(path.read_bytes())) for path in paths])

    # ------------------------------------------------------------------------------------------------------------------
    # Measuring

    def _measure(self, training: str, seed: int, folder: Path) -> Measured:
        place = folder / "measured"
        if not (place / "rows.json").exists():
            self.say(f"measuring {training}, seed {seed}")
            place.mkdir(exist_ok=True)
            model = TrainedModel(self._model(folder))
            rows = measure_prompts(model, (*SOLIDS, *SHAPES, *BANDS), steps=STEPS, seeds=SEEDS)
            twice = (2 * SIZES[self.size].side,) * 2
            large = measure_prompts(
                TrainedModel(self._model(folder), twice), BANDS, LARGE_STARTS, steps=(max(STEPS),), seeds=SEEDS
            )
            leak = model.leak(LEAK_SEEDS).to_dict()["checkpoint"] if model.prediction_type != "epsilon" else None
            content = {
                "rows": [self._save(row, place, "") for row in rows],
                "large": [self._save(row, place, "large-") for row in large],
                "leak": leak,
            }
            with atomic_write(place / "rows.json") as file:
                file.write(json.dumps(content, indent=1, allow_nan=False).encode())
        content = json.loads((place / "rows.json").read_text(encoding="utf-8"))
        return Measured(
            training,
            seed,
            [_load(row, place) for row in content["rows"]],
            [_load(row, place) for row in content["large"]],
            content["leak"],
            _last_error(folder / "metrics.jsonl"),
        )

    def _save(self, row: Row, place: Path, prefix: str) -> dict:
        about = {name: value for name, value in asdict(row).items() if name != "pictures"}
        key = hashlib.sha256(json.dumps([row.prompt.text, str(row.start), row.steps]).encode()).hexdigest()[:16]
        about["file"] = f"{prefix}{key}.png"
        with atomic_write(place / about["file"]) as file:
            file.write(row_of_pictures(row.pictures, [str(seed) for seed in SEEDS]))
        about["start"] = "infinity" if row.start == math.inf else row.start
        return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in about.items()}


def _last_error(metrics: Path) -> float:
    """Of the last validation of a training."""
    lines = (json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "validation" in line][-1]["validation/t999"]


def _load(about: dict, place: Path) -> Row:
    """The row that ``_save`` wrote."""
    pictures, _ = load_row(place / about.pop("file"))
    values = {name: math.nan if value is None else value for name, value in about.items()}
    values["start"] = math.inf if values["start"] == "infinity" else values["start"]
    return Row(**values | {"prompt": KnownPrompt(**values["prompt"]), "pictures": np.asarray(pictures)})


def starts_of(model_rows: Sequence[Row]) -> list:
    """The starts that there are rows of, in order."""
    there = {row.start for row in model_rows}
    return [start for start in STARTS if start in there]


def reproduce(
    out: Path,
    size: str = "cpu",
    data: Path | None = None,
    seeds: Sequence[int] = (0,),
    say: Callable[[str], None] = print,
) -> bool:
    """Train, measure, judge and report; False if a signal stopped it.

    Args:
        seeds: of the trainings; several give intervals over trainings.

    Raises:
        ValueError: see ``Reproduction``.
    """
    from .reproduction_report import claims_text, summary_table, write_report

    reproduction = Reproduction(out, size, data, say=say)
    runs = []
    for seed in seeds:
        measured = reproduction.run(seed)
        if measured is None:
            say(f"stopped; the same command goes on from here, in {out}")
            return False
        runs.append({one.training: one for one in measured})
    claims, rows = write_report(reproduction, runs)
    say(f"\n{summary_table(rows)}\n\n{claims_text(claims)}\n")
    say(no_matplotlib() or f"Sheet:  {out / 'sheet.png'}")
    say(f"Report: {out / 'report.html'}")
    return True
