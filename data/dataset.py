"""Batches for training: the pictures of the plan, read by any number of workers.

Every item is named by its place in the plan, and all its random numbers follow from that name.  So batches are the same
with any number of workers or ranks, and after a resume.

A picture that cannot be used is listed (``Quarantine``), and another one of its bucket takes its place, so that ranks
stay in step.  Which one depends only on the name of the item and on which pictures can be used.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..canvas import Size
from ..errors import UserError
from .arrow_file import pc
from .captions import CaptionSettings, caption_text
from .epoch_plan import EpochPlan
from .keyed_random import CAPTION, CROP, FLIP, REPLACEMENT, keyed_generator
from .picture_index import PictureIndex
from .pictures import WHITE, Color, MicroConditioning, PictureError, cover_size, fit_picture, open_picture
from .quarantine import Quarantine, UnusableShare
from .tokens import TokenBatch, batch_prompts

TRIES = 16  # replacements tried for one picture; if 1 % of pictures are unusable, all fail in 1 of 10^32 cases

# purpose -> the random numbers of an item for it
Numbers = Callable[[int], np.random.Generator]
# picture, bucket (width, height), numbers -> (C, H, W) float32 pixels or latents, and SDXL's micro-conditioning
Load = Callable[[int, Size, Numbers], tuple[torch.Tensor, MicroConditioning]]


class Item(NamedTuple):
    """The name of a picture in a batch.

    Attributes:
        epoch, step: place in the plan.
        bucket: index of the bucket in the plan.
        picture: number of the picture in the index.
        slot: place in the step, over all ranks.
    """

    epoch: int
    step: int
    bucket: int
    picture: int
    slot: int


class Sample(NamedTuple):
    """A picture of a batch; see ``Batch``."""

    item: Item
    picture: int
    data: torch.Tensor
    time_ids: tuple[int, ...]
    caption: str
    tokens: Sequence[torch.Tensor] | None
    weight: float


class Batch(NamedTuple):
    """This rank's B pictures of a step.

    Attributes:
        data: (B, 3, H, W) float32 pixels in [-1, 1], or (B, C, H / 8, W / 8) latents, as the dataset's ``load`` gives.
        captions: B texts.
        tokens: tokens of the captions; None if the dataset has no ``tokenize``.
        time_ids: (B, 6) float32, SDXL's micro-conditioning: original height and width, top and left of the crop, target
            height and width.  bfloat16 would round the sizes.
        weights: (B,) float32 factors on the losses.
        pictures: (B,) int64 numbers in the index.
        planned: (B,) int64 numbers of the plan; they differ where a picture cannot be used and was replaced.
        bucket: index of the bucket in the plan.
        epoch, step: place in the plan.  To resume after this batch, start at step + 1.
    """

    data: torch.Tensor
    captions: list[str]
    tokens: TokenBatch | None
    time_ids: torch.Tensor
    weights: torch.Tensor
    pictures: torch.Tensor
    planned: torch.Tensor
    bucket: int
    epoch: int
    step: int


class NoReplacement(UserError):
    """Too many pictures of a bucket cannot be used to fill a batch."""


# ----------------------------------------------------------------------------------------------------------------------
# The items


def steps(plan: EpochPlan, epoch: int = 0, start: int = 0) -> Iterator[list[Item]]:
    """This rank's items of each step, from a step of an epoch on and through all later epochs, without end."""
    slots = range(plan.rank, plan.batch_size, plan.world_size)
    for current in count(epoch):
        first = start if current == epoch else 0
        for step, (bucket, pictures) in enumerate(plan.steps(current, first), first):
            yield [Item(current, step, bucket, *place) for place in zip(pictures.tolist(), slots, strict=True)]


class PictureDataset(Dataset):
    """The samples of the items of a plan.

    Args:
        plan: plan with buckets and seed.
        index: the pictures that the plan numbers.
        load: reads a picture: ``partial(load_picture, index=index)``, or ``load_latents`` with a cache.  It raises
            PictureError or OSError if the picture cannot be used.
        quarantine: list of unusable pictures; those that are listed are not tried.
        caption_settings: how captions become text; by default they stay as they are.
        weights: (N,) loss weights of the pictures; by default 1.
        tokenize: caption -> its tokens, (chunks, 77) for each text encoder (``token_chunks``).

    Raises:
        UserError: the plan is for another number of pictures; a picture has no caption, or more captions than there
            are caption weights; or ``weights`` is not one number of at least 0 per picture.
    """

    def __init__(
        self,
        plan: EpochPlan,
        index: PictureIndex,
        load: Load,
        quarantine: Quarantine,
        *,
        caption_settings: CaptionSettings | None = None,
        weights: np.ndarray | None = None,
        tokenize: Callable[[str], Sequence[torch.Tensor]] | None = None,
    ):
        self.plan, self.index, self.load, self.quarantine = plan, index, load, quarantine
        self.caption_settings, self.tokenize = caption_settings or CaptionSettings(), tokenize
        self.weights = np.ones(len(index)) if weights is None else np.asarray(weights, dtype=np.float64)
        self._check()
        listed = pc.is_in(index.table["key"], value_set=pa.array(list(quarantine.listed()), pa.string()))
        self._unusable = set(np.flatnonzero(listed.to_numpy()).tolist())

    def __getitem__(self, item: Item) -> Sample:
        """The sample of an item.

        Raises:
            NoReplacement: neither its picture nor any drawn in its place can be used.
        """
        numbers = partial(_numbers, self.plan, item)
        picture, data, conditioning = self._load_usable(item, numbers)
        caption = caption_text(self.index.captions(picture), self.caption_settings, numbers(CAPTION))
        return Sample(
            item=item,
            picture=picture,
            data=data,
            time_ids=sum(conditioning, ()),
            caption=caption,
            tokens=self.tokenize(caption) if self.tokenize else None,
            weight=self.weights[picture],
        )

    def _load_usable(self, item: Item, numbers: Numbers) -> tuple[int, torch.Tensor, MicroConditioning]:
        bucket = self.plan.buckets[item.bucket]
        for picture in self._candidates(item, numbers):
            if picture not in self._unusable:
                try:
                    return picture, *self.load(picture, bucket, numbers)
                except (PictureError, OSError) as error:
                    self._unusable.add(picture)
                    self.quarantine.add(self.index.key(picture), str(error))
        raise NoReplacement

    def _candidates(self, item: Item, numbers: Numbers) -> Iterator[int]:
        """The picture and its replacements, in an order that does not depend on which are known to be unusable."""
        yield item.picture
        members = self.plan.assignment == item.bucket
        members[item.picture] = False
        if self.plan.repeats is not None:
            members &= self.plan.repeats > 0
        others = np.flatnonzero(members)
        yield from numbers(REPLACEMENT).choice(others, min(TRIES, len(others)), replace=False).tolist()

    def _check(self) -> None:
        planned = self.plan.assignment >= 0
        if len(planned) != len(self.index):
            raise UserError(f"the plan is for {len(planned)} pictures, but the index has {len(self.index)}")
        if self.weights.shape != planned.shape or not (self.weights >= 0).all() or np.isinf(self.weights).any():
            raise UserError(f"weights must be a number of at least 0 for each of the {len(planned)} pictures")
        counts = np.where(planned, pc.list_value_length(self.index.table["captions"]).to_numpy(), 1)
        if counts.min() < 1:
            raise UserError(
                f"{(counts < 1).sum()} pictures have no caption, the first is {self.index.key(int(counts.argmin()))}: "
                "build the index again, with captions or with allow_missing_captions"
            )
        allowed = self.caption_settings.caption_weights
        if allowed is not None and counts.max() > len(allowed):
            raise UserError(
                f"{self.index.key(int(counts.argmax()))} has {counts.max()} captions, but caption_weights has "
                f"only {len(allowed)}: give one weight for each caption"
            )


def _numbers(plan: EpochPlan, item: Item, purpose: int) -> np.random.Generator:
    """Random numbers of a picture, different each time that an epoch has it."""
    generator = keyed_generator(plan.seed, item.epoch, item.picture, purpose)
    place = item.step * plan.batch_size + item.slot
    philox = cast(np.random.Philox, generator.bit_generator)
    philox.advance(place << 64)  # advances the second of the four words of the Philox counter
    return generator


def load_picture(
    picture: int,
    bucket: Size,
    numbers: Numbers,
    *,
    index: PictureIndex,
    flip: float = 0.0,
    background: Color = WHITE,
) -> tuple[torch.Tensor, MicroConditioning]:
    """A picture's file as the pixels of a bucket; ``partial`` with ``index`` and the options makes it a ``Load``.

    Args:
        picture: number of the picture in the index.
        bucket: (width, height) in pixels.
        numbers: random generators of the crop and the flip.
        index: index with the files.
        flip: probability of mirroring left and right.
        background: sRGB colour behind transparent pixels.

    Returns:
        (3, height, width) float32 in [-1, 1], and SDXL's micro-conditioning.

    Raises:
        PictureError: it cannot be used.
    """
    width, height = index.sizes[picture].tolist()
    image = open_picture(index.read(picture), background, at_least=cover_size((width, height), bucket))
    mirrored = numbers(FLIP).random() < flip
    pixels, conditioning = fit_picture(image, bucket, numbers(CROP), mirrored, original_size=(width, height))
    return torch.from_numpy(pixels).float().div_(127.5).sub_(1), conditioning


# ----------------------------------------------------------------------------------------------------------------------
# The batches


def loader(
    dataset: PictureDataset,
    *,
    epoch: int = 0,
    start: int = 0,
    workers: int = 0,
    prefetch: int = 2,
    max_unusable: float = 0.01,
) -> Iterator[Batch]:
    """This rank's batches, from a step of an epoch on and through all later epochs, without end.

    With CUDA they lie in pinned memory.  The workers live as long as the iterator, and read ahead into the next epoch.
    torch's global random generator is not used.

    Args:
        dataset: dataset with the plan.
        epoch, start: the first step; with the plan's seed they are the state of a run.
        workers: number of processes that read pictures; 0 reads them in this one.
        prefetch: number of batches that each worker holds ready.
        max_unusable: the largest share of unusable pictures among those seen (``UnusableShare``).

    Raises:
        UserError: the epoch does not have this step; or, later, too many pictures cannot be used.
    """
    plan = dataset.plan
    if epoch < 0 or not 0 <= start <= plan.step_count(epoch):
        raise UserError(f"there is no step {start} in epoch {epoch}, which has {plan.step_count(max(epoch, 0))} steps")
    batches = DataLoader(
        dataset,
        batch_sampler=steps(plan, epoch, start),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=leave_signals,
    )
    return _watched(batches, dataset.quarantine, UnusableShare(plan, dataset.quarantine, max_unusable))


def leave_signals(worker: int) -> None:
    """Ignore SIGINT and SIGTERM, which reach all processes: the trainer stops after its step, and ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _watched(batches: DataLoader, quarantine: Quarantine, share: UnusableShare) -> Iterator[Batch]:
    try:
        for batch in batches:
            share.check(batch.planned.numpy(), batch.pictures.numpy())
            yield batch
    except NoReplacement as error:  # from a worker, whose message is its traceback
        error.with_traceback(None)  # the traceback refers to this frame, and would keep the workers alive
        raise UserError(
            f"a batch cannot be filled: neither a picture nor any of up to {TRIES} replacements can be used; "
            f"{quarantine.report()}"
        ) from None


def collate(samples: Sequence[Sample]) -> Batch:
    """The batch of the samples of a step."""
    item = samples[0].item
    tokens = [sample.tokens for sample in samples if sample.tokens is not None]  # of all samples or of none
    return Batch(
        data=default_collate([sample.data for sample in samples]),  # in a worker, directly into shared memory
        captions=[sample.caption for sample in samples],
        tokens=batch_prompts(tokens) if tokens else None,
        time_ids=torch.tensor([sample.time_ids for sample in samples], dtype=torch.float32),
        weights=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
        pictures=torch.tensor([sample.picture for sample in samples]),
        planned=torch.tensor([sample.item.picture for sample in samples]),
        bucket=item.bucket,
        epoch=item.epoch,
        step=item.step,
    )
