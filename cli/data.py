"""``ztsnr buckets`` and ``ztsnr cache``."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import click

from .mistakes import device_of, mistakes_in_one_sentence


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
