"""Classifier-free guidance and its rescale, on the network's own predictions.

Both work on v (or x0) and so are regular at sigma = infinity, where v = -x0.
"""

import torch


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): uncond + scale (cond - uncond), (B, C, H, W)."""
    return torch.lerp(uncond, cond, scale)


def rescale_guidance(guided: torch.Tensor, cond: torch.Tensor, phi: float = 0.7) -> torch.Tensor:
    """Bring the contrast of a guided prediction back toward that of the conditional one.

    Lin et al. (arXiv 2305.08891), Algorithm 2: scale each sample to the standard deviation of ``cond``, then mix the
    result with the unscaled one by phi.  The standard deviation is over channels, height and width of a sample.

    Args:
        guided: (B, C, H, W) prediction after guidance.
        cond: (B, C, H, W) conditional prediction.
        phi: 0 leaves the guidance as it is, 1 rescales it whole; the paper uses 0.7.

    Returns:
        (B, C, H, W); a sample whose guided prediction has no contrast at all is returned as it is.
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"guidance rescale phi must lie in [0, 1], not {phi}")
    dims = tuple(range(1, guided.ndim))
    std_cond = cond.std(dim=dims, keepdim=True, correction=0)
    std_guided = guided.std(dim=dims, keepdim=True, correction=0)
    ratio = torch.where(std_guided > 0, std_cond / std_guided, torch.ones_like(std_cond))
    return guided * torch.lerp(torch.ones_like(ratio), ratio, phi)
