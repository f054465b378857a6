"""On CUDA the U-Net is in channels_last, in which FSDP shares nothing out."""

import torch
import torch.distributed as dist

from ztsnr.data.tokens import batch_prompts
from ztsnr.training.networks import Denoiser, Tokenize, load_networks, trained_names
from ztsnr.training.parallel import Sharded
from ztsnr.world import World


def test_a_unet_in_channels_last_is_shared_out(place, tmp_path):
    networks = load_networks(place / "tiny")
    networks.unet.to(memory_format=torch.channels_last)
    denoiser = Denoiser(networks)
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    asked = noisy, torch.tensor([500]), batch_prompts([Tokenize(networks)("a square")]), torch.zeros(1, 6)
    with torch.no_grad():
        expected = denoiser(*asked)
    names = trained_names(denoiser.requires_grad_(False), adapter=False, text_encoders=False)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        world = World(0, 1, 1, torch.device("cpu"))
        model = Sharded(denoiser, torch.float32, names, torch.float32, world, hsdp=False)
        answer = model(*asked)
        answer.square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters.values())
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(answer.detach(), expected, rtol=1e-4, atol=1e-5)
