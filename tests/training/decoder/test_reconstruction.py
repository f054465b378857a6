"""The scores of reconstructions, against scikit-image's."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from tests.data.test_latent_cache import tiny_vae
from ztsnr.training.decoder.reconstruction import MOST_SHOWN, evaluate, picture_sheet


def l1_map(a, b):
    """Stands in for LPIPS."""
    return (a - b).abs().mean(1, keepdim=True)


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(11, 3, 16, 24, generator=generator) * 2 - 1
    marks = torch.zeros(11, 1, 16, 24)
    marks[2, :, 3:9, 5:7] = marks[6, :, :, 20:] = 1
    return torch.cat([pixels, marks], dim=1)


def test_scores(examples):
    vae = tiny_vae()
    scores, shown = evaluate(vae, examples, l1_map, batch_size=4)
    again, _ = evaluate(vae, examples, None, batch_size=11)
    pixels = examples[:, :3]
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    before, after = ((data.double().permute(0, 2, 3, 1).numpy() + 1) / 2 for data in (pixels, decoded))
    psnr = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(before, after, strict=True)]
    inside = [
        peak_signal_noise_ratio(before[2, 3:9, 5:7], after[2, 3:9, 5:7], data_range=1),
        peak_signal_noise_ratio(before[6, :, 20:], after[6, :, 20:], data_range=1),
    ]
    assert scores.pictures == 11
    assert scores.psnr == pytest.approx(np.mean(psnr), abs=1e-4)
    assert scores.psnr_in_boxes == pytest.approx(np.mean(inside), abs=1e-4)
    assert scores.l1 == pytest.approx(2 * np.abs(before - after).mean(), rel=1e-5)
    assert scores.lpips == pytest.approx(scores.l1, rel=1e-5)
    assert (again.psnr, again.lpips) == (pytest.approx(scores.psnr, abs=1e-4), None)
    torch.testing.assert_close(shown, decoded[:MOST_SHOWN])
    assert str(scores) == (
        f"L1 {scores.l1:.4f}, PSNR {scores.psnr:.2f} dB, LPIPS {scores.lpips:.4f}, "
        f"PSNR in boxes {scores.psnr_in_boxes:.2f} dB"
    )


def test_without_boxes(examples):
    scores, _ = evaluate(tiny_vae(), examples[:2], None, batch_size=4)
    assert scores.psnr_in_boxes is None


def test_a_sheet(examples):
    pixels = examples[:2, :3]
    sheet = np.asarray(picture_sheet({"original": pixels, "inverted": -pixels})).astype(float)
    assert sheet.shape == (16 + 2 * 16, 2 * 24, 3)
    wanted = (pixels[1].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(sheet[32:, :24] - wanted).max() <= 0.5 + 1e-4
    assert np.abs(sheet[32:, 24:] - (255 - wanted)).max() <= 0.5 + 1e-4
    assert sheet[:16].min() < 50  # the titles
