"""Guided sampling at the scale of a real canvas, on models known in closed form.

Each problem is a distribution of pictures that fall into classes.  A batch asks for one class a sample, the
unconditional prediction is that of all classes, and guidance joins the two.  Pictures are written in an orthonormal
basis of D directions of the canvas, in which the noise is unit Gaussian and brightness is one direction: its spread,
about the length of the canvas, is what makes guidance hard, and pictures of a few pixels do not have it.

Besides torch and this package only ``textures`` need anything (scikit-image, SciPy, Pillow), so that ComfyUI's own
Python can run the problems too: ``to_arrays`` and ``from_arrays`` carry them there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from ztsnr.diagnostics import reference_flow
from ztsnr.samplers import from_denoised, guide, to_denoised
from ztsnr.samplers.prediction import alpha_s
from ztsnr.samplers.sampling import Denoise

SAMPLES = 48
REFERENCE_STEPS = 640  # half as many move no picture by more than 1e-5
SIDE = 16  # of the textures, in pixels
TEXTURES = ("camera", "moon", "coins", "brick", "grass", "gravel", "page", "clock_motion")

Arrays = dict[str, np.ndarray]


# ----------------------------------------------------------------------------------------------------------------------
# Models: (x (B, D) float64, sigma) -> E[x0 | x, class of the sample], E[x0 | x].


@dataclass(eq=False)
class ClassSet:
    """A finite set of pictures with white grain.

    Attributes:
        pictures: (K, D).
        classes: (K,) class of each picture.
        asked: (B,) class that each sample of the batch is prompted with.
        grain: its standard deviation.
    """

    pictures: torch.Tensor
    classes: torch.Tensor
    asked: torch.Tensor
    grain: float

    def __post_init__(self):
        self.half_norms = self.pictures.square().sum(1) / 2
        self.others = self.classes != self.asked[:, None]

    def __call__(self, x: torch.Tensor, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, s = alpha_s(sigma)
        variance = alpha**2 * self.grain**2 + s**2
        logits = (alpha * (x @ self.pictures.T) - alpha**2 * self.half_norms) / variance  # |x|^2 is the same for all
        shares = torch.cat([logits.masked_fill(self.others, -math.inf), logits]).softmax(1)
        pictures = shares @ self.pictures
        gain = alpha * self.grain**2 / variance
        return (pictures + gain * (x.repeat(2, 1) - alpha * pictures)).chunk(2)


@dataclass(eq=False)
class ClassMixture:
    """Gaussians of full covariance, each of one class.

    Attributes:
        means: (K, D).
        vectors: (K, D, D) eigenvectors of the covariances, one a row.
        variances: (K, D) their eigenvalues.
        log_weights: (K,), up to a constant.
        classes: (K,) class of each Gaussian.
        asked: (B,) class that each sample of the batch is prompted with.
    """

    means: torch.Tensor
    vectors: torch.Tensor
    variances: torch.Tensor
    log_weights: torch.Tensor
    classes: torch.Tensor
    asked: torch.Tensor

    def __post_init__(self):
        count, _, dim = self.vectors.shape
        self.into = self.vectors.reshape(count * dim, dim).T.contiguous()  # from the canvas into all eigenbases at once
        self.centres = torch.einsum("kde,ke->kd", self.vectors, self.means)
        self.others = self.classes != self.asked[:, None]

    def __call__(self, x: torch.Tensor, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, s = alpha_s(sigma)
        rest = (x @ self.into).view(len(x), *self.centres.shape) - alpha * self.centres  # (B, K, D)
        spread = alpha**2 * self.variances + s**2
        logits = self.log_weights - (rest.square() / spread + spread.log()).sum(-1) / 2
        shares = torch.cat([logits.masked_fill(self.others, -math.inf), logits]).softmax(1)
        own = self.centres + alpha * self.variances / spread * rest  # E[x0 | x, Gaussian]
        return ((shares[..., None] * own.repeat(2, 1, 1)).flatten(1) @ self.into.T).chunk(2)


MODELS = {model.__name__: model for model in (ClassSet, ClassMixture)}


# ----------------------------------------------------------------------------------------------------------------------
# Guidance, the exact flow, and the distance from it.


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, and the share ``rescale`` of Lin et al.'s rescaling (arXiv 2305.08891, Algorithm 2)."""

    scale: float
    rescale: float = 0.0

    def __str__(self) -> str:
        return f"CFG {self.scale:g}" + (f", rescale {self.rescale:g}" if self.rescale else "")


@dataclass(eq=False)
class GuidedProblem:
    """What a sampler is given, and how far its pictures are from the exact ones.

    Attributes:
        name: as it stands in the tables.
        model: (x (B, D), sigma) -> (conditional x0, unconditional x0).
        latent_size: (height, width) of the canvas that the problem stands for.
        brightness: (D,) unit vector of the canvas's brightness.
        noise: (B, D) float64.
        references: the exact pictures (B, D) of every guidance that has been asked for.
    """

    name: str
    model: Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
    latent_size: tuple[int, int]
    brightness: torch.Tensor
    noise: torch.Tensor
    references: dict[Guidance, torch.Tensor] = field(default_factory=dict)

    @property
    def length(self) -> float:
        """Of the canvas: the brightness coordinate of a picture whose every value is 1."""
        return math.sqrt(math.prod(self.latent_size))

    def denoise(self, guidance: Guidance) -> Denoise:
        """The guided model: x (B, ...) variance-preserving of D values a sample, sigma -> x0 in the dtype of x."""

        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            state = x.flatten(1).double()
            cond, uncond = self.model(state, sigma)
            x0 = guide(cond, uncond, guidance.scale)
            if guidance.rescale:
                x0 = self._rescaled(x0, cond, state, sigma, guidance.rescale)
            return x0.to(x.dtype).view(x.shape)

        return denoise

    def _rescaled(
        self, guided: torch.Tensor, cond: torch.Tensor, x: torch.Tensor, sigma: float, phi: float
    ) -> torch.Tensor:
        """``rescale_guidance`` of v: a standard deviation over the canvas is the norm of all but its brightness."""
        v, v_cond = (from_denoised(x0, x, sigma, "v_prediction") for x0 in (guided, cond))
        deviation, wanted = (
            (one - (one @ self.brightness)[:, None] * self.brightness).norm(dim=1, keepdim=True) for one in (v, v_cond)
        )
        return to_denoised(v * (1 + phi * (wanted / deviation - 1)), x, sigma)

    def exact(self, guidance: Guidance, steps: int = REFERENCE_STEPS) -> torch.Tensor:
        """(B, D): the guided flow from the noise by Runge-Kutta of order 4 in the angle, to sigma = 0.001."""
        return reference_flow(self.denoise(guidance), self.noise, steps, sigma_max=60 * self.length, sigma_min=1e-3)

    def reference(self, guidance: Guidance) -> torch.Tensor:
        """``exact``, calculated once."""
        if guidance not in self.references:
            self.references[guidance] = self.exact(guidance)
        return self.references[guidance]

    def errors(self, pictures: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        """(B,) distance of each picture from the exact one, in units of the exact pictures' root mean square norm."""
        return (pictures - exact).norm(dim=1) / exact.norm(dim=1).square().mean().sqrt()

    def score(self, pictures: torch.Tensor, guidance: Guidance) -> dict[str, float]:
        """How far pictures (B, ...) are from the exact ones.

        Returns:
            ``error``, the mean of min(error, 1), because a plain mean is decided by a single exploded sample; ``off``,
            the share of samples off by more than 10 %; ``brightness``, the rms error of the canvas's brightness in
            levels of 255, where black is -1 and white 1; ``median``, the error of a typical sample.
        """
        exact = self.reference(guidance)
        pictures = torch.nan_to_num(pictures.double().flatten(1), nan=1e3, posinf=1e3, neginf=-1e3)
        errors = self.errors(pictures, exact)
        brightness = (pictures - exact) @ self.brightness / self.length * 127.5
        return {
            "error": errors.clamp(max=1).mean().item(),
            "off": (errors > 0.1).double().mean().item(),
            "brightness": brightness.square().mean().sqrt().item(),
            "median": errors.median().item(),
        }

    def to_arrays(self) -> Arrays:
        """Everything as arrays, references included."""
        model = {f"model {f.name}": np.asarray(getattr(self.model, f.name)) for f in fields(self.model)}
        references = {f"reference {g.scale} {g.rescale}": exact.numpy() for g, exact in self.references.items()}
        own = {"latent_size": np.array(self.latent_size), "kind": np.array(type(self.model).__name__)}
        return own | {"brightness": self.brightness.numpy(), "noise": self.noise.numpy()} | model | references

    @classmethod
    def from_arrays(cls, name: str, arrays: Mapping[str, np.ndarray]) -> "GuidedProblem":
        """The inverse of ``to_arrays``."""
        groups = {"model": {}, "reference": {}}
        for key, value in arrays.items():
            group, _, rest = key.partition(" ")
            if rest:
                groups[group][rest] = torch.from_numpy(value)
        model = MODELS[str(arrays["kind"])](**groups["model"])
        references = {Guidance(*map(float, key.split())): exact for key, exact in groups["reference"].items()}
        brightness, noise = (torch.from_numpy(arrays[key]) for key in ("brightness", "noise"))
        return cls(name, model, tuple(arrays["latent_size"].tolist()), brightness, noise, references)


# ----------------------------------------------------------------------------------------------------------------------
# The problems.


def problems(samples: int = SAMPLES) -> list[GuidedProblem]:
    """All of them: sets and mixtures, of photographs and drawn at random, from a canvas of 64 x 96 to 128 x 128."""
    drawn = [random_mixture(201, samples), random_mixture(202, samples), random_set(301, samples)]
    return [texture_set(samples), texture_mixture(samples), *drawn, exposure_pyramid(samples)]


def texture_set(samples: int = SAMPLES) -> GuidedProblem:
    """960 crops of grey photographs, a class a photograph."""
    crops, classes = _crops(120, seed=71)
    basis, brightness = _main_directions(crops, 60)
    model = ClassSet(crops @ basis.T, classes, _drawn_classes(classes, samples, seed=72), grain=0.3)
    return _problem("textures", model, (128, 128), brightness, samples, seed=73)


def texture_mixture(samples: int = SAMPLES) -> GuidedProblem:
    """Other crops of the same photographs, each photograph three Gaussians."""
    from scipy.cluster.vq import kmeans2

    crops, classes = _crops(200, seed=75)
    basis, brightness = _main_directions(crops, 39)
    crops = crops @ basis.T
    whole, parts = torch.cov(crops.T), []
    for one in classes.unique():
        members = crops[classes == one]
        cluster = torch.as_tensor(kmeans2(members.numpy(), 3, seed=0, minit="++")[1])
        for part in (members[cluster == j] for j in range(3)):
            if len(part) >= 12:
                shrink = 10 / (10 + len(part))  # few crops say little about a covariance
                variances, vectors = torch.linalg.eigh((1 - shrink) * torch.cov(part.T) + shrink * 0.3 * whole)
                weight = torch.tensor(len(part) / len(crops)).double().log()
                parts.append((part.mean(0), vectors.T, variances.clamp(min=0.01), weight, one))
    asked = _drawn_classes(classes, samples, seed=76)
    model = ClassMixture(*map(torch.stack, zip(*parts, strict=True)), asked)
    return _problem("mixture of textures", model, (128, 128), brightness, samples, seed=77)


def random_mixture(seed: int, samples: int = SAMPLES) -> GuidedProblem:
    """Twelve Gaussians of four classes, whose spectrum falls as a power law."""
    generator, randn = _randn(seed)
    dim, count, class_count = 40, 12, 4
    spectrum = 0.4 * 128 / torch.arange(1, dim + 1).double() ** 1.1
    means = randn(count, dim) * spectrum
    vectors = torch.linalg.qr(torch.eye(dim).double() + 0.35 * randn(count, dim, dim))[0].mT.contiguous()
    variances = (0.6 * spectrum * (0.4 * randn(count, dim)).exp()).square().clamp(min=0.01)
    log_weights = (0.5 * randn(count)).log_softmax(0)
    asked = torch.randint(class_count, (samples,), generator=generator)
    model = ClassMixture(means, vectors, variances, log_weights, torch.arange(count) % class_count, asked)
    return _problem(f"random mixture {seed}", model, (128, 128), _first(dim), samples, seed + 1)


def random_set(seed: int, samples: int = SAMPLES) -> GuidedProblem:
    """300 pictures of six classes, of differing contrast."""
    generator, randn = _randn(seed)
    dim, count, class_count = 64, 300, 6
    spectrum = 0.5 * 128 / torch.arange(1, dim + 1).double() ** 0.9
    class_means, classes = randn(class_count, dim) * spectrum, torch.arange(count) % class_count
    pictures = 0.7 * class_means[classes] + 0.7 * spectrum * randn(count, dim) * (0.5 * randn(count, 1)).exp()
    model = ClassSet(pictures, classes, torch.randint(class_count, (samples,), generator=generator), grain=0.2)
    return _problem(f"random set {seed}", model, (128, 128), _first(dim), samples, seed + 1)


def exposure_pyramid(samples: int = SAMPLES) -> GuidedProblem:
    """A Haar pyramid of 8 x 8 blocks on a smaller canvas, whose prompts say how bright a picture is and how busy.

    Night, dusk, day and snow differ in brightness, in contrast and in how fast the spectrum falls; each is three
    Gaussians with a structure of their own, of weight 1, 1/2 and 1/4.
    """
    _, randn = _randn(401)
    latent_size = (64, 96)
    length = math.sqrt(math.prod(latent_size))
    octave = torch.tensor([0] + 3 * [1] + 12 * [2] + 48 * [3]).double()  # of the mean and the three bands of details
    means, variances, classes = [], [], []
    prompts = ((-0.8, 0.08, 1.5), (-0.3, 0.2, 1.0), (0.2, 0.35, 0.6), (0.8, 0.1, 1.2))
    for number, (exposure, contrast, slope) in enumerate(prompts):
        spectrum = contrast * length * 2 ** (-octave * (1 + slope))  # of a coefficient; a band has 4 times the last's
        spectrum[0] = 0.12 * length
        for _ in range(3):
            mean = randn(len(octave)) * spectrum
            mean[0] += exposure * length
            means.append(mean)
            variances.append((0.5 * spectrum * (0.3 * randn(len(octave))).exp()).square().clamp(min=0.0025))
            classes.append(number)
    model = ClassMixture(
        torch.stack(means),
        torch.eye(len(octave)).double().expand(len(means), -1, -1).contiguous(),
        torch.stack(variances),
        torch.tensor([1, 0.5, 0.25]).double().log().repeat(len(prompts)),
        torch.tensor(classes),
        torch.arange(samples) % len(prompts),
    )
    return _problem("exposure pyramid", model, latent_size, _first(len(octave)), samples, seed=402)


def _problem(name: str, model, latent_size: tuple[int, int], brightness: torch.Tensor, samples: int, seed: int):
    _, randn = _randn(seed)
    return GuidedProblem(name, model, latent_size, brightness, randn(samples, len(brightness)))


def _randn(seed: int) -> tuple[torch.Generator, Callable[..., torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return generator, lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def _first(dim: int) -> torch.Tensor:
    return torch.eye(dim, dtype=torch.float64)[0]


def _drawn_classes(classes: torch.Tensor, samples: int, seed: int) -> torch.Tensor:
    return torch.as_tensor(np.random.default_rng(seed).choice(classes.unique().numpy(), samples))


def _crops(each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random squares of scikit-image's grey pictures, scaled to a canvas of 128: (K, 3 * SIDE^2) float64, classes."""
    import skimage
    from PIL import Image

    folder, random = Path(skimage.__file__).parent / "data", np.random.default_rng(seed)
    crops, classes = [], []
    found = [path for name in TEXTURES if (path := folder / f"{name}.png").exists()]  # those that come in its wheel
    for number, path in enumerate(found):
        picture = Image.open(path).convert("RGB")
        width, height = picture.size
        for _ in range(each):
            side = int(np.exp(random.uniform(np.log(SIDE * 1.5), np.log(min(width, height)))))
            left, top = random.integers(0, width - side + 1), random.integers(0, height - side + 1)
            crop = picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.BOX)
            values = np.asarray(crop, np.float32) / 127.5 - 1
            crops.append((values[:, ::-1] if random.random() < 0.5 else values).transpose(2, 0, 1).ravel())
            classes.append(number)
    return torch.from_numpy(np.stack(crops)).double() * (128 / SIDE), torch.tensor(classes)


def _main_directions(crops: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rows (count + 1, N): brightness and the crops' principal components; and brightness in them."""
    components = torch.linalg.svd(crops - crops.mean(0), full_matrices=False)[2][:count]
    ones = torch.ones(1, crops.shape[1], dtype=crops.dtype)
    basis = torch.linalg.qr(torch.cat([ones, components]).T)[0].T
    return basis, basis @ ones[0] / ones.norm()
