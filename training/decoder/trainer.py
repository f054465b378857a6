"""Fine-tuning the decoder of a VAE, so that eyes and other small things come out right and latents stay what they are.

NovelAI did this to SDXL's VAE for V3 (arXiv 2409.15997).  The encoder and ``quant_conv`` are frozen, so the U-Net,
caches of latents, and everybody else's models for the same latents, need not change: only ``decoder`` and
``post_quant_conv`` do.  The losses are those that the VAE was first trained with (``perceptual``).

The decoder learns from samples of the encoder's posterior and not from its mean, as in latent diffusion (Rombach et
al., arXiv 2112.10752): what a U-Net gives it is never exactly a mean either.  It is measured on means, which have no
random numbers.
"""

import dataclasses
import hashlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from ...checkpoints.header import read_header
from ...checkpoints.stream import DTYPE_NAMES, made, write_tensors
from ...checkpoints.vae import hash_encoder, load_vae
from ...data.dataset import PictureDataset, loader
from ...data.epoch_plan import EpochPlan
from ...data.keyed_random import POSTERIOR, keyed_generator
from ...data.picture_boxes import load_crop, read_boxes
from ...data.pictures import PictureError
from ...data.quarantine import Quarantine
from ...data.sources import PictureIndex, Source, build_index, split
from ...errors import UserError
from ...files import atomic_write, check_new
from ...samplers.devices import send
from ...world import describe_device, find_device
from ..settings_file import write_settings
from .export import is_whole, merge_decoder, save_vae
from .perceptual import load_lpips
from .reconstruction import Scores, evaluate, picture_sheet
from .settings import VaeDecoderSettings
from .step import DecoderTraining

STATE, SCORES, SHEET, SETTINGS = "state.safetensors", "scores.json", "pictures.png", "config.toml"
ABOUT = "ztsnr.vae_decoder"  # in the metadata of a state: JSON
# what may be another in a resumed run
FREE = {
    *("out", "steps", "held_out_pictures", "device", "workers", "log_every", "save_every", "resume"),
    *("model", "config", "sources", "lpips_backbone"),  # places; what they hold is compared
}


@dataclass(frozen=True)
class VaeDecoderReport:
    """What ``run_finetune_vae`` made.

    Attributes:
        before, after: on the held-out pictures.
        vae: the diffusers folder of the VAE alone, float32.
        merged: the model with it; None where ``model`` was a VAE alone.
    """

    before: Scores
    after: Scores
    vae: Path
    merged: Path | None


# ----------------------------------------------------------------------------------------------------------------------
# The command


def run_finetune_vae(settings: VaeDecoderSettings, *, say: Callable[[str], None] = print) -> VaeDecoderReport | None:
    """Fine-tune the decoder of a VAE, measure it, and write it alone and within its model.

    In ``out`` are then ``vae`` (a diffusers folder), ``merged`` or ``merged.safetensors``, ``scores.json``,
    ``pictures.png`` (original, before, after), ``config.toml`` with all settings, and the state of the run.  SIGINT and
    SIGTERM save the state and end it; resumed, on the same machine it gives the same as without an end, bit for bit on
    a CPU in float32.

    Args:
        settings: what to do.
        say: takes each line of the report.

    Returns:
        what was made; None if it was stopped by a signal.

    Raises:
        UserError: pictures, model, boxes or LPIPS that cannot be had; too few pictures; a state of another run, or
            one that is there without ``resume``; results that are there already; losses that are no finite numbers.
    """
    out = Path(settings.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror or error}") from None
    merged = None
    if is_whole(Path(settings.model)):
        merged = out / ("merged" if Path(settings.model).is_dir() else "merged.safetensors")
    for path in filter(None, (out / "vae", merged)):
        check_new(path)
    if (out / STATE).exists() and not settings.resume:
        raise UserError(f"{out} has the state of a run: set resume to go on with it, or choose another folder")

    device = find_device(settings.device)
    if settings.device == "auto":
        say(f"Device: {describe_device(device)}")
    vae = load_vae(settings.model, config=settings.config, device=device)
    encoder = hash_encoder(vae)
    perceptual = None
    if settings.lpips_weight:
        perceptual = load_lpips(settings.lpips_backbone).to(device)

    dataset, examples = _read_pictures(settings, vae, say)
    before, shown_before = evaluate(vae, examples, perceptual, settings.batch_size)
    say(f"Before, on {before.pictures} held-out pictures: {before}.")
    training = DecoderTraining(vae, settings, perceptual)
    about = _about(settings, dataset.index, encoder)
    if (out / STATE).exists():
        _load_state(training, out / STATE, about)
        say(f"Resumed behind step {training.steps}.")
    with atomic_write(out / SETTINGS) as file:
        file.write(write_settings(settings))
    if not _train(training, dataset, out / STATE, about, say):
        say(f"Stopped behind step {training.steps} of {settings.steps}; the state is saved: resume to go on.")
        return None

    training.take_average()
    if hash_encoder(vae) != encoder:
        raise RuntimeError("the encoder has changed in training, and must not: nothing was written")
    after, shown_after = evaluate(vae, examples, perceptual, settings.batch_size)
    say(f"After {training.steps} steps: {after}.")
    with atomic_write(out / SCORES) as file:
        scores = {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after), "steps": training.steps}
        file.write((json.dumps(scores | {"encoder_sha256": encoder}, indent=2) + "\n").encode())
    with atomic_write(out / SHEET) as file:
        originals = examples[: len(shown_after), :3]
        picture_sheet({"original": originals, "before": shown_before, "after": shown_after}).save(file, "PNG")
    if merged is not None:
        merge_decoder(vae, settings.model, merged)
        say(f"Wrote {merged}, in which nothing but the decoder differs from {settings.model}.")
    save_vae(vae, out / "vae")
    say(f"Wrote {out / 'vae'}, {out / SCORES} and {out / SHEET}.")
    return VaeDecoderReport(before, after, out / "vae", merged)


def _read_pictures(
    settings: VaeDecoderSettings, vae: AutoencoderKL, say: Callable[[str], None]
) -> tuple[PictureDataset, torch.Tensor]:
    """The crops to train with, and (N, 4, H, W) of held-out pictures."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if settings.size % factor:
        raise UserError(f"size must be a multiple of {factor}, the width of a latent, not {settings.size}")
    index, refused = build_index([Source(path) for path in settings.sources], allow_missing_captions=True)
    is_large = index.sizes.min(axis=1) >= settings.size
    for count, what in ((len(refused), "cannot be read"), ((~is_large).sum(), f"are smaller than {settings.size}")):
        if count:
            say(f"{count} pictures {what} and are left out.")
    boxes = read_boxes(settings.boxes, index) if settings.boxes else None
    read = partial(load_crop, index=index, shorter_side=settings.shorter_side, boxes=boxes)

    is_taken = is_large & (index.repeats > 0)
    training, held_out = (those[is_taken[those]] for those in split(index, settings.held_out))
    if not len(held_out):
        raise UserError(f"none of the {len(index)} pictures is held out for measuring: raise held_out")
    if len(training) < settings.batch_size:
        raise UserError(f"{len(training)} pictures are left to train with, fewer than a batch of {settings.batch_size}")
    bucket, examples = (settings.size, settings.size), []
    for picture in held_out[: settings.held_out_pictures].tolist():
        try:
            numbers = partial(keyed_generator, settings.seed, 0, picture)
            examples.append(read(picture, bucket, numbers, box_crops=float(boxes is not None))[0])
        except (PictureError, OSError) as error:
            say(f"{index.key(picture)} is held out, and cannot be used: {error}.")
    if not examples:
        raise UserError("none of the held-out pictures can be used")

    assignment = np.full(len(index), -1)
    assignment[training] = 0
    plan = EpochPlan(assignment, [bucket], batch_size=settings.batch_size, seed=settings.seed, repeats=index.repeats)
    load = partial(read, flip=settings.flip, box_crops=settings.box_crops)
    return PictureDataset(plan, index, load, Quarantine(Path(settings.out) / "unusable")), torch.stack(examples)


def _train(
    training: DecoderTraining, dataset: PictureDataset, path: Path, about: dict, say: Callable[[str], None]
) -> bool:
    """The steps that are left.  False if a signal came before the last of them; the state is saved in any case."""
    settings, plan = training.settings, dataset.plan
    epoch, start = 0, training.steps
    while start >= (count := plan.step_count(epoch)):
        epoch, start = epoch + 1, start - count
    batches = loader(dataset, epoch=epoch, start=start, workers=settings.workers)
    device, left = training.vae.device, settings.steps - training.steps
    begun, seen = time.perf_counter(), 0
    with _stop_requested() as is_stopped:
        for batch in islice(batches, max(left, 0)):
            noise = _posterior_noise(training.vae, settings, batch.epoch, batch.pictures.tolist())
            losses = training.step(send(batch.data, device), send(noise, device))
            seen += len(batch.data)
            is_last = training.steps >= settings.steps or is_stopped()
            if is_last or training.steps % settings.log_every == 0:
                training.check()
                numbers = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
                rate = seen / (time.perf_counter() - begun)
                say(f"Step {training.steps} of {settings.steps}: {numbers}; {rate:.3g} pictures/s.")
            if is_last or training.steps % settings.save_every == 0:
                training.check()
                _save_state(training, path, about)
            if is_last:
                break
    return training.steps >= settings.steps


def _posterior_noise(vae: AutoencoderKL, settings: VaeDecoderSettings, epoch: int, pictures: list[int]) -> torch.Tensor:
    side = settings.size // 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (vae.config.latent_channels, side, side)
    drawn = [
        keyed_generator(settings.seed, epoch, picture, POSTERIOR).standard_normal(shape, np.float32)
        for picture in pictures
    ]
    return torch.from_numpy(np.stack(drawn))


def _about(settings: VaeDecoderSettings, index: PictureIndex, encoder: str) -> dict:
    """What must be the same in a resumed run."""
    keys = hashlib.sha256("\n".join(index.table["key"].to_pylist()).encode()).hexdigest()
    fixed = {key: value for key, value in dataclasses.asdict(settings).items() if key not in FREE}
    return json.loads(json.dumps(fixed | {"set of pictures": keys, "encoder": encoder}))


def _save_state(training: DecoderTraining, path: Path, about: dict) -> None:
    dtype_names = {**DTYPE_NAMES, torch.int64: "I64"}
    tensors = {name: made(t.cpu(), dtype_names[t.dtype]) for name, t in training.state().items()}
    with atomic_write(path) as file:
        write_tensors(file, tensors, {ABOUT: json.dumps({"steps": training.steps, "settings": about})})


def _load_state(training: DecoderTraining, path: Path, about: dict) -> None:
    try:
        said = json.loads(read_header(path).metadata[ABOUT])
        steps, settings = int(said["steps"]), dict(said["settings"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no state of such a run: choose another folder, or remove it") from None
    if others := [key for key in about if settings.get(key) != about[key]]:
        raise UserError(
            f"{path} is the state of a run with another {others[0]}: give what it was, or choose another folder"
        )
    # copies, because Windows does not replace a file that is mapped, as those of load_file are
    training.load_state({name: tensor.clone() for name, tensor in load_file(path).items()}, steps)


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Within the block the first SIGINT or SIGTERM is only noted; a second one does what it always does."""
    asked = []

    def note(number: int, frame) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
