"""What is measured of networks whose answers are known: a perfect one, a grey one, and one that says nothing."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ztsnr.demo import evaluation as module
from ztsnr.demo.composed import COLOURS, GROUNDS, SHADE, TINT, Asked, Composer
from ztsnr.demo.evaluation import (
    FOUR_TIMES,
    GUIDED_SOLIDS,
    LONG_PICTURES,
    NOISES,
    OBJECTS,
    SOLIDS,
    START,
    TWICE,
    Evaluation,
    canvas_sigma,
    mean_colour,
    start_name,
    starts_of,
)
from ztsnr.samplers import NoiseSchedule

ERRORS = 16  # pictures of which the errors are taken here
FEW = ("frog", "train", "fox", "bee", "tulip", "koala")


class FakeVae:
    """Latents are pixels times 2, which the scaling factor undoes."""

    config = SimpleNamespace(scaling_factor=0.5)

    def encode(self, pixels):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: 2 * pixels))


class FakeNetwork:
    """Latents are pictures in -1 ... 1; what it was asked is kept.

    Args:
        levels: of every picture, or None for composed pictures of what the captions ask for.
    """

    prediction_type = "v_prediction"

    def __init__(self, zero_snr=True, levels=None, side=32):
        self.schedule = NoiseSchedule.sdxl(zero_terminal_snr=zero_snr).shifted(side / 128)
        self.shape = (3, side, side)
        self.pipe = SimpleNamespace(vae=FakeVae())
        self.fixed = levels
        self.samples, self.predictions = [], []
        self.known = {}
        composer = Composer(FEW)
        for ground in GROUNDS:
            for emoji, long in [("", False), *((name, False) for name in FEW), *((n, True) for n in module.LONG)]:
                asked = Asked(ground, emoji, long)
                self.known[asked.caption] = asked
        self.composers = {32: composer, 64: Composer(FEW, 2)}

    def noise(self, seeds):
        return torch.stack([torch.randn(self.shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def sample(self, captions, noise, sigmas, solver, guidance, callback):
        self.samples.append(SimpleNamespace(captions=captions, noise=noise, sigmas=sigmas, guidance=guidance))
        random = np.random.default_rng(0)
        side = noise.shape[-1]
        if self.fixed is None:
            pictures = [self.composers[side].picture(self.known[caption], random) for caption in captions]
        else:
            pictures = np.full((len(captions), side, side, 3), self.fixed)
        latents = torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 127.5 - 1
        for number, sigma in enumerate(sigmas[:-1]):
            callback(number, sigma, noise, latents if number == 0 else torch.zeros_like(latents))
        return latents

    def levels(self, latents):
        return (127.5 * (latents.movedim(1, -1) + 1)).numpy()

    def predict(self, x, t, captions):
        self.predictions.append((x, t, captions))
        return torch.zeros_like(x)


def evaluate(network, path, long=False):
    return Evaluation(network, Composer(FEW), path).all(long)


@pytest.fixture(scope="module")
def perfect(tmp_path_factory):
    """A network that paints what it is asked for, and what was measured of it."""
    path = tmp_path_factory.mktemp("measured") / "measured.npz"
    network = FakeNetwork()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ERROR_PICTURES", ERRORS)
        return network, evaluate(network, path, long=True), path


# ----------------------------------------------------------------------------------------------------------------------
# Noise levels


def test_levels_have_the_names_they_have_for_sdxl():
    assert canvas_sigma(START, 128) == pytest.approx(14.614641)
    assert canvas_sigma(START, 32) == pytest.approx(14.614641 / 4)
    # what a canvas of twice the length needs is what this one has: sigma / length is the noise of its mean
    assert canvas_sigma(TWICE, 64) / 64 == pytest.approx(2 * canvas_sigma(START, 32) / 32, rel=0.01)
    assert canvas_sigma(FOUR_TIMES, 64) == pytest.approx(2 * canvas_sigma(TWICE, 64), rel=0.01)
    assert canvas_sigma(START, 64) == pytest.approx(2 * canvas_sigma(START, 32))
    assert canvas_sigma(math.inf, 32) == math.inf
    assert canvas_sigma(100.0, 32) == 25.0


def test_names_and_starts():
    assert [start_name(start) for start in (math.inf, START, TWICE, FOUR_TIMES)] == ["infinity", "14.6", "29", "58"]
    assert starts_of(FakeNetwork()) == (math.inf, START)
    assert starts_of(FakeNetwork(zero_snr=False)) == (START,)  # from infinity only if it was trained there


def test_the_start_is_never_beyond_the_schedule(tmp_path):
    """14.6 rounded up would be."""
    network = FakeNetwork(zero_snr=False, levels=0.0)
    Evaluation(network, Composer(FEW), tmp_path / "m.npz")._things(START, 1.0)
    for sample in network.samples:
        assert sample.sigmas[0] <= network.schedule.sigma_max
        assert sample.sigmas[0] == pytest.approx(14.6146 / 4, rel=1e-5)


@pytest.mark.parametrize("start", [START, TWICE, FOUR_TIMES, math.inf])
def test_a_canvas_twice_as_long_is_half_of_its_sigma_on_this_one(tmp_path, start):
    network = FakeNetwork()
    evaluation = Evaluation(network, Composer(FEW), tmp_path / "m.npz")
    evaluation._long(start, halved=True)
    evaluation._long(start, halved=False)
    halved, literal = network.samples
    assert halved.noise.shape[-1] == 32
    assert literal.noise.shape[-1] == 64
    # of the longer canvas's own 14.6, 29 and 58
    assert literal.sigmas[0] == pytest.approx(14.6146 * start / 14.6 * 64 / 128, rel=1e-4)
    own = start if math.isinf(start) else canvas_sigma(start, 32)
    assert halved.sigmas[0] == own / 2
    for sample in (halved, literal):
        assert len(sample.sigmas) == module.STEPS + 1
        assert sample.sigmas[-1] == 0
        assert sample.guidance == module.GUIDED


# ----------------------------------------------------------------------------------------------------------------------
# A network that is perfect, and one that paints grey


def test_all_that_is_measured(perfect):
    _, numbers, _ = perfect
    measured = {key.rsplit("/", 1)[0] for key in numbers if key.endswith("/done")}
    starts = ("infinity", "14.6")
    parts = {f"{kind}/{start}/{guidance}" for kind in ("solids", "things") for start in starts for guidance in (1, 4)}
    expected = {"error", *parts}
    expected |= {f"{kind}/{s}" for kind in ("halved", "literal") for s in ("14.6", "29", "58", "infinity")}
    assert measured == expected
    for ground in SOLIDS:
        assert numbers[f"solids/infinity/1/brightness/{ground}"].shape == (NOISES,)
    assert numbers["things/14.6/4/explained/white"].shape == (OBJECTS,)
    assert numbers["halved/29/explained"].shape == (LONG_PICTURES,)
    assert not any(key.startswith("solids/infinity/4/brightness/red") for key in numbers)


def test_what_a_perfect_network_gets(perfect):
    _, numbers, _ = perfect
    for start in ("infinity", "14.6"):
        for ground in SOLIDS:
            # its mean, of so many pictures of shades
            spread = 75 if ground in ("dark", "light") else math.hypot(SHADE, TINT)
            wanted = mean_colour(ground) @ [0.2126, 0.7152, 0.0722]
            found = numbers[f"solids/{start}/1/brightness/{ground}"].mean()
            assert found == pytest.approx(wanted, abs=4 * spread / NOISES**0.5), ground
            assert numbers[f"solids/{start}/1/contrast/{ground}"].max() < 0.1
        for ground in COLOURS:
            assert numbers[f"solids/{start}/1/colour/{ground}"].mean() < 15  # its shades
            assert np.array_equal(
                numbers[f"solids/{start}/1/first/{ground}"], numbers[f"solids/{start}/1/colour/{ground}"]
            )
        for ground in ("black", "white"):
            for guidance in (1, 4):
                things = f"things/{start}/{guidance}"
                assert numbers[f"{things}/unevenness/{ground}"].max() < 1e-3
                assert numbers[f"{things}/seen unevenness/{ground}"].max() < 1e-3
                assert numbers[f"{things}/tint/{ground}"].mean() < 3 * TINT
                np.testing.assert_allclose(numbers[f"{things}/explained/{ground}"], 1, atol=2e-3)
    for start in ("14.6", "29", "58", "infinity"):
        np.testing.assert_allclose(numbers[f"halved/{start}/explained"], 1, atol=2e-3)
        np.testing.assert_allclose(numbers[f"literal/{start}/explained"], 1, atol=2e-3)


def test_what_a_network_that_paints_grey_gets(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ERROR_PICTURES", 4)
    numbers = evaluate(FakeNetwork(levels=128.0), tmp_path / "m.npz", long=True)
    for ground in SOLIDS:
        np.testing.assert_allclose(numbers[f"solids/infinity/1/brightness/{ground}"], 128, atol=1e-3)
    assert numbers["solids/infinity/1/colour/grey"].max() < 1
    assert numbers["solids/infinity/1/colour/red"].min() > 20
    assert (numbers["things/infinity/1/explained/black"] < 0).all()
    assert (numbers["halved/infinity/explained"] < 0).all()


def test_ground_is_measured_beyond_white_and_black(tmp_path):
    """What would be uneven is not hidden by clipping; brightness is that of the picture that is seen."""
    network = FakeNetwork()

    def sample(captions, noise, sigmas, solver, guidance, callback):
        ramp = torch.linspace(-1.4, -1.1, 32).expand(len(captions), 3, 32, 32)  # all below black
        callback(0, sigmas[0], noise, ramp)
        return ramp

    network.sample = sample
    evaluation = Evaluation(network, Composer(FEW), tmp_path / "m.npz")
    things = evaluation._things(math.inf, 1.0)
    assert things["unevenness/black"].min() > 5
    assert things["seen unevenness/black"].max() == 0
    assert things["tint/black"].max() == 0
    solids = evaluation._solids(math.inf, 1.0, ("black",))
    assert solids["brightness/black"].max() == 0
    assert solids["contrast/black"].max() == 0


def test_the_first_prediction_is_the_first(tmp_path):
    network = FakeNetwork()

    def sample(captions, noise, sigmas, solver, guidance, callback):
        for number in range(3):  # black, then white
            callback(number, sigmas[number], noise, torch.full_like(noise, -1.0 if number == 0 else 1.0))
        return torch.full_like(noise, 1.0)

    network.sample = sample
    found = Evaluation(network, Composer(FEW), tmp_path / "m.npz")._solids(math.inf, 1.0, ("black", "white"))
    assert found["first/black"].max() < found["first/white"].min()
    assert found["colour/white"].max() < found["colour/black"].min()
    assert found["first/black"].max() < 10


# ----------------------------------------------------------------------------------------------------------------------
# What a network is asked with


def test_all_captions_and_networks_share_the_noise(tmp_path):
    one, other = FakeNetwork(levels=0.0), FakeNetwork(zero_snr=False, levels=0.0)
    for network in (one, other):
        evaluation = Evaluation(network, Composer(FEW), tmp_path / "m.npz")
        evaluation._solids(START, 1.0, ("black", "white", "dark"))
        evaluation._things(START, 1.0)
    for mine, theirs in zip(one.samples, other.samples, strict=True):
        assert torch.equal(mine.noise, theirs.noise)
        assert mine.captions == theirs.captions
    solids, on_black, on_white = one.samples
    assert solids.captions == [
        caption for caption in ("completely black", "completely white", "darkness") for _ in range(NOISES)
    ]
    blocks = solids.noise.split(NOISES)
    assert all(torch.equal(block, blocks[0]) for block in blocks)
    assert len(torch.unique(blocks[0][:, 0, 0, 0])) == NOISES  # and each of a caption's is another
    assert torch.equal(on_black.noise, on_white.noise)
    assert len(torch.unique(on_black.noise[:, 0, 0, 0])) == OBJECTS
    assert [caption.replace("black", "white") for caption in on_black.captions] == on_white.captions
    assert not torch.equal(on_black.noise[0], blocks[0][0])


def test_guided_solids_are_some(perfect):
    network, *_ = perfect
    solids = [sample for sample in network.samples if "completely black" in sample.captions]
    asked = {sample.guidance: set(sample.captions) for sample in solids}
    expected = {4.0: GUIDED_SOLIDS, 1.0: SOLIDS}
    assert asked == {guidance: {Asked(one).caption for one in grounds} for guidance, grounds in expected.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("zero_snr", [True, False])
def test_a_network_that_answers_nothing_misses_all(tmp_path, monkeypatch, zero_snr):
    monkeypatch.setattr(module, "ERROR_PICTURES", ERRORS)
    network = FakeNetwork(zero_snr)
    evaluation = Evaluation(network, Composer(FEW), tmp_path / "m.npz")
    numbers = evaluation._errors()
    for i, (name, held_out) in enumerate((("trained", False), ("held out", True))):
        assert numbers[f"missed/{name}"] == pytest.approx(1)
        # v at t = T is -x0 where nothing else is left, and the noise but for some of it before
        composer, random = Composer(FEW), np.random.default_rng((module.SEED, held_out))
        asked = [composer.draw(random, held_out) for _ in range(ERRORS)]
        x0 = np.stack([composer.picture(one, random) for one in asked]).transpose(0, 3, 1, 2) / 127.5 - 1
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(module.SEED)).numpy()
        sigma = math.inf if zero_snr else 14.614641 / 4
        alpha = 1 / math.hypot(1, sigma)
        target = alpha * noise - (1 - alpha**2) ** 0.5 * x0
        np.testing.assert_allclose(numbers[f"last/{name}"], np.square(target).mean((1, 2, 3)), rtol=1e-4)
        middle, last = network.predictions[2 * i : 2 * i + 2]
        assert (set(middle[1].tolist()), set(last[1].tolist())) == ({499.0}, {999.0})
        assert middle[2] == last[2] == [one.caption for one in asked]
        np.testing.assert_allclose(last[0], alpha * x0 + (1 - alpha**2) ** 0.5 * noise, atol=1e-5)
        assert all(composer.held_out(one) == held_out for one in asked)


def test_a_network_of_epsilon_is_asked_for_the_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ERROR_PICTURES", ERRORS)
    network = FakeNetwork(zero_snr=False)
    network.prediction_type = "epsilon"
    noise = torch.randn(ERRORS, 3, 32, 32, generator=torch.Generator().manual_seed(module.SEED))
    network.predict = lambda x, t, captions: noise
    numbers = Evaluation(network, Composer(FEW), tmp_path / "m.npz")._errors()
    assert numbers["missed/trained"] == 0
    assert numbers["last/held out"].max() == 0
    network.predict = lambda x, t, captions: 0.5 * noise
    assert Evaluation(network, Composer(FEW), tmp_path / "m.npz")._errors()["missed/trained"] == pytest.approx(0.25)


# ----------------------------------------------------------------------------------------------------------------------
# What is measured is kept


def test_nothing_is_measured_twice(perfect):
    _, numbers, path = perfect
    ticks = []
    again = Evaluation(None, Composer(FEW), path)
    again.network = SimpleNamespace(schedule=NoiseSchedule.sdxl())  # which cannot be asked anything
    found = again.all(True, lambda: ticks.append(1))
    assert found.keys() == numbers.keys()
    assert all(np.array_equal(found[key], numbers[key]) for key in numbers)
    assert len(ticks) == sum(key.endswith("/done") for key in numbers)


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ERROR_PICTURES", 4)
    network, path = FakeNetwork(zero_snr=False, levels=10.0), tmp_path / "m.npz"

    def stop():
        if len(network.samples) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Evaluation(network, Composer(FEW), path).all(False, stop)
    done = {key for key in np.load(path) if key.endswith("/done")}
    assert done == {"error/done", "solids/14.6/1/done", "solids/14.6/4/done"}
    rest = FakeNetwork(zero_snr=False, levels=10.0)
    numbers = evaluate(rest, path)
    assert [sample.guidance for sample in rest.samples] == [1, 1, 4, 4]  # the things on black, and on white
    assert rest.predictions == []
    whole = evaluate(FakeNetwork(zero_snr=False, levels=10.0), tmp_path / "other.npz")
    assert all(np.array_equal(numbers[key], whole[key]) for key in whole)


def test_the_mean_colour_is_that_of_the_pictures():
    spread = math.hypot(SHADE, TINT) / 4000**0.5
    assert mean_colour("grey") == pytest.approx([128] * 3, abs=5 * spread)
    assert mean_colour("black") == pytest.approx([math.hypot(SHADE, TINT) / math.sqrt(2 * math.pi)] * 3, rel=0.06)
    assert mean_colour("dark") == pytest.approx([55] * 3, rel=0.05)
