"""LPIPS from its package, and a discriminator that pulls as hard as it should."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.data.test_latent_cache import tiny_vae
from ztsnr.training.decoder import perceptual
from ztsnr.training.decoder.perceptual import PatchDiscriminator, adaptive_weight, hinge_loss, load_lpips

# ----------------------------------------------------------------------------------------------------------------------
# LPIPS


@pytest.fixture
def backbone(tmp_path):
    """VGG16 with random weights, by torchvision's names."""
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = torchvision.models.vgg16(weights=None).features.state_dict()
    path = tmp_path / "vgg16.safetensors"
    save_file({f"features.{name}": weight for name, weight in features.items()}, path)
    return path


def test_the_package_with_a_backbone_from_a_file(backbone):
    lpips = pytest.importorskip("lpips")
    ours = load_lpips(backbone)
    assert not any(weight.requires_grad for weight in ours.parameters())
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(2, 3, 64, 48, generator=generator) * 2 - 1 for _ in range(2))
    seen = ours(a, b)
    assert seen.shape == (2, 1, 64, 48)
    assert ours(a, a).abs().max() == 0

    published = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # which gives one number a picture
    published.net.load_state_dict(ours.net.state_dict())
    torch.testing.assert_close(seen.mean(dim=(1, 2, 3)), published(a, b).flatten(), rtol=1e-5, atol=0)
    assert seen.mean() > 1e-3


def test_other_weights_are_refused(tmp_path):
    pytest.importorskip("lpips")
    save_file({"features.0.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of torchvision's VGG16"):
        load_lpips(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is a pickle"):
        load_lpips(tmp_path / "vgg16.pth")


def test_a_hub_that_does_not_answer(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(perceptual, "model_info", refuse)
    monkeypatch.setattr(perceptual, "VGG16", "nobody/has-this")
    with pytest.raises(ValueError, match=r"set lpips_backbone to a \.safetensors file of it"):
        perceptual._vgg16()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"needs lpips: pip install .*\[vae\].*, or set lpips_weight to 0"):
        load_lpips()


# ----------------------------------------------------------------------------------------------------------------------
# The discriminator


@pytest.mark.parametrize(("layers", "patch"), [(3, 70), (2, 34)])
def test_a_patch_is_as_wide_as_the_paper_says(layers, patch):
    """The paper's numbers, without the normalisation, through which a batch is seen as a whole."""
    network = PatchDiscriminator(4, layers, generator=torch.Generator().manual_seed(0))
    for i, module in enumerate(network):
        if isinstance(module, nn.BatchNorm2d):
            network[i] = nn.Identity()
    pixels = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(1)).requires_grad_()
    scores = network(pixels)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    seen = pixels.grad[0].abs().sum(0) > 0
    assert (seen.any(0).sum(), seen.any(1).sum()) == (patch, patch)


def test_the_discriminator_is_the_same_every_time():
    first, second, third = (PatchDiscriminator(4, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first[0].weight, third[0].weight)


def test_hinge_loss():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2)


def test_it_learns_to_tell_pictures_apart():
    """By the scale of their details, which no pixel tells alone."""
    generator = torch.Generator().manual_seed(0)
    network = PatchDiscriminator(8, 2, generator=generator)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2, (0.5, 0.9))

    def pictures():
        fine, coarse = (torch.rand(4, 3, side, side, generator=generator) * 2 - 1 for side in (32, 16))
        return fine, nn.functional.interpolate(coarse, scale_factor=2)

    for _ in range(80):
        loss = hinge_loss(*map(network, pictures()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert hinge_loss(*map(network, pictures())) < 0.5  # 1 is what knowing nothing gives


def test_the_adaptive_weight():
    """The last layer is a convolution of h, so a loss whose gradient at the picture is g pulls at it by g * h."""
    vae, network = tiny_vae(), PatchDiscriminator(4, 2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    last, inputs = vae.decoder.conv_out, []
    last.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].detach()))
    decoded = vae.decode(torch.randn(2, 4, 8, 8, generator=generator)).sample
    weight = adaptive_weight((decoded - pixels).abs().mean(), -network(decoded).mean(), last.weight)

    apart = decoded.detach().requires_grad_()
    (-network(apart).mean()).backward()
    of_l1 = (decoded.detach() - pixels).sign() / pixels.numel()
    pulls = [
        torch.nn.grad.conv2d_weight(inputs[0].double(), last.weight.shape, at_picture.double(), padding=1).norm()
        for at_picture in (of_l1, apart.grad)
    ]
    assert weight.item() == pytest.approx((pulls[0] / (pulls[1] + 1e-6)).item(), rel=1e-4)
    assert not weight.requires_grad


def test_the_adaptive_weight_is_limited():
    last = torch.ones(3, requires_grad=True)
    assert adaptive_weight(1e6 * last.sum(), 0 * last.sum(), last) == 1e4
