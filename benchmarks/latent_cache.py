"""How fast training is fed: latents from the cache, and pixels from picture files.

    python benchmarks/latent_cache.py [--folder FOLDER] [--seconds SECONDS] [--no-write]

Makes photograph-like JPEGs of 2048 x 2048 pixels in FOLDER, and a cache of their latents for a bucket of 1024 x 1024,
by a VAE that is SDXL's in all but its width.  Prints the table and puts it into benchmarks/RESULTS.md.
"""

import datetime
import tempfile
import time
from functools import partial
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
from diffusers import AutoencoderKL
from PIL import Image
from results import RESULTS, machine, markdown, write_section
from tqdm import tqdm

from ztsnr.data.dataset import Load, PictureDataset, load_picture, loader
from ztsnr.data.epoch_plan import EpochPlan
from ztsnr.data.latent_cache import LatentCache, load_latents
from ztsnr.data.make_latent_cache import cache_latents
from ztsnr.data.quarantine import Quarantine
from ztsnr.data.sources import PictureIndex, Source, build_index

BUCKET = (1024, 1024)
BATCH = 16
FILES = 32  # different pictures
CACHED = 256  # each of them several times
WORKERS = (0, 2)
GOAL = 100  # pictures a second, from the cache by one process


def make_jpegs(folder: Path) -> PictureIndex:
    """Noise whose spectrum falls as that of photographs does."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(2048)[:, None], np.fft.rfftfreq(2048))
    frequency[0, 0] = np.inf
    for i in tqdm(range(FILES), "pictures"):
        picture = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, 2048, 2048))) / frequency)
        picture = (128 + 50 * picture / picture.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{i}.jpg", quality=92)
    return build_index([Source(folder)], allow_missing_captions=True)[0]


def make_cache(folder: Path, index: PictureIndex) -> tuple[LatentCache, PictureIndex]:
    table = index.table.take(np.arange(CACHED) % FILES)
    index = PictureIndex(table.set_column(0, "key", pa.array([f"{i}.jpg" for i in range(CACHED)])))
    vae = AutoencoderKL(
        block_out_channels=(2,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=1,
        layers_per_block=1,
        mid_block_add_attention=False,
    ).eval()
    return cache_latents(folder, index, np.zeros(CACHED, int), [BUCKET], vae), index


def pictures_per_second(index: PictureIndex, load: Load, workers: int, seconds: float, place: Path) -> float:
    """Of the batches that training gets, captions and all; the workers have started and read ahead."""
    plan = EpochPlan(np.zeros(len(index), int), [BUCKET], batch_size=BATCH)
    batches = loader(PictureDataset(plan, index, load, Quarantine(place)), workers=workers)
    for _ in range(1 + 2 * workers):
        next(batches)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() < begin + seconds:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - begin)


@click.command(help=__doc__.split("\n")[0])
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="On the disk to read from; by default where temporary files go.",
)
@click.option("--seconds", type=click.FloatRange(min=1), default=20, show_default=True, help="Of each measurement.")
@click.option("--write/--no-write", default=True, show_default=True, help="Put the table into RESULTS.md.")
def main(folder: Path | None, seconds: float, write: bool) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        place = Path(place)
        (place / "pictures").mkdir()
        pictures = make_jpegs(place / "pictures")
        cache, cached = make_cache(place / "cache", pictures)
        ways = {
            "cached latents, sampled": (cached, partial(load_latents, cache=cache)),
            "cached latents, their mean": (cached, partial(load_latents, cache=cache, sample=False)),
            "pictures": (pictures, partial(load_picture, index=pictures)),
        }
        speeds = {
            name: [pictures_per_second(*way, workers, seconds, place / "quarantine") for workers in WORKERS]
            for name, way in ways.items()
        }
        sizes = {
            "cached": sum(path.stat().st_size for path in cache.folder.iterdir()) / CACHED,
            "files": sum(path.stat().st_size for path in (place / "pictures").iterdir()) / FILES,
        }
    reached = max(speeds["cached latents, sampled"]) >= GOAL
    rows = [[name, *(f"{speed:.0f}" for speed in found)] for name, found in speeds.items()]
    text = (
        f"`python benchmarks/{Path(__file__).name} --seconds {seconds:g}`, {datetime.date.today().isoformat()}.\n"
        f"{machine(None)}.\n\n"
        f"Pictures a second of {BUCKET[0]} x {BUCKET[1]} in batches of {BATCH}, all files being in the page cache: "
        f"latents with a margin of\n64 pixels ({sizes['cached'] / 1e3:.0f} kB each), and JPEGs of 2048 x 2048 "
        f"({sizes['files'] / 1e6:.1f} MB each). The goal of {GOAL} from the cache is\n"
        f"{'reached' if reached else 'missed'}.\n\n"
        f"{markdown([['from', *(f'{workers} workers' for workers in WORKERS)], *rows])}\n"
    )
    print(text)
    if write:
        write_section(RESULTS, "Training: latent cache", text)


if __name__ == "__main__":
    main()
