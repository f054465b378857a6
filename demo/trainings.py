"""The trainings of ``ztsnr demo --train``: an epsilon base, and four fine-tunes of it that differ only in objective.

The base is the kind of model that users have: it predicts epsilon on SDXL's schedule.  From its weights, with the same
pictures in the same order and the same noise, four fine-tunes learn

- to predict epsilon on the plain schedule, as before,
- to predict v on the plain schedule,
- to predict v on the rescaled schedule with Min-SNR weights without a floor, as public scripts do, and
- to predict v on the rescaled schedule as this package trains it.

The schedule is SDXL's, scaled to the canvas (objectives.py).  A stopped run resumes in the training that it was in.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..data.make_latent_cache import run_cache
from ..errors import UserError
from ..files import atomic_write
from ..training.config import FinetuneSettings
from ..training.settings_file import parse_settings
from ..training.trainer import run_finetune
from .composed import CANVAS, FEW, Composer, Sprites, write_pictures
from .objectives import BASE, EPSILON, OBJECTIVES, Start, shift_of
from .small_model import SIZES, write_small_model
from .workers import run_trainings

ABOUT = "trainings.json"


@dataclass(frozen=True)
class Recipe:
    """How a size is trained.

    Attributes:
        pictures: Number of composed pictures.
        few: Learn the 48 emoji of FEW instead of all.
        base_steps: Optimizer steps of the base.
        steps: Optimizer steps of each fine-tune.
        batch_size: Pictures per step.
        base_learning_rate: Peak learning rate of the base.
        learning_rate: Peak learning rate of the fine-tunes.
        caption_dropout: Share of pictures trained without a caption, for the unconditional prediction.
        dtype: Dtype to compute in.
    """

    pictures: int
    few: bool
    base_steps: int
    steps: int
    batch_size: int
    base_learning_rate: float
    learning_rate: float
    caption_dropout: float
    dtype: str


RECIPES = {
    "cpu": Recipe(12_000, True, 12_000, 6_000, 16, 1e-3, 8e-4, 0.1, "bfloat16"),
    "gpu": Recipe(60_000, False, 60_000, 30_000, 32, 6e-4, 4e-4, 0.1, "bfloat16"),
}
QUICK = replace(RECIPES["cpu"], pictures=3000, steps=600)  # from the packaged base


def _cores() -> int:
    """Cores that this process may use, or all cores where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Trainings:
    """The folder of the trainings.

    Args:
        out: The folder.  Finished trainings in it are reused.
        size: One of RECIPES.
        base: Trained epsilon network to fine-tune.  Default: train one first.
        recipe: Recipe to use instead of the size's.
        say: Takes each line for the user.

    Raises:
        UserError: The folder has another size, base or recipe, or cannot be written.
    """

    def __init__(
        self,
        out: Path,
        size: str = "cpu",
        base: Start | None = None,
        recipe: Recipe | None = None,
        say: Callable[[str], None] = print,
    ):
        self.out, self.size, self.base, self.say = out, size, base, say
        self.recipe = recipe or RECIPES[size]
        self.model_size = SIZES[size]
        about = {"size": size, "base": asdict(base) if base else None, "recipe": asdict(self.recipe)}
        path = out / ABOUT
        try:
            out.mkdir(parents=True, exist_ok=True)
            old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except OSError as error:
            raise UserError(f"{out} cannot be used: {error.strerror or error}") from None
        except ValueError:
            raise UserError(f"{path} cannot be read: remove the folder, or choose another") from None
        if old is not None and old != about:
            raise UserError(f"{out} holds trainings with other settings: choose another folder, or remove it")
        if old is None and any(out.iterdir()):
            raise UserError(f"{out} is not empty and holds no trainings: choose another folder")
        with atomic_write(path) as file:
            file.write(json.dumps(about, indent=2).encode())

    @classmethod
    def open(cls, out: Path) -> "Trainings":
        """The trainings of an existing folder."""
        about = json.loads((out / ABOUT).read_text(encoding="utf-8"))
        base = Start(**about["base"]) if about["base"] else None
        return cls(out, about["size"], base, Recipe(**about["recipe"]))

    @property
    def composer(self) -> Composer:
        """Composer of the pictures."""
        return Composer(FEW if self.recipe.few else Sprites().names, self.model_size.side // CANVAS)

    def run(self, seed: int = 0) -> None:
        """Train everything with one seed.

        The base trains on all cores.  Of the fine-tunes, as many run in parallel as there are cores, because so small a
        network keeps little more than one core busy.

        Raises:
            Stopped: A signal stopped it.
        """
        self.prepare()
        cores = 1 if torch.cuda.is_available() else _cores()
        first = [(BASE, seed)] if self.base is None else []
        rest = [(name, seed) for name in OBJECTIVES]
        run_trainings(self, first, 1, cores)
        run_trainings(self, rest, min(cores, len(rest)), cores)

    def prepare(self) -> None:
        """Write what all trainings share: pictures, the untrained network, and latents."""
        composer, pictures, start = self.composer, self.out / "pictures", self.out / "random"
        if not pictures.exists():
            self.say(f"Composing {self.recipe.pictures} pictures.")
            write_pictures(pictures, self.recipe.pictures, composer)
        if not start.exists():
            words = sorted({word for caption in composer.captions() for word in caption.split()})
            write_small_model(start, words, self.model_size)
        if not (self.out / "latents" / "index.arrow").exists():
            run_cache(
                [pictures],
                self.out / "latents",
                [[(composer.side, composer.side)]],
                vae=start if self.base is None else self.base.path,  # the VAE of a float16 file differs
                config=None if self.base is None else self.base.config,
                margin=0,
                batch_size=self.recipe.batch_size,
                say=lambda line: None,
            )

    def folder(self, name: str, seed: int) -> Path:
        """The folder of a training.  All seeds share the base."""
        if name == BASE:
            return self.out / BASE
        plain = "".join(letter if letter.isalnum() else "-" for letter in name).replace("--", "-")
        return self.out / f"seed-{seed}" / plain

    def exported(self, name: str, seed: int) -> Path:
        """The diffusers folder that a training exports."""
        folder = self.folder(name, seed)
        return folder / "export" / folder.name

    def settings(self, name: str, seed: int) -> FinetuneSettings:
        """The settings of a training, for ``ztsnr finetune``."""
        recipe, first = self.recipe, name == BASE
        steps = recipe.base_steps if first else recipe.steps
        start = self.base or Start(str(self.exported(BASE, seed)))
        if first:
            start = Start(str(self.out / "random"))
        return parse_settings(
            FinetuneSettings,
            {
                "out": str(self.folder(name, seed)),
                "steps": steps,
                "seed": seed,
                "save_every": max(steps // 6, 1),
                "keep": 1,
                "model": {"base": start.path, "text_encoders": True, "dtype": recipe.dtype}
                | ({"config": start.config} if start.config else {}),
                "data": {
                    "sources": [str(self.out / "pictures")],
                    "latents": str(self.out / "latents"),
                    "batch_size": recipe.batch_size,
                    "captions": {"caption_dropout": recipe.caption_dropout},
                    "max_chunks": 1,
                    "validation_share": 0.04,
                    "workers": 0,
                },
                "objective": OBJECTIVES[EPSILON if first else name]
                | {"schedule_shift": shift_of(self.model_size.side // self.model_size.factor)},
                "optimizer": {
                    "learning_rate": recipe.base_learning_rate if first else recipe.learning_rate,
                    "betas": [0.9, 0.99],
                    "weight_decay": 0.0,
                    "warmup_steps": min(100, steps // 4),
                    "schedule": "cosine",
                },
                "average": {"sigma_rel": [0.06]},
                "speed": {"checkpointing": "off", "compile": False},
                "watch": {
                    "log_every": max(steps // 60, 1),
                    "validate_every": steps,
                    "preview_every": 0,
                    "tensorboard": False,
                },
                "export": {"dtype": "float32", "single_file": False, "raw": False},
            },
        )

    def train(self, name: str, seed: int) -> None:
        """Train to the end, from the last saved state.

        Raises:
            Stopped: A signal stopped it.
        """
        if not self.exported(name, seed).exists():
            run_finetune(self.settings(name, seed), resume=True, say=lambda line: None)
