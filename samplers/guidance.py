"""Classifier-free guidance, and what keeps it true to the prompt's brightness and contrast.

All of it works on predictions of v, x0 or eps (B, C, H, W), which differ by factors of sigma alone, and is regular at
sigma = infinity, where v = -x0.  docs/mathematics.md derives why guidance moves exposure.
"""

import math

import torch

from ..errors import UserError

EXPOSURE = 0.9  # share of guidance's effect on brightness and tint that is removed,
CONTRAST = 0.8  # and of its effect on the contrast of the whole picture


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): uncond + scale (cond - uncond), (B, C, H, W)."""
    check_scale(scale)
    return torch.lerp(uncond, cond, scale)


def exposure_true_guidance(
    cond: torch.Tensor,
    uncond: torch.Tensor,
    scale: float,
    picture: torch.Tensor | None = None,
    exposure: float = EXPOSURE,
    contrast: float = CONTRAST,
) -> torch.Tensor:
    """Classifier-free guidance that leaves brightness, tint and contrast to the prompt.

    guided = cond + (scale - 1) T(cond - uncond), with T of ``exposure_true``.  exposure = contrast = 0 is ``guide``.

    Args:
        cond, uncond: (B, C, H, W) predictions of v, x0 or eps with and without the prompt.
        scale: guidance scale, at least 0; 1 is the prompt alone.
        picture: (B, C, H, W) the conditional x0; None if ``cond`` is x0, or v in the step from infinity (v = -x0).
        exposure, contrast: see ``exposure_true``.

    Returns:
        (B, C, H, W) in the dtype of ``cond``; what ``cond`` and ``uncond`` predict.

    Raises:
        UserError: a negative or infinite scale, exposure or contrast outside [0, 1], shapes that differ.
    """
    check_scale(scale)
    if cond.shape != uncond.shape:
        raise UserError(f"cond has shape {tuple(cond.shape)} and uncond {tuple(uncond.shape)}: they must be the same")
    difference = exposure_true(cond.float() - uncond.float(), cond if picture is None else picture, exposure, contrast)
    return (cond.float() + (scale - 1) * difference).to(cond.dtype)


def exposure_true(
    difference: torch.Tensor, picture: torch.Tensor, exposure: float = EXPOSURE, contrast: float = CONTRAST
) -> torch.Tensor:
    """T(d): a direction of guidance without its effect on brightness, tint and contrast.

    d splits, per sample, into its canvas mean m of each channel (brightness and tint), a part k p along the centred
    picture (which only scales that picture's contrast), and the rest, which is what the prompt is about:

        m = mean_hw(d)      p = picture - mean_hw(picture)      k = <d - m, p> / <p, p>
        T(d) = d - exposure m - contrast k p

    T is linear in d, so it also applies to what any other guidance adds to the conditional prediction.

    Args:
        difference: (B, C, H, W) d, of v, x0 or eps.
        picture: (B, C, H, W) the conditional x0 whatever d is of; its scale and sign do not matter.
        exposure: share of m to remove, 0 to 1.
        contrast: share of k p to remove, 0 to 1.

    Returns:
        (B, C, H, W) float32.

    Raises:
        UserError: a share outside [0, 1], shapes that differ or are not those of pictures.
    """
    for name, share in (("exposure", exposure), ("contrast", contrast)):
        if not 0 <= share <= 1:
            raise UserError(f"{name} must lie in [0, 1], not {share}")
    if difference.ndim != 4:
        raise UserError(f"guidance of exposure is for pictures (B, C, H, W), not for shape {tuple(difference.shape)}")
    if difference.shape != picture.shape:
        raise UserError(
            f"the picture has shape {tuple(picture.shape)} and the difference {tuple(difference.shape)}: "
            "they must be the same"
        )
    d, p = difference.float(), _centred(picture.float())
    m = _canvas_mean(d)
    # <d - m, p> rather than <d, p>: of a flat picture, p is rounding errors, whose mean is not 0.
    k = _dot(d - m, p) / _dot(p, p).clamp(min=torch.finfo(torch.float32).tiny)
    return d - exposure * m - contrast * k * p


def exposure_true_prediction(
    cond: torch.Tensor, other: torch.Tensor, picture: torch.Tensor, exposure: float, contrast: float
) -> torch.Tensor:
    """cond - T(cond - other): another prediction, unconditional or guided, with the prompt's brightness and contrast.

    Args:
        cond, other: (B, C, H, W) predictions of v, x0 or eps.
        picture, exposure, contrast: see ``exposure_true``.

    Returns:
        (B, C, H, W) float32.
    """
    cond = cond.float()
    return cond - exposure_true(cond - other.float(), picture, exposure, contrast)


def rescale_guidance(guided: torch.Tensor, cond: torch.Tensor, phi: float = 0.7) -> torch.Tensor:
    """Bring the standard deviation of a guided prediction back toward that of the conditional one.

    Lin et al. (arXiv 2305.08891), Algorithm 2: scale each sample to the standard deviation of ``cond``, then mix the
    result with the unscaled one by phi.  The standard deviation is over channels, height and width of a sample.  The
    canvas mean is scaled along with everything else, so a picture asked to be black or white turns grey where the
    channels have equal means; ``rescale_contrast`` does not have that fault.

    Args:
        guided: (B, C, H, W) prediction after guidance, of v.
        cond: (B, C, H, W) conditional prediction, of v.
        phi: 0 leaves the guidance as it is, 1 rescales it whole; the paper uses 0.7.

    Returns:
        (B, C, H, W); a sample whose guided prediction has no contrast at all is returned as it is.

    Raises:
        UserError: phi outside [0, 1].
    """
    _check_phi(phi)
    ratio = _deviation_ratio(guided, cond)
    return guided * torch.lerp(torch.ones_like(ratio), ratio, phi)


def rescale_contrast(guided: torch.Tensor, cond: torch.Tensor, phi: float = 0.7) -> torch.Tensor:
    """Algorithm 2 of Lin et al. about the canvas mean; the mean itself becomes the conditional one.

    Each channel's canvas mean is taken out first: the rest is scaled to the standard deviation that the rest of
    ``cond`` has, the mean of ``cond`` is put back, and the result is mixed with the guided prediction by phi.

    Args, returns and raises: as ``rescale_guidance``.
    """
    _check_phi(phi)
    rest, rest_cond = _centred(guided), _centred(cond)
    rescaled = _canvas_mean(cond) + rest * _deviation_ratio(rest, rest_cond)
    return torch.lerp(guided, rescaled, phi)


def check_scale(scale: float) -> None:
    """Raise unless a guidance scale is a finite number of at least 0."""
    if not (math.isfinite(scale) and scale >= 0):
        raise UserError(f"the guidance scale must be a finite number of at least 0, not {scale}")


def _check_phi(phi: float) -> None:
    if not 0 <= phi <= 1:
        raise UserError(f"guidance rescale phi must lie in [0, 1], not {phi}")


def _canvas_mean(x: torch.Tensor) -> torch.Tensor:
    """(B, C, 1, 1)"""
    return x.mean((-2, -1), keepdim=True)


def _centred(x: torch.Tensor) -> torch.Tensor:
    return x - _canvas_mean(x)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B, 1, ...) of each sample."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdim=True)


def _deviation_ratio(guided: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """Standard deviation of ``cond`` over that of ``guided``, (B, 1, ...); 1 where the latter is 0."""
    dims = tuple(range(1, guided.ndim))
    std_cond = cond.std(dim=dims, keepdim=True, correction=0)
    std_guided = guided.std(dim=dims, keepdim=True, correction=0)
    return torch.where(std_guided > 0, std_cond / std_guided, torch.ones_like(std_cond))
