"""Every stock sampler of ComfyUI, with ZTSNR Model and without: how far black is off.

    python benchmarks/comfyui_samplers.py [--comfyui PATH]

Runs in ComfyUI's own Python on a model that emits the exact v, prints the table and puts it into benchmarks/RESULTS.md.
"""

import datetime
from pathlib import Path

import click
from comfyui_overhead import comfyui_worker
from sampler_accuracy import RESULTS, machine, markdown, write_section
from tqdm import tqdm

STOCK = ["simple", "karras", "beta", "sgm_uniform"]
OURS = ["ztsnr_trailing", "ztsnr_spectral"]
LIMIT = 0.1


@click.command(help=__doc__.split("\n")[0])
@click.option(
    "--comfyui", type=click.Path(path_type=Path), default="~/comfy/ComfyUI", show_default=True, help="Its folder."
)
def main(comfyui: Path) -> None:
    inside = comfyui_worker(comfyui)
    rows, worst = [], 0.0
    for sampler in tqdm(inside("about")["samplers"], leave=False):
        with_node = inside("bias", timeout=600, sampler=sampler, schedulers=STOCK + OURS, side=128)
        without = inside("bias", timeout=600, sampler=sampler, schedulers=STOCK, side=128,
                         first_step="as ComfyUI does it")  # fmt: skip
        exact = [with_node[name]["levels"] for name in STOCK + OURS]
        finite = [without[name]["levels"] for name in STOCK]
        worst = max([worst, *(abs(level) if level is not None else float("inf") for level in exact)])
        rows.append([sampler, f"{max(map(abs, exact)):.4f}", *(f"{level:+.2f}" for level in finite)])
    inside.close()
    table = markdown([["sampler", "with, worst of six", *(f"without, {name}" for name in STOCK)], *rows])
    text = (
        f"`python benchmarks/{Path(__file__).name}`, {datetime.date.today().isoformat()}.\n"
        f"{machine(comfyui.expanduser())}.\n\n"
        "By how many of 255 levels the average brightness of a black canvas is pulled toward grey (128 x 128 latent,\n"
        "brightness spread 0.3, 20 steps, float32), exact 0. `with`: the model from ZTSNR Model, the largest over\n"
        f"{', '.join(STOCK + OURS)}. `without`: ComfyUI's own zero-SNR model,\nwhich starts at sigma 4518.76.\n\n"
        f"At most {LIMIT} with every sampler and scheduler: {worst:.4f},"
        f" {'reached' if worst <= LIMIT else 'missed'}.\n\n{table}\n"
    )
    print(text)
    write_section(RESULTS, "ComfyUI: every stock sampler", text)


if __name__ == "__main__":
    main()
