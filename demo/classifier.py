"""A classifier of the demo's pictures, to measure adherence: does a picture show what its caption asks for?

It is trained on demand, in about a minute, on composed pictures with some noise, so that it recognises objects and does
not judge how clean they are.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from .composed import GROUNDS, Asked, Composer

STEPS, BATCH, LEARNING_RATE = 700, 64, 2e-3
ROUGHEST = 12.0  # largest standard deviation of the noise added to training pictures, in levels


class Classifier(nn.Module):
    """(B, H, W, 3) pictures in levels to logits of the object, whose last class is none, and logits of the ground."""

    def __init__(self, things: int, width: int = 32):
        super().__init__()
        layers, channels = [], 3
        for level in range(4):
            out = width << level if level < 3 else width << 2
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
            channels = out
        self.features = nn.Sequential(*layers)
        self.thing = nn.Linear(2 * channels, things + 1)
        self.ground = nn.Linear(2 * channels, len(GROUNDS))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(pictures.movedim(-1, 1) / 127.5 - 1).flatten(2)
        pooled = torch.cat([features.amax(2), features.mean(2)], 1)
        return self.thing(pooled), self.ground(pooled)


def train_classifier(composer: Composer, seed: int = 0, steps: int = STEPS) -> Classifier:
    """Train on all pairs of object and ground.  Returns the classifier in eval mode."""
    random = np.random.default_rng((77, seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(len(composer.emoji))
    optimizer = torch.optim.AdamW(classifier.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        asked = [draw_short(composer, random) for _ in range(BATCH)]
        pictures = np.stack([composer.picture(one, random) for one in asked]).astype(np.float32)
        pictures += random.uniform(0, ROUGHEST, (BATCH, 1, 1, 1)) * random.standard_normal(pictures.shape)
        things, grounds = classifier(torch.from_numpy(pictures.clip(0, 255).astype(np.float32)))
        wanted_things, wanted_grounds = torch.from_numpy(_classes(composer, asked)).unbind(1)
        loss = nn.functional.cross_entropy(things, wanted_things)
        loss = loss + nn.functional.cross_entropy(grounds, wanted_grounds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def draw_short(composer: Composer, random: np.random.Generator) -> Asked:
    """Draw what a picture shows: held-out pairs too, but no object stretched across the canvas."""
    while True:
        asked = composer.draw(random, held_out=bool(random.random() < 0.2))
        if not asked.long:
            return asked


@torch.no_grad()
def adherence(
    classifier: Classifier, composer: Composer, pictures: np.ndarray, asked: Sequence[Asked]
) -> tuple[np.ndarray, np.ndarray]:
    """Two (B,) bool arrays: pictures (B, H, W, 3) in levels that show the right object, and the right ground."""
    things, grounds = classifier(torch.from_numpy(np.asarray(pictures, dtype=np.float32).clip(0, 255)))
    classes = _classes(composer, asked)
    return things.argmax(1).numpy() == classes[:, 0], grounds.argmax(1).numpy() == classes[:, 1]


def _classes(composer: Composer, asked: Sequence[Asked]) -> np.ndarray:
    """(B, 2) class of the object, the last of which is none, and class of the ground."""
    number = {name: i for i, name in enumerate(composer.emoji)} | {"": len(composer.emoji)}
    return np.array([(number[one.emoji], GROUNDS.index(one.ground)) for one in asked])
