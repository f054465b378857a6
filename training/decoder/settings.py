"""What ``ztsnr finetune-vae`` trains, and how."""

from dataclasses import dataclass

from ...errors import UserError

COMPUTE_DTYPES = ("float32", "bfloat16")
SMALLEST_JUDGED = 32  # pixels: a patch of the discriminator is larger than what is smaller


@dataclass(frozen=True)
class VaeDecoderSettings:
    """What to train, and how.

    Attributes:
        model: a diffusers folder or .safetensors file, of a whole model or of its VAE alone.
        sources: folders, .jsonl, .parquet or .tar files of pictures; captions are not needed.
        out: folder of the run, made if it is not there.
        config: for a single file: a diffusers folder, or its name on the hub, whose settings complete it.
        boxes: a JSONL file of {"picture": KEY, "boxes": [[left, top, right, bottom], ...]}, in pixels of the upright
            original pictures.
        box_weight: of the losses inside boxes, that outside being 1; normalised, so that each picture counts alike.
        box_crops: share of the crops of pictures with boxes that have the middle of one in them; of held-out pictures
            with boxes all have.
        size: side of the square crops, in pixels.
        shorter_side: to which that of each picture is resized first, if it is longer: eyes should be as large as in
            the pictures that the model will make.
        flip: share of the pictures that are mirrored.
        held_out: share of the pictures that is kept for measuring.
        held_out_pictures: no more than so many of them are measured.
        steps: of training.
        batch_size: crops of a step.
        learning_rate: of AdamW, for the decoder and for the discriminator.
        l1_weight: of |x - y|, pixels in [-1, 1].
        lpips_weight: of LPIPS; at 0 the package lpips is not needed.
        lpips_backbone: a .safetensors file of torchvision's VGG16; by default from the hub or its cache.
        discriminator_weight: factor on the adaptive weight; at 0 there is no discriminator.
        discriminator_start: the first step, from 0, with it: late, so that it does not learn what L1 mends anyway.
        discriminator_width: channels of its first layer.
        ema_decay: of the moving average of the weights, which is the result.
        dtype: float32, or bfloat16 to compute the decoder and the discriminator in; weights are float32, and so is the
            encoder, always.
        device: auto takes CUDA, XPU or MPS if there is one.
        seed: of order, crops, samples and the discriminator.
        workers: processes that open pictures; 0 opens them in this one.
        log_every, save_every: steps.
        resume: go on from the state in ``out``, if there is one.
    """

    model: str
    sources: tuple[str, ...]
    out: str
    config: str | None = None
    boxes: str | None = None
    box_weight: float = 4.0
    box_crops: float = 0.5
    size: int = 256
    shorter_side: int = 1024
    flip: float = 0.5
    held_out: float = 0.02
    held_out_pictures: int = 64
    steps: int = 20_000
    batch_size: int = 8
    learning_rate: float = 1e-5
    l1_weight: float = 1.0
    lpips_weight: float = 1.0
    lpips_backbone: str | None = None
    discriminator_weight: float = 0.5
    discriminator_start: int = 5_000
    discriminator_width: int = 64
    ema_decay: float = 0.999
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0
    workers: int = 2
    log_every: int = 50
    save_every: int = 1_000
    resume: bool = False

    def __post_init__(self):
        positive = ("size", "shorter_side", "held_out_pictures", "steps", "batch_size", "learning_rate",
                    "discriminator_width", "log_every", "save_every")  # fmt: skip
        at_least_0 = ("box_weight", "l1_weight", "lpips_weight", "discriminator_weight", "discriminator_start")
        shares = ("box_crops", "flip")
        for names, is_right, what in (
            (positive, lambda value: value > 0, "above 0"),
            (at_least_0, lambda value: value >= 0, "at least 0"),
            (shares, lambda value: 0 <= value <= 1, "from 0 to 1"),
            (("ema_decay", "held_out"), lambda value: 0 < value < 1, "between 0 and 1"),
        ):
            for name in names:
                if not is_right(getattr(self, name)):
                    raise UserError(f"{name} must be {what}, not {getattr(self, name)}")
        if self.dtype not in COMPUTE_DTYPES:
            raise UserError(f"dtype must be {' or '.join(COMPUTE_DTYPES)}, not {self.dtype}")
        if not self.l1_weight and not self.lpips_weight:
            raise UserError("l1_weight and lpips_weight are both 0: nothing would hold the decoder to the picture")
        if self.discriminator_weight and self.size < SMALLEST_JUDGED:
            raise UserError(
                f"size must be at least {SMALLEST_JUDGED} for the discriminator, not {self.size}; or set "
                "discriminator_weight = 0"
            )
