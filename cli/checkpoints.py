"""``ztsnr inspect``, ``verify``, ``mark`` and ``convert``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UserError
from .mistakes import mistakes_in_one_sentence

if TYPE_CHECKING:
    from ..checkpoints import CheckpointReport


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Show what a checkpoint is, and how each program will load it.

    PATH is a .safetensors file or a diffusers folder.  Reads only its header.
    """
    with mistakes_in_one_sentence():
        from ..checkpoints import inspect_checkpoint

        report = inspect_checkpoint(path)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
        return
    click.echo(report)
    if report.programs:
        click.echo("")
        for row in report.programs:
            sign = {True: "ok     ", False: "WRONG  ", None: "       "}[row.right]
            click.echo(f"{sign}{row}")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path), required=False)
@click.option(
    "--run",
    is_flag=True,
    help="Also run the networks once: in diffusers, from a single file and from a folder (PATH and OTHER), and in "
    "ComfyUI if it is found.",
)
@click.option("--config", help="With --run: diffusers folder or Hub name whose settings complete a single file.")
@click.option(
    "--comfyui",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="With --run: ComfyUI's folder.  [default: $COMFYUI_PATH, the one that holds this package, or ~/comfy/ComfyUI]",
)
def verify(path: Path, other: Path | None, run: bool, config: str | None, comfyui: Path | None) -> None:
    """Read every tensor and report what is wrong.

    PATH is a .safetensors file or a diffusers folder.  With OTHER, also reports the differences.  Exits with status 1
    if something is wrong.
    """
    with mistakes_in_one_sentence():
        from ..checkpoints import verify_checkpoint

        if not run and (config or comfyui):
            raise UserError("--config and --comfyui need --run: add it, or leave them out")
        report = verify_checkpoint(path, other, run=run, config=config, comfyui=comfyui)
    click.echo(report)
    if not report.sound:
        raise SystemExit(1)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--v-pred/--no-v-pred", default=None, help="Mark as v-prediction or epsilon.  [default: keep the mark]")
@click.option("--ztsnr/--no-ztsnr", default=None, help="Mark as zero terminal SNR or not.  [default: keep the mark]")
@click.option("--swarm", is_flag=True, help="Write the prediction type v-zsnr, which SwarmUI needs.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="File to write.")
@click.option("--in-place", is_flag=True, help="Change PATH itself.  Folders can only be marked in place.")
def mark(path: Path, v_pred: bool | None, ztsnr: bool | None, swarm: bool, out: Path | None, in_place: bool) -> None:
    """Mark a checkpoint so that programs load it correctly.

    PATH is a .safetensors file or a diffusers folder.  Copies tensor data unchanged.
    """
    with mistakes_in_one_sentence():
        from ..checkpoints import inspect_checkpoint, mark_checkpoint

        if out is None and not in_place:
            raise UserError("no output: give --out FILE, or --in-place to change PATH itself")
        written = mark_checkpoint(path, v_pred=v_pred, ztsnr=ztsnr, swarm=swarm, out=out, in_place=in_place)
        report = inspect_checkpoint(written)
    click.echo(f"Wrote {written}.")
    _say_who_misreads_it(report)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Dtype to convert to.  [default: keep the dtypes]",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="To a single file: checkpoint to copy everything but the U-Net from, byte by byte.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="For a LoRA that peft saved: diffusers folder that it was trained on.",
)
@click.option("--config", help="To a folder: diffusers folder or Hub name whose settings complete the file.")
@click.option(
    "--prediction",
    type=click.Choice(["v_prediction", "epsilon", "sample"]),
    help="To a folder: prediction type to write.  [default: the file's]",
)
@click.option("--zero-snr/--no-zero-snr", default=None, help="To a folder: zero terminal SNR.  [default: the file's]")
def convert(
    source: Path,
    target: Path,
    dtype: str | None,
    base: Path | None,
    model: Path | None,
    config: str | None,
    prediction: str | None,
    zero_snr: bool | None,
) -> None:
    """Convert a diffusers folder to a single file, or back.

    If SOURCE is a folder, TARGET will be a file; if SOURCE is a file, TARGET will be a folder.  A folder with an
    adapter_config.json becomes a LoRA file for ComfyUI and web UIs.
    """
    with mistakes_in_one_sentence():
        import torch

        from ..checkpoints import export_lora, inspect_checkpoint, to_folder, to_single_file
        from ..checkpoints.single_file import say_left_behind

        number = None if dtype is None else getattr(torch, dtype)
        is_lora = (source / "adapter_config.json").is_file()
        to_a_folder = {"--config": config, "--prediction": prediction, "--zero-snr": zero_snr}
        given = {"--base": base, "--model": model} | to_a_folder
        fitting = {"--model"} if is_lora else {"--base"} if source.is_dir() else set(to_a_folder)
        if wrong := [name for name, value in given.items() if value is not None and name not in fitting]:
            raise UserError(f"{', '.join(wrong)} has no effect when converting {source}: leave it out")
        if is_lora:
            if model is None:
                raise UserError(f"{source} is a LoRA: give the diffusers folder that it was trained on as --model")
            export_lora(source, target, model=model, dtype=number)
        elif source.is_dir():
            to_single_file(source, target, dtype=number, base=base)
            if base is not None:
                say_left_behind(base, click.echo)
        else:
            to_folder(
                source, target, config=config, dtype=number, prediction_type=prediction, zero_terminal_snr=zero_snr
            )
        report = inspect_checkpoint(target)
    click.echo(f"Wrote {target}.")
    _say_who_misreads_it(report)


def _say_who_misreads_it(report: "CheckpointReport") -> None:
    for row in report.programs:
        if row.right is False:
            click.echo(f"Misread by {row}")
