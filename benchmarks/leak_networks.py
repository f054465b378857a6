"""Small v-prediction networks, trained here with the faults that the mean-leak test has to tell apart.

They paint pictures of 32 x 32 pixels in RGB from seven prompts: "open" leaves the colour free, the others name one.  A
picture is one colour, for "open" with an edge through it, and a little grain.  Three kinds of training:

    plain      the plain SDXL noise levels, which end at sigma 14.6
    starved    zero-terminal-SNR levels under Min-SNR weights without a floor, so that the last timesteps weigh nothing
    good       zero-terminal-SNR levels, even weights, the last timestep drawn one time in 50

A network takes about a minute and a half on one core.  ``trained`` keeps the weights in a folder, under a name that
changes with this file.
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from ztsnr.samplers import NoiseSchedule, min_snr_weight, to_denoised
from ztsnr.samplers.sampling import Denoise

FOLDER = Path(__file__).resolve().parent.parent / "build" / "leak_networks"
KINDS = ("plain", "starved", "good")
SIDE, PATCH, WIDTH = 32, 8, 96
SHAPE = (3, SIDE, SIDE)
COLOURS = {  # -1 to 1; (0, 0, 0) of "open" is only the average
    "open": (0, 0, 0),
    "black": (-1, -1, -1),
    "white": (1, 1, 1),
    "red": (1, -1, -1),
    "green": (-1, 1, -1),
    "blue": (-1, -1, 1),
    "grey": (0, 0, 0),
}
PROMPTS = tuple(COLOURS)
STEPS, BATCH, LEARNING_RATE = 4000, 64, 2e-3
PICTURES = 8192
TERMINAL_SHARE = 0.02  # of the timesteps drawn for "good"


def schedule_of(kind: str) -> NoiseSchedule:
    """The noise levels that a kind is trained with."""
    return NoiseSchedule.sdxl(zero_terminal_snr=kind != "plain")


def draw_pictures(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (count, 3, SIDE, SIDE) and their prompts (count,), four in ten of them open."""
    random = functools.partial(torch.randn, generator=generator)
    prompts = (torch.randint(10, (count,), generator=generator) - 3).clamp(min=0)
    is_open = (prompts == 0).view(-1, 1, 1, 1)
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[prompts].view(-1, 3, 1, 1)
    colours = colours + torch.where(is_open, 0.6, 0.05) * random(count, 3, 1, 1)
    angle, shift = 2 * math.pi * torch.rand(count, 1, 1, 1, generator=generator), 0.4 * random(count, 1, 1, 1)
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, SIDE)], indexing="ij")
    edge = (6 * (angle.cos() * x + angle.sin() * y - shift)).tanh()
    contrast = 0.4 * is_open * random(count, 3, 1, 1)
    return colours + contrast * edge + 0.05 * random(count, *SHAPE), prompts


class Block(nn.Module):
    """Mixes patches and shows all their average, then mixes channels, scaled and shifted by timestep and prompt."""

    def __init__(self, patches: int):
        super().__init__()
        self.mix = nn.Linear(patches, patches)
        self.average = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.channels = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(x.mT).mT + self.average(x.mean(1, keepdim=True))
        scale, shift = self.modulation(embedding).unsqueeze(1).chunk(2, -1)
        return x + self.channels(self.norm(x) * (1 + scale) + shift)


class Network(nn.Module):
    """v from the variance-preserving state (B, 3, SIDE, SIDE), timesteps (B,) and prompts (B,)."""

    def __init__(self):
        super().__init__()
        patches, values = (SIDE // PATCH) ** 2, 3 * PATCH**2
        self.register_buffer("frequencies", math.pi / 2 * torch.logspace(0, 3, 32) / 1000, persistent=False)
        self.timestep = nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.prompt = nn.Embedding(len(PROMPTS), WIDTH)
        self.input = nn.Linear(values, WIDTH)
        self.blocks = nn.ModuleList(Block(patches) for _ in range(3))
        self.output = nn.Linear(WIDTH, values)
        self.gain = nn.Linear(WIDTH, 3)  # of the noise itself, pixel by pixel

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        phases = t[:, None] * self.frequencies
        embedding = self.timestep(torch.cat([phases.sin(), phases.cos()], 1)) + self.prompt(prompt)
        embedding = nn.functional.silu(embedding)
        h = self.input(nn.functional.pixel_unshuffle(x, PATCH).flatten(2).mT)
        for block in self.blocks:
            h = block(h, embedding)
        v = self.output(h).mT.unflatten(2, 2 * [SIDE // PATCH])
        return nn.functional.pixel_shuffle(v, PATCH) + self.gain(embedding)[..., None, None] * x


def train(kind: str, seed: int, steps: int = STEPS) -> Network:
    """Train a network of one of ``KINDS``; on the CPU."""
    schedule = schedule_of(kind)
    alphas = schedule.alphas_cumprod.sqrt().float()
    stds = (1 - schedule.alphas_cumprod).sqrt().float()
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    weights = min_snr_weight(snr, gamma=5.0).float() if kind == "starved" else torch.ones(len(snr))

    generator = torch.Generator().manual_seed(seed)
    pictures, prompts = draw_pictures(PICTURES, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc=f"training {kind} {seed}", leave=False, disable=None):
        drawn = torch.randint(PICTURES, (BATCH,), generator=generator)
        # one timestep from each of BATCH equal ranges
        t = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) * (len(snr) / BATCH)
        t = t.long().clamp(max=schedule.last_timestep)
        if kind == "good":
            t[torch.rand(BATCH, generator=generator) < TERMINAL_SHARE] = schedule.last_timestep
        x0, noise = pictures[drawn], torch.randn(BATCH, *SHAPE, generator=generator)
        alpha, s = alphas[t].view(-1, 1, 1, 1), stds[t].view(-1, 1, 1, 1)
        v = network(alpha * x0 + s * noise, t.float(), prompts[drawn])
        loss = (weights[t] * (v - (alpha * noise - s * x0)).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return network.eval().requires_grad_(False)


def trained(kind: str, seed: int, folder: Path = FOLDER) -> Network:
    """A network from the folder; trained first, and kept there, if it is not in it yet."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    path = Path(folder) / f"{kind}-{seed}-{recipe}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(train(kind, seed).state_dict(), unfinished)
        os.replace(unfinished, path)
    network = Network()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


def denoiser(network: Callable, schedule: NoiseSchedule, prompt: str = "open") -> Denoise:
    """The network as ``denoise(x_vp, sigma) -> x0``, asked for timesteps of a schedule, its own or a wrong one."""
    which = PROMPTS.index(prompt)

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        t = torch.full((len(x),), schedule.timestep(sigma))
        return to_denoised(network(x, t, torch.full((len(x),), which)), x, sigma)

    return denoise
