"""The ``ztsnr`` command.  Each subcommand imports what it needs when it runs, so that --help answers at once."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import __version__
from .extras import explain

if TYPE_CHECKING:
    import torch

    from .checkpoints import CheckpointReport


DEMO = Path("ztsnr_demo")
PATIENCE = 10  # seconds in which torchrun ends all processes after the first


class _Commands(click.Group):
    """Commands whose output any pipe takes."""

    def main(self, *args, **options):
        """Escape what the output's encoding lacks: Windows pipes are in cp1252, and names of files in anything."""
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # as Python does for stderr
        return super().main(*args, **options)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ztsnr")
def main() -> None:
    """Exact zero-terminal-SNR sampling for v-prediction diffusion models."""


@main.command()
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder of your own pictures, used as the photographs.  [default: some that come with scikit-image]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    default=DEMO,
    show_default=True,
    help="Folder for the contact sheet, the plot and the numbers; with --train ztsnr_reproduction by default.",
)
@click.option("--steps", type=click.IntRange(1, 1000), default=20, show_default=True, help="Sampling steps.")
@click.option(
    "--size", type=click.IntRange(16, 256), default=128, show_default=True, help="Height and width in pixels."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32),
    default=0,
    show_default=True,
    help="Seed of the first picture, or of the trainings.",
)
@click.option(
    "--train",
    type=click.Choice(["cpu", "gpu"]),
    help="Train an epsilon network and four fine-tunes of it, and measure the claims about zero terminal SNR on them: "
    "in about an hour on two processor cores, or larger ones on a GPU.  A run that was stopped resumes.",
)
@click.option(
    "--quick", is_flag=True, help="With --train cpu: only fine-tune the base that comes with the package, in minutes."
)
def demo(images: Path | None, out: Path, steps: int, size: int, seed: int, train: str | None, quick: bool) -> None:
    """See what a sampler's first step does to a picture; needs no model.

    Samples from a model that is exact for a small set of pictures, with diffusers schedulers that start at infinity, at
    finite noise, or late, and shows how far each ends from the exact answer.  Then samples networks that come with the
    package: epsilon as SDXL is, v-prediction, and zero terminal SNR.
    """
    with mistakes_in_one_sentence():
        if quick and train != "cpu":
            raise ValueError("--quick goes with --train cpu")
        if train is not None:
            from .demo.reproduction import reproduce

            out = Path("ztsnr_reproduction") if out == DEMO else out
            if not reproduce(out, train, quick, [seed], say=click.echo):
                raise SystemExit(1)
            return

        from .diagnostics.demo import run_demo

        run_demo(out, images, steps, size, seed, say=click.echo)

        from .demo.networks_sheet import show_networks

        show_networks(out, say=click.echo)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
def example(folder: Path) -> None:
    """Write a small data set, a small base and settings to fine-tune with at once.

    DIR gets captioned pictures, an epsilon network of SDXL's classes that trains on a processor in minutes, and a
    settings.toml with a word on every choice.
    """
    with mistakes_in_one_sentence():
        from .demo.example import write_example

        write_example(folder, say=click.echo)


@main.command()
@click.argument("model")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT[=COLOUR]",
    help="What to sample; =black, white, red, green, blue, grey or #rrggbb says what is right. The first prompt should "
    "leave the brightness open. Repeat it.  [default: the empty prompt and six solid colours]",
)
@click.option("--negative-prompt", help="[default: what the pipeline does without one]")
@click.option("--seeds", type=click.IntRange(2), default=8, show_default=True, help="How many.")
@click.option("--first-seed", type=click.IntRange(0, 2**32), default=0, show_default=True)
@click.option("--width", type=click.IntRange(8), default=None, help="In pixels.  [default: the model's]")
@click.option("--height", type=click.IntRange(8), default=None, help="In pixels.  [default: the model's]")
@click.option("--steps", type=click.IntRange(1, 1000), default=28, show_default=True, help="Of the sampler under test.")
@click.option(
    "--scheduler",
    default="ztsnr",
    show_default=True,
    metavar="NAME",
    help="The sampler under test: ztsnr, model (the one it was published with), or a diffusers class such as "
    "EulerDiscreteScheduler.",
)
@click.option("--spacing", help="Of its steps, such as trailing, leading.  [default: the scheduler's]")
@click.option(
    "--guidance",
    type=click.FloatRange(1.0),
    default=5.0,
    show_default=True,
    help="Classifier-free guidance.  Above 1, the report also says how far it moves brightness.",
)
@click.option(
    "--reference-steps",
    type=click.IntRange(10),
    default=40,
    show_default=True,
    help="Of the exact flow to compare with.",
)
@click.option(
    "--offset",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of the noise means, in their standard deviations.",
)
@click.option(
    "--prediction", type=click.Choice(["v_prediction", "epsilon", "sample"]), help="[default: what the files say]"
)
@click.option("--zero-snr/--no-zero-snr", default=None, help="[default: what the files say]")
@click.option("--config", help="For a single file: a diffusers folder or hub name whose settings complete it.")
@click.option("--device", default="auto", show_default=True, help="auto takes CUDA, XPU or MPS if there is one.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: float16 on CUDA, else float32]"
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    default=Path("ztsnr_leak"),
    show_default=True,
    help="Folder for the report; an interrupted run goes on there.",
)
@click.option(
    "--gate",
    type=click.FloatRange(0),
    metavar="LEVELS",
    help="Exit with status 1 if the checkpoint leaks or a pull toward grey is above this, in levels of 255.",
)
def leak(
    model: str,
    prompts: tuple[str, ...],
    negative_prompt: str | None,
    seeds: int,
    first_seed: int,
    width: int | None,
    height: int | None,
    steps: int,
    scheduler: str,
    spacing: str | None,
    guidance: float,
    reference_steps: int,
    offset: float,
    prediction: str | None,
    zero_snr: bool | None,
    config: str | None,
    device: str,
    dtype: str | None,
    out: Path,
    gate: float | None,
) -> None:
    """Is a model zero-SNR trained? Does its sampler leak? What does guidance do to brightness?

    A leak is a network or a sampler that takes the mean of the noise for the picture's brightness.  MODEL is a
    diffusers folder, a single .safetensors file, or a name on the Hugging Face hub.  Prints a table and the verdict,
    and writes report.html and report.json.
    """
    with mistakes_in_one_sentence():
        from .diagnostics.leak_run import PROMPTS, parse_prompt, run_leak

        asked = [parse_prompt(text) for text in prompts] or PROMPTS

        import torch

        from .checkpoints import load_pipeline

        place = _find_device(device)
        dtype = dtype or ("float16" if place.type == "cuda" else "float32")
        loaded = load_pipeline(
            model,
            config=config,
            device=place,
            dtype=getattr(torch, dtype),
            prediction_type=prediction,
            zero_terminal_snr=zero_snr,
        )
        own = loaded.pipeline.unet.config.sample_size * loaded.pipeline.vae_scale_factor
        passed = run_leak(
            loaded,
            out,
            prompts=asked,
            negative_prompt=negative_prompt,
            seeds=range(first_seed, first_seed + seeds),
            size=(width or own, height or own),
            steps=steps,
            scheduler=scheduler,
            spacing=spacing,
            guidance_scale=guidance,
            reference_steps=reference_steps,
            offset=offset,
            gate=gate,
            say=click.echo,
        )
    if not passed:
        raise SystemExit(1)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect(path: Path, as_json: bool) -> None:
    """What a file is, and what programs take it for.

    PATH is a .safetensors file or a diffusers folder.  Only its header is read.
    """
    with mistakes_in_one_sentence():
        from .checkpoints import inspect_checkpoint

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


@main.command()
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
        from .checkpoints import verify_checkpoint

        if not run and (config or comfyui):
            raise ValueError("--config and --comfyui do nothing without --run")
        report = verify_checkpoint(path, other, run=run, config=config, comfyui=comfyui)
    click.echo(report)
    if not report.sound:
        raise SystemExit(1)


@main.command()
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
        from .checkpoints import inspect_checkpoint, mark_checkpoint

        if out is None and not in_place:
            raise ValueError("say where to write: --out FILE, or --in-place to replace the file itself")
        written = mark_checkpoint(path, v_pred=v_pred, ztsnr=ztsnr, swarm=swarm, out=out, in_place=in_place)
        report = inspect_checkpoint(written)
    click.echo(f"Wrote {written}.")
    _say_who_misreads_it(report)


@main.command()
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

        from .checkpoints import export_lora, inspect_checkpoint, to_folder, to_single_file

        number = None if dtype is None else getattr(torch, dtype)
        is_lora = (source / "adapter_config.json").is_file()
        to_a_folder = {"--config": config, "--prediction": prediction, "--zero-snr": zero_snr}
        given = {"--base": base, "--model": model} | to_a_folder
        fitting = {"--model"} if is_lora else {"--base"} if source.is_dir() else set(to_a_folder)
        if wrong := [name for name, value in given.items() if value is not None and name not in fitting]:
            raise ValueError(f"{', '.join(wrong)} does nothing for {source}: it is for another kind of conversion")
        if is_lora:
            if model is None:
                raise ValueError(f"{source} is a LoRA: say by --model which diffusers folder it was trained on")
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


def _bucket_options(command: Callable) -> Callable:
    """Which buckets there are, and which pictures are taken."""
    options = (
        click.option(
            "--buckets",
            "names",
            multiple=True,
            metavar="NAME|SIZES",
            help="sdxl, novelai, or sizes such as 1024x1024,832x1216.  [default: sdxl]",
        ),
        click.option(
            "--area",
            "areas",
            multiple=True,
            metavar="WxH",
            help="Buckets of that area, made as those of sdxl are.  Repeat it, or give --buckets too, to have several "
            "resolutions.",
        ),
        click.option(
            "--step", type=click.IntRange(1), default=64, show_default=True, help="Every side is a multiple of it."
        ),
        click.option(
            "--limit", type=click.IntRange(1), default=2048, show_default=True, help="Longest side of sdxl and --area."
        ),
        click.option(
            "--batch",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Pictures of a step, of all GPUs together.",
        ),
        click.option(
            "--max-aspect-error",
            type=click.FloatRange(0),
            default=math.log(2),
            show_default="log 2, where half a picture is cut off",
            help="Leave out what is further from its bucket, |log(w/h) - log(W/H)|.",
        ),
        click.option("--min-size", type=click.IntRange(0), default=0, help="Leave out pictures with a shorter side."),
        click.option("--no-upscale", is_flag=True, help="Leave out pictures that would be enlarged."),
        click.option("--outside", is_flag=True, help="A list may name pictures outside of the folder that it is in."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _bucket_sets(names: tuple[str, ...], areas: tuple[str, ...], step: int, limit: int) -> list[list[tuple[int, int]]]:
    from .training.bucket_report import bucket_sets

    return bucket_sets(names or ("sdxl",) * (not areas), areas, step, limit)


@main.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="DIR")
@_bucket_options
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    default=Path("ztsnr_buckets"),
    show_default=True,
    help="For the plot, the numbers and the list of pictures left out.",
)
def buckets(
    source: Path,
    names: tuple[str, ...],
    areas: tuple[str, ...],
    step: int,
    limit: int,
    batch: int,
    max_aspect_error: float,
    min_size: int,
    no_upscale: bool,
    outside: bool,
    out: Path,
) -> None:
    """Which aspect-ratio buckets the pictures of a folder go to.

    DIR may also be a .jsonl, .parquet or .tar file.  Prints the pictures of each bucket, how well they fit it, and who
    is left out and why.
    """
    with mistakes_in_one_sentence():
        from .training.bucket_report import run_buckets

        run_buckets(
            source,
            out,
            _bucket_sets(names, areas, step, limit),
            batch_size=batch,
            max_aspect_error=max_aspect_error,
            minimum_size=min_size,
            no_upscale=no_upscale,
            outside=outside,
            say=click.echo,
        )


@main.command()
@click.argument("sources", nargs=-1, required=True, metavar="[NAME=]SOURCE...")
@click.option("--vae", required=True, metavar="MODEL", help="A diffusers folder or .safetensors file that has the VAE.")
@click.option("--config", help="For a single file: a diffusers folder or hub name whose settings complete it.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    default=Path("ztsnr_latents"),
    show_default=True,
    help="For the cache; what is finished of it is kept.",
)
@_bucket_options
@click.option(
    "--margin",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Pixels by which pictures are cached larger than their bucket, if they are so large.",
)
@click.option("--background", default="white", show_default=True, help="Colour behind transparent pixels.")
@click.option("--device", default="auto", show_default=True, help="auto takes CUDA, XPU or MPS if there is one.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="That the VAE runs in; SDXL's overflows in float16.",
)
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True, help="Processes that open pictures.")
@click.option("--verify", is_flag=True, help="In the end, read all shards again and compare their checksums.")
def cache(
    sources: tuple[str, ...],
    vae: str,
    config: str | None,
    out: Path,
    names: tuple[str, ...],
    areas: tuple[str, ...],
    step: int,
    limit: int,
    batch: int,
    max_aspect_error: float,
    min_size: int,
    no_upscale: bool,
    outside: bool,
    margin: int,
    background: str,
    device: str,
    dtype: str,
    workers: int,
    verify: bool,
) -> None:
    """Encode pictures once, to train from their latents.

    SOURCE is a folder, .jsonl, .parquet or .tar file; captions are not needed.  Give the sources in the order and with
    the names that training has them.  Pictures are not mirrored, because mirrored latents are not those of a mirrored
    picture.  A run that was stopped goes on when it is started again.  On several GPUs: torchrun --nproc-per-node 8
    --no-python ztsnr cache ...
    """
    with mistakes_in_one_sentence():
        import torch
        from PIL.ImageColor import getrgb

        from .training.make_latent_cache import run_cache
        from .training.sources import parse_source

        place = _find_device(device)
        run_cache(
            [parse_source(source, outside=outside) for source in sources],
            out,
            _bucket_sets(names, areas, step, limit),
            vae=vae,
            config=config,
            device=place,
            dtype=getattr(torch, dtype),
            margin=margin,
            background=getrgb(background)[:3],
            workers=workers,
            rank=int(os.environ.get("RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            verify=verify,
            batch_size=batch,
            max_aspect_error=max_aspect_error,
            minimum_size=min_size,
            no_upscale=no_upscale,
            say=click.echo,
        )


def _find_device(name: str) -> "torch.device":
    """The device of ``--device``, for torchrun's processes one each; says which one auto took."""
    from .samplers.devices import describe_device, find_device

    device = find_device(name, setting="--device", local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    if name == "auto":
        click.echo(f"Device: {describe_device(device)}", err=True)  # standard output may be read by a program
    return device


def _settings_command(command: Callable) -> Callable:
    """A command that reads a TOML file and takes every setting in it as an option too."""
    return main.command(context_settings={"ignore_unknown_options": True})(
        click.argument("settings", type=click.Path(path_type=Path), metavar="SETTINGS.toml")(
            click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--SETTING VALUE]...")(command)
        )
    )


@_settings_command
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="never",
    show_default=True,
    help="auto goes on from the last state in the run's folder, if there is one.",
)
@click.option(
    "--dry-run", is_flag=True, help="Read the data and the model, plan the memory, print the tables; no more."
)
@click.option("--list-settings", is_flag=True, help="Print every setting, what it means and what it is, and stop.")
def finetune(settings: Path, overrides: tuple[str, ...], resume: str, dry_run: bool, list_settings: bool) -> None:
    """Fine-tune a model: zero terminal SNR and v-prediction, from whatever it was.

    Every setting of the file can be given here as well, as in --optimizer.learning-rate 1e-6.  On several GPUs:
    torchrun --nproc-per-node 8 --no-python ztsnr finetune SETTINGS.toml
    """
    with mistakes_in_one_sentence():
        from .training.config import FinetuneSettings
        from .training.settings_file import read_settings

        program = "ztsnr finetune SETTINGS.toml"
        chosen = read_settings(FinetuneSettings, settings, [*overrides, *["--help"] * list_settings], program)

        from .training.trainer import run_finetune

        run_finetune(chosen, resume=resume == "auto", dry_run=dry_run, say=click.echo)


@_settings_command
@click.option("--list-settings", is_flag=True, help="Print every setting, what it means and what it is, and stop.")
def finetune_vae(settings: Path, overrides: tuple[str, ...], list_settings: bool) -> None:
    """Fine-tune the decoder of a VAE, so that eyes and other small things come out right.

    The encoder stays, bit for bit, and so do latents, caches and U-Nets.  Every setting of the file can be given here
    as well, as in --steps 1000.
    """
    with mistakes_in_one_sentence():
        from .training.settings_file import read_settings
        from .training.vae_settings import VaeDecoderSettings

        program = "ztsnr finetune-vae SETTINGS.toml"
        chosen = read_settings(VaeDecoderSettings, settings, [*overrides, *["--help"] * list_settings], program)

        from .training.vae_decoder import run_finetune_vae

        run_finetune_vae(chosen, say=click.echo)


def _say_who_misreads_it(report: "CheckpointReport") -> None:
    for row in report.programs:
        if row.right is False:
            click.echo(f"Not read right by {row}")


@contextmanager
def mistakes_in_one_sentence() -> Iterator[None]:
    """What the user can mend ends the command with a sentence and status 2, as every other wrong argument does.

    So does a library of an extra that is not installed, or a torchvision that does not fit torch.

    Of several processes the first one says what all of them meet, and with it torchrun ends the others.  What another
    one meets alone, such as too many broken pictures among its own, that one says, if it is still there after a while.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError):
            sentence = str(error)
        elif (sentence := explain(click.get_current_context().command_path, error)) is None:
            raise
        if rank := int(os.environ.get("RANK", 0)):
            time.sleep(PATIENCE)
            sentence = f"process {rank}: {sentence}"
        mistake = click.ClickException(sentence)
        mistake.exit_code = 2
        raise mistake from None
