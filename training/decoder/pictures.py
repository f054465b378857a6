"""The pictures that a decoder is trained with, and those that it is measured on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from ...data.dataset import PictureDataset
from ...data.epoch_plan import EpochPlan
from ...data.keyed_random import POSTERIOR, keyed_generator
from ...data.picture_boxes import load_crop, read_boxes
from ...data.pictures import PictureError
from ...data.quarantine import Quarantine
from ...data.sources import Source, build_index, split
from ...errors import UserError
from .settings import VaeDecoderSettings


def read_pictures(
    settings: VaeDecoderSettings, vae: AutoencoderKL, say: Callable[[str], None]
) -> tuple[PictureDataset, torch.Tensor]:
    """The crops to train with; and held-out crops (N, 4, H, W), pixels in [-1, 1] and marks of boxes.

    Raises:
        UserError: ``size`` is off the latents' grid, or there are too few pictures.
    """
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if settings.size % factor:
        raise UserError(f"size must be a multiple of {factor}, the pixels per latent, not {settings.size}")
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
        raise UserError(
            f"{len(training)} pictures are left to train with, fewer than a batch of {settings.batch_size}: give more "
            "pictures, or lower batch_size"
        )
    bucket, examples = (settings.size, settings.size), []
    for picture in held_out[: settings.held_out_pictures].tolist():
        try:
            numbers = partial(keyed_generator, settings.seed, 0, picture)
            examples.append(read(picture, bucket, numbers, box_crops=float(boxes is not None))[0])
        except (PictureError, OSError) as error:
            say(f"{index.key(picture)} is held out but cannot be used: {error}.")
    if not examples:
        raise UserError("none of the held-out pictures can be used: raise held_out")

    assignment = np.full(len(index), -1)
    assignment[training] = 0
    plan = EpochPlan(assignment, [bucket], batch_size=settings.batch_size, seed=settings.seed, repeats=index.repeats)
    load = partial(read, flip=settings.flip, box_crops=settings.box_crops)
    return PictureDataset(plan, index, load, Quarantine(Path(settings.out) / "unusable")), torch.stack(examples)


def posterior_noise(vae: AutoencoderKL, settings: VaeDecoderSettings, epoch: int, pictures: list[int]) -> torch.Tensor:
    """(B, C, h, w) standard normal noise of the posterior's samples, which depends on seed, epoch and picture."""
    side = settings.size // 2 ** (len(vae.config["block_out_channels"]) - 1)
    shape = (vae.config["latent_channels"], side, side)
    drawn = [
        keyed_generator(settings.seed, epoch, picture, POSTERIOR).standard_normal(shape, np.float32)
        for picture in pictures
    ]
    return torch.from_numpy(np.stack(drawn))
