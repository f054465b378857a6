"""``ztsnr buckets`` and ``ztsnr cache``."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import click

from .mistakes import device_of, mistakes_in_one_sentence


def _bucket_options(command: Callable) -> Callable:
    """The options that choose buckets and pictures."""
    options = (
        click.option(
            "--buckets",
            "names",
            multiple=True,
            metavar="NAME|SIZES",
            help="Bucket set sdxl or novelai, or sizes such as 1024x1024,832x1216.  [default: sdxl]",
        ),
        click.option(
            "--area",
            "areas",
            multiple=True,
            metavar="WxH",
            help="Area to make buckets of, by the rule of sdxl.  Repeat it, or add --buckets, for several resolutions.",
        ),
        click.option(
            "--step",
            type=click.IntRange(1),
            default=64,
            show_default=True,
            help="Sides are multiples of this.",
        ),
        click.option(
            "--limit",
            type=click.IntRange(1),
            default=2048,
            show_default=True,
            help="Longest side, of sdxl and --area.",
        ),
        click.option(
            "--batch",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Pictures per step, over all GPUs.",
        ),
        click.option(
            "--max-aspect-error",
            type=click.FloatRange(0),
            default=math.log(2),
            show_default="log 2, where half a picture is cut off",
            help="Leave out pictures with a larger |log(w/h) - log(W/H)|.",
        ),
        click.option("--min-size", type=click.IntRange(0), default=0, help="Leave out pictures with a shorter side."),
        click.option("--no-upscale", is_flag=True, help="Leave out pictures that would be enlarged."),
        click.option("--outside", is_flag=True, help="Allow lists to name pictures outside their own folder."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _bucket_sets(names: tuple[str, ...], areas: tuple[str, ...], step: int, limit: int) -> list[list[tuple[int, int]]]:
    from ..data.bucket_report import bucket_sets

    return bucket_sets(names or ("sdxl",) * (not areas), areas, step, limit)


@click.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="DIR")
@_bucket_options
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    default=Path("ztsnr_buckets"),
    show_default=True,
    help="Folder for the plot, the numbers and the list of pictures left out.",
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
    """Show how pictures are distributed over aspect-ratio buckets.

    DIR is a folder, or a .jsonl, .parquet or .tar file.  Prints the number of pictures in each bucket, how well they
    fit, and which are left out and why.
    """
    with mistakes_in_one_sentence():
        from ..data.bucket_report import run_buckets

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


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="[NAME=]SOURCE...")
@click.option("--vae", required=True, metavar="MODEL", help="Diffusers folder or .safetensors file with the VAE.")
@click.option("--config", help="For a single file: diffusers folder or Hub name whose settings complete it.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    default=Path("ztsnr_latents"),
    show_default=True,
    help="Folder for the cache.  Finished shards in it are kept.",
)
@_bucket_options
@click.option(
    "--margin",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Pixels around the bucket to encode too, where the picture has them, so that crops can vary.",
)
@click.option("--background", default="white", show_default=True, help="Colour behind transparent pixels.")
@click.option("--device", default="auto", show_default=True, help="auto picks CUDA, XPU or MPS if available.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Dtype of the VAE.  SDXL's VAE overflows in float16.",
)
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True, help="Processes that open pictures.")
@click.option("--verify", is_flag=True, help="At the end, read all shards again and compare their checksums.")
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
    """Encode pictures to latents once, to train from them.

    SOURCE is a folder, .jsonl, .parquet or .tar file; captions are not needed.  Give the same sources in the same order
    and with the same names as in training.  Pictures are not mirrored, because mirrored latents are not the latents of
    a mirrored picture.  A stopped run resumes when it is started again.  On several GPUs: torchrun --nproc-per-node 8
    --no-python ztsnr cache ...
    """
    with mistakes_in_one_sentence("the same command continues with the shards that are missing"):
        import torch

        from ..data.make_latent_cache import run_cache
        from ..data.pictures import parse_color
        from ..data.sources import parse_source

        place = device_of(device)
        run_cache(
            [parse_source(source, outside=outside) for source in sources],
            out,
            _bucket_sets(names, areas, step, limit),
            vae=vae,
            config=config,
            device=place,
            dtype=getattr(torch, dtype),
            margin=margin,
            background=parse_color(background, "--background"),
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
