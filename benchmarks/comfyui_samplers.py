"""Every stock sampler of ComfyUI, with ZTSNR Model and without, at CFG 1 and 4: how far black is off.

    python benchmarks/comfyui_samplers.py [--comfyui PATH]

Runs in ComfyUI's own Python on a model that emits the exact v, prints the table and puts it into benchmarks/RESULTS.md.
"""

import datetime
import os
from pathlib import Path

import click
from comfyui_overhead import comfyui_worker
from results import RESULTS, machine, markdown, write_section
from tqdm import tqdm

STOCK = ["simple", "karras", "beta", "sgm_uniform"]
OURS = ["ztsnr_trailing", "ztsnr_spectral"]
SCALES = (1, 4)
LIMIT = 0.1


@click.command(help=__doc__.split("\n")[0])
@click.option(
    "--comfyui", type=click.Path(path_type=Path), default="~/comfy/ComfyUI", show_default=True, help="Its folder."
)
def main(comfyui: Path) -> None:
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.resolve())
    inside = comfyui_worker(comfyui)

    def bias(sampler: str, schedulers: list[str], cfg: int, door: str) -> list[float]:
        levels = inside("comfyui_samplers_inside.bias", timeout=1800, sampler=sampler, schedulers=schedulers, cfg=cfg,
                        door=door).values()  # fmt: skip
        return [float("inf") if level is None else level for level in levels]

    rows, worst = [], dict.fromkeys(SCALES, 0.0)
    for sampler in tqdm(inside("about")["samplers"], leave=False):
        ours = {cfg: max(map(abs, bias(sampler, STOCK + OURS, cfg, "ours"))) for cfg in SCALES}
        stock = zip(*(bias(sampler, STOCK, cfg, "stock") for cfg in SCALES), strict=True)
        worst = {cfg: max(worst[cfg], ours[cfg]) for cfg in SCALES}
        rows.append([sampler, *(f"{ours[cfg]:.4f}" for cfg in SCALES),
                     *(" / ".join(f"{level:+.2f}" for level in levels) for levels in stock)])  # fmt: skip
        tqdm.write(" ".join(rows[-1]))
    inside.close()
    head = ["sampler", *(f"with, CFG {cfg}" for cfg in SCALES), *(f"without, {name}" for name in STOCK)]
    reached = ", ".join(
        f"CFG {cfg}: {level:.4f}, {'reached' if level <= LIMIT else 'missed'}" for cfg, level in worst.items()
    )
    text = (
        f"`python benchmarks/{Path(__file__).name}`, {datetime.date.today().isoformat()}.\n"
        f"{machine(comfyui.expanduser())}.\n\n"
        "By how many of 255 levels the average brightness of a black canvas is pulled toward grey (128 x 128 latent,\n"
        "brightness spread 0.3, 20 steps, float32), exact 0. `with`: the model from ZTSNR Model, the largest over\n"
        f"{', '.join(STOCK + OURS)}. `without`: ComfyUI's own zero-SNR model,\n"
        "which starts at sigma 4518.76, at CFG 1 / 4. At CFG 4 the negative prompt asks for a quarter of the black,\n"
        "the positive one for as much more as guidance needs, with one spread: the exact answer is black again.\n"
        "CFG++ is another flow: its exact answer is what ComfyUI's own code makes of the same steps from sigma 1e6 in\n"
        "float64.\n\n"
        f"At most {LIMIT} with every sampler and scheduler, {reached}.\n\n{markdown([head, *rows])}\n"
    )
    print(text)
    write_section(RESULTS, "ComfyUI: every stock sampler", text)


if __name__ == "__main__":
    main()
