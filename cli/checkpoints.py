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
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect(path: Path, as_json: bool) -> None:
    """What a file is, and what programs take it for.

    PATH is a .safetensors file or a diffusers folder.  Only its header is read.
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
    help="Also run the networks once, in diffusers from a single file and from a folder (PATH and OTHER), and in "
    "ComfyUI, where one is found.",
)
@click.option("--config", help="With --run: a diffusers folder or hub name whose settings complete a single file.")
@click.option(
    "--comfyui",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="With --run.  [default: $COMFYUI_PATH, the one that this package is in, or ~/comfy/ComfyUI]",
)
def verify(path: Path, other: Path | None, run: bool, config: str | None, comfyui: Path | None) -> None:
    """Read every tensor and say what is wrong.

    Beside OTHER, also what changed.  Exits with status 1 if something is wrong.
    """
    with mistakes_in_one_sentence():
        from ..checkpoints import verify_checkpoint

        if not run and (config or comfyui):
            raise UserError("--config and --comfyui do nothing without --run")
        report = verify_checkpoint(path, other, run=run, config=config, comfyui=comfyui)
    click.echo(report)
    if not report.sound:
        raise SystemExit(1)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--v-pred/--no-v-pred", default=None, help="Mark v-prediction, or epsilon.  [default: as it is]")
@click.option("--ztsnr/--no-ztsnr", default=None, help="Mark zero terminal SNR, or not.  [default: as it is]")
@click.option("--swarm", is_flag=True, help="Write v-zsnr as prediction type, as SwarmUI wants it.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="The file to write.")
@click.option("--in-place", is_flag=True, help="Replace the file itself; the only way for a folder.")
def mark(path: Path, v_pred: bool | None, ztsnr: bool | None, swarm: bool, out: Path | None, in_place: bool) -> None:
    """Mark a file so that programs load it right.

    PATH is a .safetensors file or a diffusers folder.  Tensor data are copied as they are.
    """
    with mistakes_in_one_sentence():
        from ..checkpoints import inspect_checkpoint, mark_checkpoint

        if out is None and not in_place:
            raise UserError("say where to write: --out FILE, or --in-place to replace the file itself")
        written = mark_checkpoint(path, v_pred=v_pred, ztsnr=ztsnr, swarm=swarm, out=out, in_place=in_place)
        report = inspect_checkpoint(written)
    click.echo(f"Wrote {written}.")
    _say_who_misreads_it(report)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of the numbers.  [default: as they are]"
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="To a single file: take everything but the U-Net from this one, byte by byte.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="For a LoRA that peft saved: the diffusers folder it was trained on.",
)
@click.option("--config", help="To a folder: a diffusers folder or hub name whose settings complete the file.")
@click.option(
    "--prediction",
    type=click.Choice(["v_prediction", "epsilon", "sample"]),
    help="To a folder.  [default: what the file says]",
)
@click.option("--zero-snr/--no-zero-snr", default=None, help="To a folder.  [default: what the file says]")
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
    """Turn a diffusers folder into a single file, or back.

    SOURCE decides: a folder becomes the file TARGET, a file the folder TARGET, and a folder with an adapter_config.json
    a LoRA file that ComfyUI and web UIs read.
    """
    with mistakes_in_one_sentence():
        import torch

        from ..checkpoints import export_lora, inspect_checkpoint, to_folder, to_single_file

        number = None if dtype is None else getattr(torch, dtype)
        is_lora = (source / "adapter_config.json").is_file()
        to_a_folder = {"--config": config, "--prediction": prediction, "--zero-snr": zero_snr}
        given = {"--base": base, "--model": model} | to_a_folder
        fitting = {"--model"} if is_lora else {"--base"} if source.is_dir() else set(to_a_folder)
        if wrong := [name for name, value in given.items() if value is not None and name not in fitting]:
            raise UserError(f"{', '.join(wrong)} does nothing for {source}: it is for another kind of conversion")
        if is_lora:
            if model is None:
                raise UserError(f"{source} is a LoRA: say by --model which diffusers folder it was trained on")
            export_lora(source, target, model=model, dtype=number)
        elif source.is_dir():
            to_single_file(source, target, dtype=number, base=base)
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
            click.echo(f"Not read right by {row}")
