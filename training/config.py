"""What ``ztsnr finetune`` is told: one tree of settings, and what is allowed of them."""

import math
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Literal

from ..data.captions import CaptionSettings
from ..data.sources import CAPTION_FIELDS
from ..errors import UserError
from .checkpointing import MODES
from .networks import AdapterSettings
from .objective import ObjectiveSettings
from .optimizers import OPTIMIZERS


@dataclass(frozen=True)
class ModelSettings:
    """What is trained.

    Attributes:
        base: a diffusers folder, a .safetensors file with everything in it, or a name on the hub.
        config: for a single file, a diffusers folder or hub name whose settings and tokenizers complete it.
        adapter: train a low-rank adapter instead of the U-Net's own weights.
        text_encoders: train them too.
        dtype: to compute in; trained weights are float32 in any case.
        latent_statistics: folder of a latent cache.  Shift and scale each channel of the latents by its mean and
            standard deviation (NovelAI V3, arXiv 2409.15997).  Without it latents are scaled as the base's are.
    """

    base: str
    config: str | None = None
    adapter: AdapterSettings | None = None
    text_encoders: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    latent_statistics: Path | None = None


@dataclass(frozen=True)
class SourceSettings:
    """Pictures: a folder, .jsonl, .parquet or .tar file.

    Attributes:
        weight: how often an epoch sees each of them.
        caption_fields: where captions are in JSON and in tables.
        outside: a list may name pictures outside of the folder that it is in.
    """

    path: Path
    name: str = ""
    weight: float = 1.0
    caption_fields: tuple[str, ...] = CAPTION_FIELDS
    outside: bool = False


@dataclass(frozen=True)
class TrainingCaptions(CaptionSettings):
    """What becomes of captions in training: tags come in random order, and one text of ten is empty, for guidance."""

    shuffle: bool = True
    caption_dropout: float = 0.1


@dataclass(frozen=True)
class TagWeightSettings:
    """Loss weights of pictures by their tags.

    Attributes:
        table: a table of tags and weights; by default (median frequency / frequency) ^ power.
        power: of that.
        low, high: limits of a picture's weight.
    """

    table: Path | None = None
    power: float = 0.5
    low: float = 0.25
    high: float = 4.0


@dataclass(frozen=True)
class DataSettings:
    """What it is trained with.

    Attributes:
        sources: of pictures and captions.
        batch_size: pictures of an optimizer's step, of all GPUs together.
        latents: a latent cache of the same sources, made by ``ztsnr cache``; its buckets are used.
        buckets: sdxl, novelai, or sizes such as "1024x1024,832x1216".
        areas: buckets of these areas too, such as "512x512".
        step, limit: sides are multiples of step, and not longer than limit.
        max_aspect_error: leave out what is further from its bucket, |log(w/h) - log(W/H)|.
        min_size: leave out pictures with a shorter side.
        no_upscale: leave out pictures that would be enlarged.
        flip: share of the pictures that are mirrored; not with cached latents.
        background: colour behind transparent pixels.
        captions: what becomes of them.
        allow_missing_captions: a picture without a caption has an empty one.
        max_chunks: of 75 tokens each, of a caption.
        tag_weights: weight the loss of each picture by its tags.
        validation_share: of the pictures, held out by a hash of their names.
        workers: processes that read, on each GPU.
        max_unusable: the run stops when a larger share of the pictures cannot be used.
    """

    sources: tuple[SourceSettings, ...]
    batch_size: int
    latents: Path | None = None
    buckets: tuple[str, ...] = ("sdxl",)
    areas: tuple[str, ...] = ()
    step: int = 64
    limit: int = 2048
    max_aspect_error: float = 0.6931471805599453
    min_size: int = 0
    no_upscale: bool = False
    flip: float = 0.0
    background: str = "white"
    captions: TrainingCaptions = field(default_factory=TrainingCaptions)
    allow_missing_captions: bool = False
    max_chunks: int = 3
    tag_weights: TagWeightSettings | None = None
    validation_share: float = 0.01
    workers: int = 2
    max_unusable: float = 0.01


@dataclass(frozen=True)
class OptimizerSettings:
    """How it is trained.

    Attributes:
        name: see ``make_optimizer``.
        learning_rate, betas, eps, weight_decay, bf16_stochastic_round: of it.
        text_encoder_learning_rate: for the text encoders, if they are trained.
        schedule, warmup_steps, final_share, reference_steps: of the learning rate, see ``lr_factor``.
        clip: largest norm of the gradient; 0 for any.
        accumulation: so many parts of a GPU's share of the batch are computed one after the other.
        max_skipped: after so many steps in a row whose gradient is no number, the run stops.
    """

    name: Literal[OPTIMIZERS] = "adamw"
    learning_rate: float = 1e-5
    text_encoder_learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    bf16_stochastic_round: bool = False
    schedule: Literal["constant", "cosine", "rsqrt"] = "constant"
    warmup_steps: int = 100
    final_share: float = 0.0
    reference_steps: int | None = None
    clip: float = 1.0
    accumulation: int = 1
    max_skipped: int = 10


@dataclass(frozen=True)
class StageSettings:
    """So many steps in which only some groups of blocks are trained.

    Attributes:
        groups: all, text, time, down, mid, up, attention, or one block as up.0.
        steps: of the stage; None for the rest of the run.
        learning_rate: factor on the optimizer's.
    """

    groups: tuple[str, ...] = ("all",)
    steps: int | None = None
    learning_rate: float = 1.0


@dataclass(frozen=True)
class AverageSettings:
    """Averages of the weights, one of which is exported.

    Attributes:
        sigma_rel: widths of power-function averages (EDM2, arXiv 2312.02696).
        decay: of an average with constant decay beside them.
        on_cpu: keep them in the main memory.
        every: steps between updates.
        snapshots: steps between snapshots, of which ``post_hoc`` makes averages of other widths; 0 for none.
    """

    sigma_rel: tuple[float, ...] = (0.05,)
    decay: float | None = None
    on_cpu: bool = False
    every: int = 1
    snapshots: int = 0


@dataclass(frozen=True)
class SpeedSettings:
    """Where and how fast it runs.

    Attributes:
        device: auto takes CUDA, XPU or MPS if there is one; several processes need CUDA or the CPU.
        compile: the U-Net by torch.compile, once for each bucket before the first step; None does it on CUDA.
        checkpointing: compute activations again instead of keeping them: off, selective or full; auto takes what the
            memory allows.
        strategy: on several GPUs: ddp, each with all weights; fsdp, which shares them out; hsdp, which shares them out
            within a node.
    """

    device: str = "auto"
    compile: bool | None = None
    checkpointing: Literal[("auto", *MODES)] = "auto"
    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"


@dataclass(frozen=True)
class WatchSettings:
    """What is written down on the way.

    Attributes:
        log_every: steps from one line of metrics to the next.
        validate_every: steps from one validation to the next; 0 for never.
        validation_pictures: at most so many.
        preview_every: steps from one sheet of pictures to the next; 0 for never.
        prompts: of the pictures, beside the solid colours.
        preview_size: (width, height); by default what the base was trained with.
        preview_steps, guidance: of the sampler.
        leak: measure with each sheet whether the prediction at t = T follows the mean of the noise.
        tensorboard: write for it.
        wandb: name of a project of Weights & Biases.
    """

    log_every: int = 50
    validate_every: int = 1000
    validation_pictures: int = 64
    preview_every: int = 1000
    prompts: tuple[str, ...] = ()
    preview_size: tuple[int, int] | None = None
    preview_steps: int = 20
    guidance: float = 5.0
    leak: bool = True
    tensorboard: bool = True
    wandb: str | None = None


@dataclass(frozen=True)
class ExportSettings:
    """What is written in the end.

    Attributes:
        single_file: a .safetensors file.  Where the base is one and its text encoders are not trained, all but the
            U-Net is the base's, byte by byte.
        folder: a diffusers folder.
        dtype: of its numbers.
        raw: beside the average also the weights as they are in the end.
    """

    single_file: bool = True
    folder: bool = True
    dtype: Literal["bfloat16", "float16", "float32"] = "float16"
    raw: bool = True


@dataclass(frozen=True)
class FinetuneSettings:
    """All that a run depends on.

    Attributes:
        out: folder of the run.
        steps: of the optimizer.
        seed: of everything that is random.
        save_every: steps from one state of the run to the next.
        keep: so many of the last states stay.
        keep_every: the states of these steps stay too; 0 for none.
        stages: one after the other; by default one in which everything is trained.
    """

    model: ModelSettings
    data: DataSettings
    out: Path
    steps: int
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    stages: tuple[StageSettings, ...] = (StageSettings(),)
    average: AverageSettings = field(default_factory=AverageSettings)
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    keep_every: int = 0

    def __post_init__(self):
        for name, (low, high) in _RANGES.items():
            _check_range(name, reduce(getattr, name.split("."), self), low, high)
        for number, stage in enumerate(self.stages):
            _check_range(f"stages.{number}.steps", stage.steps, 1)
            _check_range(f"stages.{number}.learning_rate", stage.learning_rate, 0)
            if not stage.groups:
                raise UserError(f"stages.{number}.groups is empty: name what is trained, or leave it out for all")
        if self.watch.preview_size is not None and any(side < 8 or side % 8 for side in self.watch.preview_size):
            raise UserError(f"watch.preview_size must be two multiples of 8, not {list(self.watch.preview_size)}")
        if self.average.on_cpu and self.speed.strategy != "ddp":
            raise UserError(
                f'average.on_cpu does not work with speed.strategy = "{self.speed.strategy}", by which averages are '
                "shared out to the GPUs: leave it out"
            )
        if self.data.latents is not None and self.data.flip:
            raise UserError("data.flip does not work with cached latents: mirrored latents are not those of a mirror")
        if not self.stages or any(stage.steps is None for stage in self.stages[:-1]):
            raise UserError("all stages but the last need a number of steps")
        if not self.average.sigma_rel and self.average.decay is None and not self.export.raw:
            raise UserError("nothing would be exported: there is no average, and export.raw is off")
        if not (self.export.single_file or self.export.folder or self.model.adapter is not None):
            raise UserError("nothing would be exported: export.single_file and export.folder are both off")
        if self.model.adapter and self.model.text_encoders and not (self.export.single_file or self.export.folder):
            raise UserError(
                "the adapter is of the U-Net alone, so trained text encoders are exported with a whole model only: "
                "turn export.single_file or export.folder on, or model.text_encoders off"
            )
        if self.optimizer.schedule == "rsqrt" and self.optimizer.reference_steps is None:
            raise UserError("the schedule rsqrt needs optimizer.reference_steps")


# name -> the least and the largest value allowed; those of other tables are checked where they are used
_RANGES = {
    **dict.fromkeys(
        (
            *("steps", "save_every", "keep", "data.batch_size", "data.step", "data.max_chunks"),
            *("optimizer.accumulation", "optimizer.max_skipped", "average.every"),
            *("watch.log_every", "watch.validation_pictures", "watch.preview_steps"),
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        (
            *("keep_every", "data.min_size", "data.workers", "average.snapshots"),
            *("optimizer.learning_rate", "optimizer.text_encoder_learning_rate", "optimizer.weight_decay"),
            *("optimizer.warmup_steps", "optimizer.clip"),
            *("watch.validate_every", "watch.preview_every", "watch.guidance"),
        ),
        (0, math.inf),
    ),
    **dict.fromkeys(("data.flip", "data.max_unusable", "optimizer.final_share"), (0, 1)),
}


def _check_range(name: str, number: float | None, low: float, high: float = math.inf) -> None:
    if number is not None and not (math.isfinite(number) and low <= number <= high):
        wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise UserError(f"{name} must be {wanted}, not {number}")
