"""The settings of ``ztsnr finetune``: one tree, with the values allowed beside each field."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from ..data.captions import CaptionSettings
from ..data.sources import CAPTION_FIELDS
from ..errors import UserError
from .checkpointing import MODES
from .ema import WIDEST
from .networks import AdapterSettings
from .objective import ObjectiveSettings
from .optimizers import OPTIMIZERS
from .ranges import Range, check_values


@dataclass(frozen=True)
class ModelSettings:
    """The model to fine-tune.

    Attributes:
        base: Diffusers folder, .safetensors file of a whole model, or a name on the Hugging Face Hub.
        config: For a single file: diffusers folder or Hub name whose settings and tokenizers complete it.
        adapter: Train a low-rank adapter instead of the U-Net's own weights.
        text_encoders: Train the text encoders too.
        dtype: Dtype to compute in.  Trained weights are float32 in any case.
        latent_statistics: Folder of a latent cache.  Shifts and scales each channel of the latents by its mean and
            standard deviation there (NovelAI V3, arXiv 2409.15997).  Default: the base's latent scaling.
    """

    base: str
    config: str | None = None
    adapter: AdapterSettings | None = None
    text_encoders: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    latent_statistics: Path | None = None


@dataclass(frozen=True)
class SourceSettings:
    """A source of pictures.  A plain path stands for a table with that path.

    Attributes:
        path: Folder, .jsonl, .parquet or .tar file of pictures.
        name: Beginning of the pictures' keys.  Default: the last part of the path.
        weight: How often an epoch sees each picture.
        caption_fields: Fields or columns that hold captions, in JSON and in tables.
        outside: Allow a list to name pictures outside its own folder.
    """

    plain: ClassVar[str] = "path"

    path: Path
    name: str = ""
    weight: Annotated[float, Range(0)] = 1.0
    caption_fields: tuple[str, ...] = CAPTION_FIELDS
    outside: bool = False


@dataclass(frozen=True)
class TrainingCaptions(CaptionSettings):
    """How captions vary from epoch to epoch."""

    shuffle: bool = True
    caption_dropout: float = 0.1


@dataclass(frozen=True)
class TagWeightSettings:
    """Loss weights of pictures by their tags.

    Attributes:
        table: JSON file of tags and weights.  Default: weights of (median frequency / frequency) ^ power.
        power: Exponent of those weights.
        low: Smallest weight of a picture.
        high: Largest weight of a picture.
    """

    table: Path | None = None
    power: Annotated[float, Range(0)] = 0.5
    low: Annotated[float, Range(0, 1)] = 0.25
    high: Annotated[float, Range(1)] = 4.0


@dataclass(frozen=True)
class DataSettings:
    """Pictures, buckets and batches.

    Attributes:
        sources: Sources of pictures and captions.
        batch_size: Pictures per optimizer step, over all GPUs.
        latents: Latent cache of the same sources, written by ``ztsnr cache``.  Its buckets are used.
        buckets: Names of bucket sets (sdxl, novelai), or sizes such as "1024x1024,832x1216".
        areas: Areas to make further buckets of, such as "512x512".
        step: Sides of buckets are multiples of this many pixels.
        limit: Longest side of a bucket, in pixels.
        max_aspect_error: Leave out pictures with a larger |log(w/h) - log(W/H)|.  At log 2, half a picture is cut off.
        min_size: Leave out pictures with a shorter side, in pixels.
        no_upscale: Leave out pictures that would be enlarged.
        flip: Share of pictures to mirror.  Not with cached latents.
        background: Colour behind transparent pixels.
        captions: How captions vary from epoch to epoch.
        allow_missing_captions: Train pictures without a caption with an empty one.
        max_chunks: Longest caption, in chunks of 75 tokens.
        tag_weights: Weight each picture's loss by its tags.
        validation_share: Share of pictures to hold out for validation, chosen by a hash of their keys.
        workers: Processes per GPU that read pictures.
        max_unusable: Stop the run when a larger share of the pictures, and more than 5, cannot be read.  0 allows none.
    """

    sources: tuple[SourceSettings, ...]
    batch_size: Annotated[int, Range(1)]
    latents: Path | None = None
    buckets: tuple[str, ...] = ("sdxl",)
    areas: tuple[str, ...] = ()
    step: Annotated[int, Range(1)] = 64
    limit: Annotated[int, Range(1)] = 2048
    max_aspect_error: Annotated[float, Range(0, infinite=True)] = 0.6931471805599453
    min_size: Annotated[int, Range(0)] = 0
    no_upscale: bool = False
    flip: Annotated[float, Range(0, 1)] = 0.0
    background: str = "white"
    captions: TrainingCaptions = field(default_factory=TrainingCaptions)
    allow_missing_captions: bool = False
    max_chunks: Annotated[int, Range(1)] = 3
    tag_weights: TagWeightSettings | None = None
    validation_share: Annotated[float, Range(0, below=1)] = 0.01
    workers: Annotated[int, Range(0)] = 2
    max_unusable: Annotated[float, Range(0, 1)] = 0.01


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer and learning rate.

    Attributes:
        name: Optimizer.  adamw8bit and adamw4bit need torchao, bnb_adamw8bit needs bitsandbytes.
        learning_rate: Peak learning rate.
        text_encoder_learning_rate: Peak learning rate of the text encoders.  Default: ``learning_rate``.
        betas: Decay of the averages of the gradient and of its square.
        eps: Added to the denominator of the update.
        weight_decay: Decoupled weight decay.
        bf16_stochastic_round: Keep weights in bfloat16 and round them stochastically.  Low-bit optimizers only.
        schedule: Decay of the learning rate: constant, half a cosine, or 1 / sqrt(step / reference_steps).
        warmup_steps: Steps in which the learning rate rises linearly from 0.
        final_share: Learning rate at the end of the cosine, as a share of the peak.
        reference_steps: Step at which rsqrt begins to decay.
        clip: Largest norm of the gradient.  0 turns clipping off.
        accumulation: Number of parts in which a GPU computes its share of the batch, one after another.
        max_skipped: Stop the run after this many steps in a row whose gradient is not finite.
    """

    name: Literal[OPTIMIZERS] = "adamw"  # pyright: ignore[reportInvalidTypeForm]  pydantic reads it when it runs
    learning_rate: Annotated[float, Range(0)] = 1e-5
    text_encoder_learning_rate: Annotated[float, Range(0)] | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Annotated[float, Range(0)] = 0.01
    bf16_stochastic_round: bool = False
    schedule: Literal["constant", "cosine", "rsqrt"] = "constant"
    warmup_steps: Annotated[int, Range(0)] = 100
    final_share: Annotated[float, Range(0, 1)] = 0.0
    reference_steps: Annotated[int, Range(1)] | None = None
    clip: Annotated[float, Range(0)] = 1.0
    accumulation: Annotated[int, Range(1)] = 1
    max_skipped: Annotated[int, Range(1)] = 10


@dataclass(frozen=True)
class StageSettings:
    """A number of steps in which only some groups of blocks are trained.

    Attributes:
        groups: Groups to train: all, text, time, down, mid, up, attention, or one block such as up.0.
        steps: Length of the stage.  Default: the rest of the run, for the last stage only.
        learning_rate: Factor on the optimizer's learning rate.
    """

    groups: tuple[str, ...] = ("all",)
    steps: Annotated[int, Range(1)] | None = None
    learning_rate: Annotated[float, Range(0)] = 1.0


@dataclass(frozen=True)
class AverageSettings:
    """Averages of the weights.  The first one is validated, previewed and exported.

    Attributes:
        sigma_rel: Widths of power-function averages (EDM2, arXiv 2312.02696).
        decay: Decay of an additional exponential average.
        on_cpu: Keep the averages in main memory.
        every: Steps between updates.
        snapshots: Steps between snapshots, from which ``post_hoc`` makes averages of other widths.  0 saves none.
    """

    sigma_rel: tuple[Annotated[float, Range(above=0, high=WIDEST)], ...] = (0.05,)
    decay: Annotated[float, Range(above=0, below=1)] | None = None
    on_cpu: bool = False
    every: Annotated[int, Range(1)] = 1
    snapshots: Annotated[int, Range(0)] = 0


@dataclass(frozen=True)
class SpeedSettings:
    """Devices, compilation and memory.

    Attributes:
        device: "auto" picks CUDA, XPU or MPS if available.  Several processes need CUDA or the CPU.
        compile: Compile the U-Net once per bucket before the first step.  Default: on CUDA only.
        checkpointing: Recompute activations instead of storing them.  "auto" picks the fastest mode that fits.
        strategy: On several GPUs: ddp copies the weights to each, fsdp shards them, hsdp shards them within each node.
    """

    device: str = "auto"
    compile: bool | None = None
    checkpointing: Literal[("auto", *MODES)] = "auto"  # pyright: ignore[reportInvalidTypeForm]
    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"


@dataclass(frozen=True)
class WatchSettings:
    """Metrics, validation and previews.

    Attributes:
        log_every: Steps between lines of metrics.
        validate_every: Steps between validations.  0 turns them off.
        validation_pictures: Largest number of held-out pictures to validate on.
        preview_every: Steps between previews.  0 turns them off.
        prompts: Prompts to preview, besides the solid colours.
        preview_size: Width and height of previews, in pixels.  Default: the size that the base was trained at.
        preview_steps: Sampling steps of previews.
        guidance: Classifier-free guidance of previews.
        leak: With each preview, measure whether the prediction at t = T follows the mean of the noise.
        tensorboard: Write TensorBoard events.
        wandb: Weights & Biases project to log to.
    """

    log_every: Annotated[int, Range(1)] = 50
    validate_every: Annotated[int, Range(0)] = 1000
    validation_pictures: Annotated[int, Range(1)] = 64
    preview_every: Annotated[int, Range(0)] = 1000
    prompts: tuple[str, ...] = ()
    preview_size: tuple[int, int] | None = None
    preview_steps: Annotated[int, Range(1)] = 20
    guidance: Annotated[float, Range(0)] = 5.0
    leak: bool = True
    tensorboard: bool = True
    wandb: str | None = None


@dataclass(frozen=True)
class ExportSettings:
    """Files to write at the end.

    Attributes:
        single_file: Write a .safetensors file.  If the base is one, everything that was not trained is copied from it.
        folder: Write a diffusers folder.
        dtype: Dtype of the exported weights.
        raw: Export the final weights too, besides their average.
    """

    single_file: bool = True
    folder: bool = True
    dtype: Literal["bfloat16", "float16", "float32"] = "float16"
    raw: bool = True


@dataclass(frozen=True)
class FinetuneSettings:
    """The run.

    Attributes:
        model: The model to fine-tune.
        data: Pictures, buckets and batches.
        out: Folder of the run.
        steps: Number of optimizer steps.
        objective: Prediction type, noise schedule and loss.
        optimizer: Optimizer and learning rate.
        stages: Stages of the run, one after another.  Default: a single stage that trains everything.
        average: Averages of the weights.
        speed: Devices, compilation and memory.
        watch: Metrics, validation and previews.
        export: Files to write at the end.
        seed: Seed of everything random.
        save_every: Steps between saved states.
        keep: Number of most recent states to keep.
        keep_every: Also keep the state of every step divisible by this.  0 keeps none of them.

    Raises:
        UserError: A value out of its range, or settings that exclude each other.
    """

    model: ModelSettings
    data: DataSettings
    out: Path
    steps: Annotated[int, Range(1)]
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    stages: tuple[StageSettings, ...] = (StageSettings(),)
    average: AverageSettings = field(default_factory=AverageSettings)
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    seed: int = 0
    save_every: Annotated[int, Range(1)] = 1000
    keep: Annotated[int, Range(1)] = 2
    keep_every: Annotated[int, Range(0)] = 0

    def __post_init__(self):
        check_values(self)
        self._check_stages()
        self._check_export()
        if self.watch.preview_size is not None and any(side < 8 or side % 8 for side in self.watch.preview_size):
            raise UserError(f"watch.preview_size must be two multiples of 8, not {list(self.watch.preview_size)}")
        if self.average.on_cpu and self.speed.strategy != "ddp":
            raise UserError(
                f'average.on_cpu works only with speed.strategy = "ddp": "{self.speed.strategy}" shards the averages '
                "over the GPUs.  Turn average.on_cpu off, or choose ddp"
            )
        if self.data.latents is not None and self.data.flip:
            raise UserError(
                "data.flip does not work with data.latents, because mirrored latents are not the latents of a mirrored "
                "picture: set data.flip to 0"
            )
        if self.optimizer.schedule == "rsqrt" and self.optimizer.reference_steps is None:
            raise UserError('optimizer.schedule = "rsqrt" needs optimizer.reference_steps: set it')
        if self.optimizer.schedule == "cosine" and self.steps <= self.optimizer.warmup_steps:
            raise UserError(
                f'optimizer.schedule = "cosine" needs more steps than optimizer.warmup_steps = '
                f"{self.optimizer.warmup_steps}, not {self.steps}: lower optimizer.warmup_steps or raise steps"
            )

    def _check_stages(self) -> None:
        for number, stage in enumerate(self.stages):
            if not stage.groups:
                raise UserError(f"stages.{number}.groups is empty: name the groups to train, or leave it out for all")
        if not self.stages:
            raise UserError("stages is empty: add a stage, or leave it out to train everything")
        for number, stage in enumerate(self.stages[:-1]):
            if stage.steps is None:
                raise UserError(f"stages.{number}.steps is missing: only the last stage may go without")

    def _check_export(self) -> None:
        whole = self.export.single_file or self.export.folder
        if not self.average.sigma_rel and self.average.decay is None and not self.export.raw:
            raise UserError("nothing would be exported: set average.sigma_rel or average.decay, or turn export.raw on")
        if not whole and self.model.adapter is None:
            raise UserError("nothing would be exported: turn export.single_file or export.folder on")
        if not whole and self.model.text_encoders:
            raise UserError(
                "trained text encoders are exported only with a whole model, not with the adapter: turn "
                "export.single_file or export.folder on, or model.text_encoders off"
            )
