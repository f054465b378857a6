"""A step schedule as a small picture, drawn with Pillow alone: ComfyUI always has it."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (384, 280)  # small, so that its text stays legible in a node, about 290 wide
LEFT, TOP, RIGHT, BOTTOM = 54, 56, 364, 232  # the plot within it
INK, FAINT, GRID, PAPER = "#222222", "#6b6b6b", "#e2e2e2", "#ffffff"
LINE, INFINITE = "#0072B2", "#D55E00"  # of Okabe and Ito's palette, which colour-blind readers can tell apart


def schedule_picture(sigmas: Sequence[float], timesteps: Sequence[float]) -> Image.Image:
    """log sigma over the steps, with infinity and 0 as places of their own above and below.

    Args:
        sigmas: (steps + 1,) decreasing; the first may be inf, the last 0.
        timesteps: (steps,) the timestep of each sigma but the last.

    Returns:
        RGB, 384 x 280.
    """
    steps = len(sigmas) - 1
    finite = [math.log10(sigma) for sigma in sigmas if 0 < sigma < math.inf] or [0.0]
    low, high = math.floor(min(finite)), max(math.ceil(max(finite)), math.floor(min(finite)) + 1)
    band = 22  # height of the places for infinity and 0

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / steps

    def y(sigma: float) -> float:
        if math.isinf(sigma):
            return TOP
        if sigma == 0:
            return BOTTOM
        share = (math.log10(sigma) - low) / (high - low)
        return BOTTOM - band - share * (BOTTOM - TOP - 2 * band)

    image = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(image)
    small, title = ImageFont.load_default(13), ImageFont.load_default(14)

    levels = [10.0**decade for decade in range(low, high + 1)]
    for level in [*levels, *({math.inf, 0.0} & set(sigmas))]:
        draw.line([(LEFT, y(level)), (RIGHT, y(level))], fill=GRID)
        text = {math.inf: "inf", 0.0: "0"}.get(level, f"{level:g}")
        draw.text((LEFT - 8, y(level)), text, fill=FAINT, font=small, anchor="rm")
    for step in sorted({0, steps, *range(0, steps, max(1, math.ceil(steps / 6)))}):
        if step == steps or x(steps) - x(step) > 34:
            draw.text((x(step), BOTTOM + 8), str(step), fill=FAINT, font=small, anchor="mt")

    points = [(x(step), y(sigma)) for step, sigma in enumerate(sigmas)]
    draw.line(points, fill=LINE, width=2, joint="curve")
    radius = 4 if steps <= 40 else 2
    for (px, py), sigma in zip(points, sigmas, strict=True):
        color = INFINITE if math.isinf(sigma) else LINE
        draw.ellipse([px - radius, py - radius, px + radius, py + radius], fill=color)

    noise = ["inf" if math.isinf(sigma) else f"{sigma:.3g}" for sigma in sigmas]
    shown = noise if steps <= 3 else [*noise[:3], "...", *noise[-2:]]
    words = f"{steps} step{'s' if steps > 1 else ''}, t {timesteps[0]:.4g} to {timesteps[-1]:.4g}"
    draw.text((12, 8), f"{words}\nsigma {', '.join(shown)}", fill=INK, font=title)
    draw.text(((LEFT + RIGHT) / 2, SIZE[1] - 6), "step", fill=FAINT, font=small, anchor="mb")
    return image
