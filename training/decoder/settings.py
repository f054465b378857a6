"""The settings of ``ztsnr finetune-vae``."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ...errors import UserError
from ..ranges import Range, check_values

SMALLEST_JUDGED = 32  # pixels: a patch of the discriminator is larger than what is smaller


@dataclass(frozen=True)
class VaeDecoderSettings:
    """The run.

    Attributes:
        model: Diffusers folder or .safetensors file of a whole model, or of its VAE alone.
        sources: Folders, .jsonl, .parquet or .tar files of pictures.  Captions are not needed.
        out: Folder of the run.
        config: For a single file: diffusers folder or Hub name whose settings complete it.
        boxes: JSONL file of {"picture": KEY, "boxes": [[left, top, right, bottom], ...]}, in pixels of the upright
            original pictures.
        box_weight: Weight of the losses inside boxes, relative to outside.  Each picture keeps the same total weight.
        box_crops: Share of crops, of pictures with boxes, that are centred on a box.  Held-out ones all are.
        size: Side of the square crops, in pixels.
        shorter_side: Shorter side, in pixels, to which larger pictures are reduced first.  Eyes should be as large as
            in the pictures that the model will make.
        flip: Share of pictures to mirror.
        held_out: Share of pictures to hold out for measuring.
        held_out_pictures: Largest number of held-out pictures to measure.
        steps: Number of training steps.
        batch_size: Crops per step.
        learning_rate: Learning rate of AdamW, for the decoder and for the discriminator.
        l1_weight: Weight of |x - y|, for pixels in [-1, 1].
        lpips_weight: Weight of LPIPS.  0 works without the package lpips.
        lpips_backbone: .safetensors file of torchvision's VGG16.  Default: from the Hugging Face Hub or its cache.
        discriminator_weight: Factor on the discriminator's adaptive weight.  0 trains without a discriminator.
        discriminator_start: First step with the discriminator, from 0.  Late, so that it does not learn what L1 mends.
        discriminator_width: Channels of the discriminator's first layer.
        ema_decay: Decay of the moving average of the weights, which is the result.
        dtype: Dtype to compute the decoder and the discriminator in.  Weights and the encoder stay in float32.
        device: "auto" picks CUDA, XPU or MPS if available.
        seed: Seed of order, crops, posterior samples and the discriminator.
        workers: Processes that open pictures.  0 opens them in the main process.
        log_every: Steps between lines of losses.
        save_every: Steps between saved states.
        resume: Resume from the state in ``out``, if there is one.

    Raises:
        UserError: A value out of its range, or settings that exclude each other.
    """

    model: str
    sources: tuple[str, ...]
    out: str
    config: str | None = None
    boxes: str | None = None
    box_weight: Annotated[float, Range(0)] = 4.0
    box_crops: Annotated[float, Range(0, 1)] = 0.5
    size: Annotated[int, Range(1)] = 256
    shorter_side: Annotated[int, Range(1)] = 1024
    flip: Annotated[float, Range(0, 1)] = 0.5
    held_out: Annotated[float, Range(above=0, below=1)] = 0.02
    held_out_pictures: Annotated[int, Range(1)] = 64
    steps: Annotated[int, Range(1)] = 20_000
    batch_size: Annotated[int, Range(1)] = 8
    learning_rate: Annotated[float, Range(above=0)] = 1e-5
    l1_weight: Annotated[float, Range(0)] = 1.0
    lpips_weight: Annotated[float, Range(0)] = 1.0
    lpips_backbone: str | None = None
    discriminator_weight: Annotated[float, Range(0)] = 0.5
    discriminator_start: Annotated[int, Range(0)] = 5_000
    discriminator_width: Annotated[int, Range(1)] = 64
    ema_decay: Annotated[float, Range(above=0, below=1)] = 0.999
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    seed: int = 0
    workers: Annotated[int, Range(0)] = 2
    log_every: Annotated[int, Range(1)] = 50
    save_every: Annotated[int, Range(1)] = 1_000
    resume: bool = False

    def __post_init__(self):
        check_values(self)
        if not self.l1_weight and not self.lpips_weight:
            raise UserError(
                "l1_weight and lpips_weight are both 0, so nothing would hold the decoder to the picture: raise one"
            )
        if self.discriminator_weight and self.size < SMALLEST_JUDGED:
            raise UserError(
                f"size must be at least {SMALLEST_JUDGED} for the discriminator, not {self.size}; or set "
                "discriminator_weight = 0"
            )
