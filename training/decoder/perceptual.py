"""Losses that compare a picture with its reconstruction: LPIPS, and a learned discriminator.

Under L1 alone, an uncertain decoder does best with the average of all possibilities, which is blurred.  LPIPS (Zhang et
al., arXiv 1801.03924) compares features of a recognition network.  A patch discriminator (Isola et al., arXiv
1611.07004) learns to tell reconstructions from pictures.  VQGAN (Esser et al., arXiv 2012.09841) combined the three,
and the VAEs of Stable Diffusion were trained this way (Rombach et al., arXiv 2112.10752).
"""

import warnings
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, model_info
from safetensors import SafetensorError, safe_open
from torch import nn

from ...checkpoints.header import read_header
from ...checkpoints.hub import HUB_ERRORS, HUB_TIMEOUT
from ...errors import UserError
from ...extras import needs

VGG16 = "timm/vgg16.tv_in1k"  # on the Hugging Face Hub: torchvision's weights as safetensors
MOST_ADAPTIVE = 1e4  # VQGAN's limit
EPSILON = 1e-6  # in the denominator of the adaptive weight, as in VQGAN's paper


# ----------------------------------------------------------------------------------------------------------------------
# LPIPS


def load_lpips(backbone: str | Path | None = None) -> nn.Module:
    """LPIPS 0.1 on VGG16, frozen.

    Called with two pictures (B, 3, H, W) in [-1, 1], it returns a map (B, 1, H, W).  If H and W are multiples of 16,
    the mean of the map is the published LPIPS: the layers' maps are enlarged bilinearly, which keeps their means.

    Args:
        backbone: .safetensors file of torchvision's VGG16 (names ``features.0.weight``, ...); by default downloaded
            from the Hub or read from its cache.  The package ``lpips`` contains the heads (six kilobytes).

    Raises:
        UserError: the package is not installed, or the weights cannot be downloaded or do not match.
    """
    try:
        import lpips  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        missing = (error.name or "lpips").split(".")[0]
        raise UserError(f"{needs('LPIPS', missing)}, or set lpips_weight to 0") from None
    path = _vgg16() if backbone is None else Path(backbone)
    header = read_header(path)  # refuses pickles
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision")  # deprecated arguments in the package's calls
        network = lpips.LPIPS(net="vgg", spatial=True, pnet_rand=True, verbose=False)
    wanted = network.net.state_dict()
    # slice3.10.weight is features.10.weight in torchvision
    names = {name: f"features.{name.split('.', 1)[1]}" for name in wanted}
    for name, source in names.items():
        if source not in header.tensors or header.tensors[source].shape != tuple(wanted[name].shape):
            raise UserError(f"{path} is not torchvision's VGG16: {source} is missing or has another shape")
    try:
        with safe_open(path, "pt") as file:  # without the classifier, nine tenths of the file
            network.net.load_state_dict({name: file.get_tensor(source).float() for name, source in names.items()})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return network.eval().requires_grad_(False)


def _vgg16() -> Path:
    try:
        model_info(VGG16, timeout=HUB_TIMEOUT)
        offline = False
    except HUB_ERRORS:
        offline = True  # otherwise the client would retry for minutes
    try:
        return Path(hf_hub_download(VGG16, "model.safetensors", local_files_only=offline))
    except HUB_ERRORS as error:
        raise UserError(
            f"could not download the VGG16 of LPIPS ({VGG16}) from the Hugging Face Hub: run once with a network "
            "connection, set lpips_backbone to a .safetensors file of it, or set lpips_weight to 0"
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# The discriminator


class PatchDiscriminator(nn.Sequential):
    """PatchGAN: scores how real each of many overlapping patches looks (arXiv 1611.07004, appendix 6.1.2).

    Called with (B, 3, H, W) in [-1, 1], it returns (B, 1, h, w), about H / 2**layers high.  Its normalisation always
    uses the statistics of the current batch, so it keeps no running ones.

    Args:
        width: channels of the first layer.
        layers: number of convolutions that halve the picture; a patch is 70 pixels wide with 3, and 34 with 2.
        generator: random generator for the weights, drawn from N(0, 0.02).
    """

    def __init__(self, width: int = 64, layers: int = 3, *, generator: torch.Generator | None = None):
        channels = [width * min(2**i, 8) for i in range(layers + 1)]
        blocks = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(channels)):
            stride = 2 if i < layers - 1 else 1
            blocks += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),  # the normalisation has a bias
                nn.BatchNorm2d(after, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*blocks, nn.Conv2d(channels[-1], 1, 4, 1, 1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02, generator=generator)


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss: real patches should score above 1, others below -1 (arXiv 1705.02894).

    Args:
        real, fake: scores of real and reconstructed pictures, each (B, 1, h, w).
    """
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The factor that gives the adversarial loss the same gradient norm at the last layer as the reconstruction loss.

    lambda = |grad reconstruction| / (|grad adversarial| + 1e-6), with the gradients of the decoder's last layer
    (arXiv 2012.09841, equation 7); at most 10**4.

    Args:
        reconstruction, adversarial: losses of one graph, which is retained.
        last: weight of the decoder's last layer.

    Returns:
        A scalar tensor on the device, without gradient.
    """
    pulls = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    return (pulls[0] / (pulls[1] + EPSILON)).clamp(max=MOST_ADAPTIVE).detach()
