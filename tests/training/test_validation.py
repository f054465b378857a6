"""The loss on held-out pictures: the same questions every time, and errors that are known."""

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ztsnr.data.captions import CaptionSettings
from ztsnr.data.keyed_random import NOISE, keyed_generator, keyed_noise
from ztsnr.training.config import DataSettings, SourceSettings
from ztsnr.training.networks import Denoiser, Tokenize, load_networks
from ztsnr.training.objective import Objective, ObjectiveSettings
from ztsnr.training.run_data import open_data
from ztsnr.training.validation import Validation
from ztsnr.world import World

from ..tiny_pipelines import make_tiny_sdxl

ALONE = World(0, 1, 1, torch.device("cpu"))
SIZES = [(60, 32), (32, 48), (40, 40)]


@dataclass(frozen=True)
class OneOfMany(World):
    """A stand-in for one of several processes: what it would sum with the others is kept, to be summed by hand."""

    summed: list = field(default_factory=list)

    def sum(self, tensor):
        self.summed.append(tensor.clone())
        return tensor


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """35 pictures, of which 7 are held out by their names; the files of the first and the last of these are cut off."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    random = np.random.default_rng(0)
    for i in range(35):
        width, height = SIZES[i % 3]
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        picture.save(folder / "pictures" / f"{i:02}.png")
        (folder / "pictures" / f"{i:02}.txt").write_text(f"number {i}, common, square")
    settings = DataSettings(
        (SourceSettings(folder / "pictures"),),
        batch_size=2,
        buckets=("32x32,48x32,32x48",),
        step=16,
        validation_share=0.2,
        flip=0.5,
    )
    opened = open_data(settings, 0, ALONE, folder / "index.arrow")
    for held in (opened.held_out[0], opened.held_out[-1]):
        path = folder / opened.index.table["path"][int(held)].as_py()
        path.write_bytes(path.read_bytes()[:200])
    return opened


def to_latents(pixels, number):
    """A stand-in for the VAE: half the red of each second pixel, four times."""
    return 0.5 * pixels[:, :1, ::2, ::2].expand(-1, 4, -1, -1)


def make(data, world=ALONE, pictures=100, settings=None, tokenize=None):
    objective = Objective(settings or ObjectiveSettings())
    captions = CaptionSettings(shuffle=True, caption_dropout=0.5, tag_dropout=0.5)
    tokenize = tokenize or (lambda caption: [torch.zeros(1, 77, dtype=torch.long)])
    return Validation(data, pictures, captions, tokenize, objective, to_latents, world), objective


def zero(noisy, t, tokens, time_ids):
    return torch.zeros_like(noisy)


def test_pictures_that_cannot_be_read_are_passed_over(data):
    validation, _ = make(data)
    assert validation.count == len(data.held_out) - 2 > 2
    assert make(data, pictures=2)[0].count == 2
    nothing = replace(data, held_out=data.held_out[:1], held_out_buckets=data.held_out_buckets[:1])
    assert make(nothing)[0].count == 0


def test_timesteps_are_the_middles_of_eight_parts_and_the_last(data):
    validation, _ = make(data, settings=ObjectiveSettings(terminal_probability=0.0))
    assert validation.timesteps.tolist() == [62, 187, 312, 437, 562, 687, 812, 937, 999]
    metrics = validation.measure(zero)
    assert list(metrics) == ["validation", *(f"validation/t{t:03d}" for t in validation.timesteps.tolist())]
    assert metrics["validation"] == pytest.approx(np.mean(list(metrics.values())[1:]), rel=1e-12)


def test_an_answer_of_nothing_misses_by_the_mean_square_of_v(data):
    """Against the definition of v, from the files and the noise alone."""
    validation, objective = make(data)
    metrics = validation.measure(zero)
    abar = objective.schedule.alphas_cumprod
    for t in validation.timesteps.tolist():
        squares = []
        for picture, bucket in zip(data.held_out.tolist()[1:-1], data.held_out_buckets.tolist()[1:-1], strict=True):
            numbers = partial(keyed_generator, data.plan.seed, 0, picture)  # of its crop
            latents = to_latents(data.load(picture, data.plan.buckets[bucket], numbers)[0][None], 0).double()
            noise = keyed_noise(latents.shape[1:], range(1), data.plan.seed, 0, picture, NOISE).double()
            v = abar[t].sqrt() * noise - (1 - abar[t]).sqrt() * latents
            squares.append(v.square().mean().item())
        assert metrics[f"validation/t{t:03d}"] == pytest.approx(np.mean(squares), rel=1e-5)


def test_the_right_answer_misses_by_nothing(data):
    validation, objective = make(data)
    pairs = iter(validation._questions)

    def right(noisy, t, tokens, time_ids):
        question = next(pairs)
        return objective.target(
            question.latents.expand(len(t), -1, -1, -1), question.noise.expand(len(t), -1, -1, -1), t
        )

    metrics = validation.measure(right)
    assert all(value == 0 for value in metrics.values())


def test_questions_are_the_same_every_time(data):
    """Whatever is shuffled, dropped or mirrored in training; and each picture has noise of its own."""
    validation, _ = make(data)
    again, _ = make(data)
    asked = []

    def record(noisy, t, tokens, time_ids):
        asked.append((noisy.clone(), time_ids.clone()))
        return noisy

    first = validation.measure(record)
    assert first == again.measure(record) == validation.measure(record)
    count = validation.count
    for i in range(count):
        for noisy, time_ids in (asked[count + i], asked[2 * count + i]):
            assert torch.equal(noisy, asked[i][0])
            assert torch.equal(time_ids, asked[i][1])
    at_the_end = [noisy[-1].flatten()[:64] for noisy, _ in asked[:count]]  # pure noise
    assert len({tuple(noise.tolist()) for noise in at_the_end}) == count


def test_captions_are_whole(data):
    said = []

    def tokenize(caption):
        said.append(caption)
        return [torch.zeros(1, 77, dtype=torch.long)]

    make(data, tokenize=tokenize)
    keys = [data.index.key(int(picture)) for picture in data.held_out[1:-1]]
    assert said == [f"number {int(key[-6:-4])}, common, square" for key in keys]


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_any_number_of_processes_measures_the_same(data, size):
    """And each asks as often, because shares of weights are fetched together."""
    alone, _ = make(data)
    expected = alone.measure(lambda noisy, t, tokens, time_ids: 0.3 * noisy)
    sums, calls = [], []
    for rank in range(size):
        world = OneOfMany(rank, size, size, torch.device("cpu"))
        validation, _ = make(data, world)
        assert validation.count == alone.count
        asked = []
        validation.measure(lambda noisy, t, tokens, time_ids, asked=asked: asked.append(1) or 0.3 * noisy)
        calls.append(len(asked))
        sums += world.summed
    assert set(calls) == {-(-alone.count // size)}
    means = torch.stack(sums).sum(0) / alone.count
    np.testing.assert_allclose(means, list(expected.values())[1:], rtol=1e-12)


def test_with_a_network(data, tmp_path):
    """The real one is asked with prompts and sizes of its own, in a batch of as many as there are timesteps."""
    make_tiny_sdxl(tmp_path / "tiny")
    networks = load_networks(tmp_path / "tiny")
    denoiser = Denoiser(networks).requires_grad_(False)
    validation, objective = make(data, pictures=2, tokenize=Tokenize(networks))
    metrics = validation.measure(denoiser)
    question = validation._questions[0]
    errors = []
    for number in range(2):
        question = validation._questions[number]
        t = torch.tensor([999])
        output = denoiser(
            question.noise, t, question.tokens._replace(rows=question.tokens.rows[:1]), question.time_ids[:1]
        )
        errors.append((output + question.latents).square().mean().item())
    assert metrics["validation/t999"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert metrics["validation"] > 0
    assert objective.schedule.zero_terminal_snr
