"""``ztsnr example``: captioned pictures, a small base model of SDXL's classes, and settings to fine-tune it with."""

import shutil
from collections.abc import Callable
from pathlib import Path

from ..files import atomic_folder
from .composed import Composer, write_pictures
from .objectives import BASE, shift_of
from .shipped import CONFIG, FILES, WEIGHTS

PICTURES = 600
STEPS = 400

SETTINGS = """\
# A fine-tune that takes minutes on a CPU: an epsilon network becomes a v-prediction network with zero terminal SNR.
# For your own model, ztsnr finetune --init prints settings to start from.  ztsnr finetune --list-settings explains
# every setting.

out = "{folder}/run"
steps = {steps}
save_every = 200

[model]
base = "{folder}/base.safetensors"  # a diffusers folder, a .safetensors file, or a name on the Hugging Face Hub
config = "{folder}/config"          # settings and tokenizers that complete the file; SDXL itself needs none
text_encoders = true
dtype = "bfloat16"

[data]
sources = ["{folder}/pictures"]  # each picture with its caption in a .txt beside it
batch_size = 16
buckets = ["{side}x{side}"]
step = {side}  # sides are multiples of this; leave it out for SDXL's buckets
max_chunks = 1
validation_share = 0.05
workers = 0

[objective]
schedule_shift = {shift:g}  # scales SDXL's noise levels to a {side} x {side} canvas; leave it out at 1024 x 1024

[optimizer]
learning_rate = 8e-4
betas = [0.9, 0.99]
weight_decay = 0.0
warmup_steps = 50
schedule = "cosine"

[speed]
checkpointing = "off"

[watch]
log_every = 20
validate_every = 200
preview_every = 200
prompts = ["completely black", "completely white", "a frog on a black background", "a train on white"]
leak = false
tensorboard = false
"""


def write_example(folder: Path, say: Callable[[str], None] = print) -> None:
    """Write the example.  The folder appears complete or not at all.

    Raises:
        UserError: The folder exists already, or cannot be written.
    """
    composer, whole = Composer(), folder.resolve()
    with atomic_folder(folder) as place:
        write_pictures(place / "pictures", PICTURES, composer)
        shutil.copyfile(WEIGHTS / FILES[BASE], place / "base.safetensors")
        shutil.copytree(CONFIG, place / "config")
        shutil.copyfile(Path(__file__).parent / "pictures" / "NOTICE.md", place / "NOTICE.md")
        settings = SETTINGS.format(
            folder=whole.as_posix(), steps=STEPS, side=composer.side, shift=shift_of(composer.side)
        )
        (place / "settings.toml").write_text(settings, encoding="utf-8")
    say(f"Wrote {folder}: {PICTURES} pictures with captions, a base network, and settings.toml.")
    say(f"Next:  ztsnr finetune {folder / 'settings.toml'}")
