"""Other people's node packs in front of ZTSNR Model, and of ComfyUI's own zero-SNR model.

    python benchmarks/comfyui_packs.py --packs FOLDER [--comfyui PATH] [--only WORD] [--answers FILE]

FOLDER holds the packs as custom_nodes would; ones that are not there are left out and named. They are loaded from
there, each in a process of its own, so ComfyUI's own custom_nodes may be empty; its Python needs what the packs need.
Prints the table and puts it into benchmarks/RESULTS.md.
"""

import datetime
import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import click
from comfyui_overhead import comfyui_worker
from results import RESULTS, machine, markdown, write_section
from tqdm import tqdm

HEADING = "ComfyUI packs"
GOAL = 0.005
# Names of folders, as custom_nodes has them.
PACKS = (
    "cg-noisetools", "comfyui_overly_complicated_sampling", "ComfyUI-Advanced-ControlNet",
    "ComfyUI-AnimateDiff-Evolved", "ComfyUI-AutomaticCFG", "ComfyUI-CADS", "ComfyUI-Detail-Daemon",
    "ComfyUI_essentials", "ComfyUI_experiments", "ComfyUI-Extra-Samplers", "ComfyUI-Impact-Pack",
    "ComfyUI-Inspire-Pack", "ComfyUI-KJNodes", "ComfyUI-Latent-Modifiers", "ComfyUI_Noise", "ComfyUI-ppm",
    "ComfyUI-sampler-lcm-alternative", "ComfyUI_smZNodes", "ComfyUI-TiledDiffusion", "ComfyUI_TiledKSampler",
    "efficiency-nodes-comfyui", "RES4LYF", "sd-dynamic-thresholding", "sd-perturbed-attention",
    "sigmas_tools_and_the_golden_scheduler", "Skimmed_CFG",
)  # fmt: skip
EXPLANATION = """\
What a user puts between ZTSNR Model and a picture, on a network that answers exactly. `mean` and `texture`: by how much
the canvas's mean and the standard deviation around it are off, ours (behind ZTSNR Model) and stock's (behind
ModelSamplingDiscrete, v_prediction, zsnr); with guidance, where the channels differ, the largest over the channels. Off
what: the same graph on ComfyUI's own code with a table that is not rounded and begins at sigma 1e6, and a state in
float64. Rows marked * have steps that depend on where the table ends, so they are held against the closed form, and
their texture has the error of these steps in it. Black, one prompt, CFG 1, a canvas of 1024 pixels, 28 steps; or two
prompts at CFG 5 and 512 pixels. Right: at most 0.5 % off."""


def version(folder: Path) -> str:
    """The date and the hash of a pack's commit."""
    answer = subprocess.run(["git", "-C", folder, "log", "-1", "--format=%cs %h"], capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else "of unknown version"


def errors(case: dict, door: str) -> tuple[float, float]:
    """By which shares mean and texture of a door are off."""
    ours, exact = case[door], case["limit"]
    if case["spread"] or "error" in exact:
        exact = {"mean": [1.0] * 4, "texture": [0.6] * 4}
    scale = (sum(mean**2 for mean in exact["mean"]) / 4) ** 0.5
    if case["guided"]:
        mean = max(abs(a - b) for a, b in zip(ours["mean"], exact["mean"], strict=True)) / scale
        return mean, max(abs(a / b - 1) for a, b in zip(ours["texture"], exact["texture"], strict=True))
    return (sum(ours["mean"]) - sum(exact["mean"])) / (4 * scale), sum(ours["texture"]) / sum(exact["texture"]) - 1


def row(case: dict) -> list[str]:
    """Node, graph, mean and texture of both doors, verdict."""
    closed_form = case["spread"] or "error" in case["limit"]
    start = [case["node"], case["graph"] + ("*" if closed_form else "")]
    if "error" in case["ours"]:
        same = case["stock"].get("error") == case["ours"]["error"]
        return [*start, "", "", f"{'the pack ends, with stock too' if same else 'ends'}: {case['ours']['error']}"]
    ours = errors(case, "ours")
    stock = ("ends", "ends") if "error" in case["stock"] else errors(case, "stock")
    columns = [f"{_percent(a)} / {_percent(b)}" for a, b in zip(ours, stock, strict=True)]
    right = abs(ours[0]) <= GOAL and abs(ours[1]) <= GOAL
    coarse = closed_form and abs(ours[0]) <= GOAL and not right
    verdict = "right" if right else "mean right, texture of these steps" if coarse else "off"
    if case["note"]:
        verdict = f"{verdict}; {case['note']}"
    return [*start, *columns, verdict]


def _percent(share: float | str) -> str:
    return share if isinstance(share, str) else f"{100 * share:+.2f} %"


@click.command(help=__doc__.split("\n")[0])
@click.option("--packs", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True, help="Folder.")
@click.option(
    "--comfyui", type=click.Path(path_type=Path), default="~/comfy/ComfyUI", show_default=True, help="Its folder."
)
@click.option("--only", default="", help="Only packs with this in their names; nothing is written.")
@click.option(
    "--answers",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON file of what was measured; packs of the same commit in it are not run again.",
)
def main(packs: Path, comfyui: Path, only: str, answers: Path | None) -> None:
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.resolve())
    os.environ["PIP_NO_INDEX"] = "1"  # some packs install what they miss when they are imported
    inside = comfyui_worker(comfyui)
    known = json.loads(answers.read_text(encoding="utf-8")) if answers is not None and answers.exists() else {}
    rows, missing, failed = [], [], []
    for pack in tqdm([pack for pack in PACKS if only in pack], leave=False):
        folder = packs.resolve() / pack
        if not folder.is_dir():
            missing.append(pack)
            continue
        if (of := version(folder)) != known.get(pack, {}).get("version"):
            answer = inside("comfyui_packs_inside.measure", timeout=2400, packs=str(folder.parent), pack=pack,
                            seconds=2300)  # fmt: skip
            known[pack] = answer | {"version": of}
            if answers is not None:
                answers.write_text(json.dumps(known), encoding="utf-8")
        answer = known[pack]
        if "failed" in answer:
            failed.append(f"{pack} ({answer['version']}) does not load: {answer['failed']}.")
        for i, case in enumerate(answer.get("cases", ())):
            rows.append([f"{pack}, {answer['version']}" if i == 0 else "", *row(case)])
            tqdm.write(" | ".join(rows[-1]))
    inside.close()
    head = ["pack, commit", "node", "graph", "mean, ours / stock", "texture, ours / stock", "verdict"]
    counts = Counter(row[-1].partition(";")[0].partition(":")[0] for row in rows)
    parts = [
        f"`python benchmarks/{Path(__file__).name} --packs FOLDER`, {datetime.date.today().isoformat()}.\n"
        f"{machine(comfyui.expanduser())}.",
        EXPLANATION,
        f"{len(rows)} graphs of {len([row for row in rows if row[0]])} packs: "
        + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        + ".",
        markdown([head, *rows]),
        "\n".join([*failed, *([f"Not there: {', '.join(missing)}."] if missing else [])]),
    ]
    text = "\n\n".join(part for part in parts if part)
    print(text)
    if not only:
        write_section(RESULTS, HEADING, text)


if __name__ == "__main__":
    main()
