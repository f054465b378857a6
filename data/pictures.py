"""From the bytes of a picture file to the pixels of a bucket.

A picture is opened (upright, sRGB, opaque), resized so that it covers its bucket, mirrored if wanted and cropped.

It is resized by a Lanczos filter with antialiasing, on the sRGB values as they are and not in linear light: so were the
pictures that Stable Diffusion and SDXL learned from, and so are those that people compare with.  Linear light would
make dark lines on white thinner and bright lines on black thicker.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.ExifTags import Base as Tag
from PIL.ImageColor import getrgb

from ..canvas import Size
from ..errors import UserError
from ..files import special_kind

Color = tuple[int, int, int]

WHITE = (255, 255, 255)
MAX_PIXELS = 1024**3 // 4 // 3  # a quarter of a GiB as RGB: where Pillow, too, begins to suspect a decompression bomb
# A JPEG decoded smaller is still so many times larger than wanted.  That changes a resized picture less (PSNR of 45 dB
# or more where the spectrum is 1/f) than a bilinear filter in place of Lanczos would.
DRAFT_MARGIN = 2

Image.init()
FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN]
# What Pillow raises for a picture that is damaged, or of a kind that it reads only in part.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# what cameras and scanners call a picture, whether it can be opened here or not
SUFFIXES = (frozenset(Image.registered_extensions()) | {".avif", ".heic", ".heif", ".jxl"}) - {
    *(".pdf", ".ps", ".mpg", ".mpeg"),  # documents and films, which Pillow writes or names
    *(".h5", ".hdf", ".grib", ".bufr", ".fit", ".fits"),  # tables of measurements
}

# EXIF orientation -> what makes the picture upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = (5, 6, 7, 8)


class PictureError(UserError):
    """This picture cannot be used; the message says why in a sentence about "it"."""


class MicroConditioning(NamedTuple):
    """What SDXL is told about the making of a picture (arXiv 2307.01952, section 2.2).

    In its order: the six numbers of ``add_time_ids`` are the three pairs one after another.

    Attributes:
        original_size: (height, width) of the upright picture, before resizing.
        crop_top_left: (top, left) of the crop, in pixels of the resized, and if so mirrored, picture.
        target_size: (height, width) of the crop, which is the bucket's.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def open_picture(data: bytes, background: Color = WHITE, *, at_least: Size | None = None) -> Image.Image:
    """Decode a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF (the last where Pillow has it) as one would see it.

    Upright by its EXIF orientation; the first frame of an animation, the first page of a TIFF; an embedded ICC profile
    is converted to sRGB, or ignored if it is broken; what is transparent shows the background; of 16 bits the upper 8
    are taken.  Nothing else that a file says about its colours is looked at, such as the gamma of a PNG.

    Args:
        data: the file.
        background: sRGB colour, 0 to 255 each, behind transparent pixels.
        at_least: (width, height) that the upright picture will be resized to.  A JPEG of more than
            2 * DRAFT_MARGIN times that size is decoded at a half, a quarter or an eighth of its size, which is faster.

    Returns:
        A picture of mode RGB.

    Raises:
        PictureError: it is empty, cut short, damaged, too large (MAX_PIXELS), of another format or no picture.  Pillow
            does not notice all damage inside a JPEG.
    """
    with _refusing(), _opened(BytesIO(data)) as image:
        orientation = _orientation(image)
        if at_least is not None:
            width, height = at_least[::-1] if orientation in LYING else at_least
            image.draft(None, (DRAFT_MARGIN * width, DRAFT_MARGIN * height))
        image.load()
        picture = _over(background, _eight_bits(image))
        if orientation in TURNS and image.format != "TIFF":  # those are turned by Pillow
            picture = picture.transpose(TURNS[orientation])
        return picture


def picture_size(file: str | Path | bytes) -> Size:
    """(width, height) of the upright picture, read from its header alone.

    Args:
        file: the file's path or its content.

    Raises:
        PictureError: as in ``open_picture``, as far as the header tells; or the file cannot be read.
    """
    with _refusing(), _stream(file) as stream, _opened(stream) as image:
        size = image.size
        if image.format == "TIFF":  # newer Pillows have turned the size already, older ones not
            size = image.tag_v2[Tag.ImageWidth], image.tag_v2[Tag.ImageLength]
        return size[::-1] if _orientation(image) in LYING else size


@contextmanager
def _refusing() -> Iterator[None]:
    """A damaged file makes Pillow raise nearly anything; all of it means that the picture cannot be used."""
    try:
        yield
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"it is no picture, or damaged, or of a format other than {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise PictureError(f"it has more pixels than the {MAX_PIXELS} allowed") from None
    except DAMAGED as error:
        raise PictureError(f"it cannot be decoded: {error or type(error).__name__}") from error


def _stream(file: str | Path | bytes) -> BinaryIO:
    if isinstance(file, bytes):
        return BytesIO(file)
    try:
        check_plain(file)
        return open(file, "rb")
    except OSError as error:
        raise PictureError(f"it cannot be read: {error.strerror or error}") from None


def check_plain(path: str | Path) -> None:
    """Refuse what is not a file on a disk: opening a FIFO waits for a writer, and a device may have no end.

    Raises:
        PictureError: it is a FIFO, a socket or a device.
        OSError: there is nothing of that name.
    """
    if kind := special_kind(path):
        raise PictureError(f"it is a {kind} and not a file")


@contextmanager
def _opened(stream: BinaryIO) -> Iterator[Image.Image]:
    """The picture, not yet decoded."""
    if not stream.read(1):
        raise PictureError("it is empty")
    stream.seek(0)
    with Image.open(stream, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise PictureError(f"it has {image.width} x {image.height} pixels, more than the {MAX_PIXELS} allowed")
        yield image


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 if there is none or it is damaged; for a PNG only what comes before its pixels is looked at."""
    try:
        # not image.getexif(), which in a PNG decodes all pixels to get behind them
        return Image.Image.getexif(image).get(Tag.Orientation, 1)
    except DAMAGED:
        return 1


# ----------------------------------------------------------------------------------------------------------------------
# Colours


def parse_color(name: str, setting: str) -> Color:
    """Red, green and blue from 0 to 255 of a name such as "white", or of #rrggbb.

    Raises:
        UserError: it is neither; the sentence names the setting.
    """
    try:
        return getrgb(name)[:3]
    except ValueError:
        raise UserError(f"{setting} = {name!r} is not a colour: give a name or #rrggbb") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow reads most 16-bit pictures as 8-bit ones; grey ones it keeps, and would clip."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image)
        if image.format == "TIFF" and image.tag_v2.get(Tag.PhotometricInterpretation) == 0:  # white is 0
            values = 65535 - values  # which Pillow does for 8 bits only
        layers = [values >> 8]
        if "transparency" in image.info:
            layers.append(np.where(values == image.info["transparency"], 0, 255))
        grey = Image.merge("L" if len(layers) == 1 else "LA", [Image.fromarray(a.astype(np.uint8)) for a in layers])
        grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
        return grey
    if image.mode in ("I", "F"):
        raise PictureError("its pixels are 32-bit numbers, and it does not say which of them is white")
    return image


def _over(background: Color, image: Image.Image) -> Image.Image:
    """An sRGB picture, opaque."""
    profile = image.info.get("icc_profile")
    is_grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("LA" if is_grey else "RGBA")
        alpha = image.getchannel("A")
    else:
        alpha = None
    if image.mode != "CMYK":
        image = image.convert("L" if is_grey else "RGB")
    color = _to_srgb(image, profile)
    return color if alpha is None else Image.composite(color, Image.new("RGB", color.size, background), alpha)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture of mode L, RGB or CMYK in sRGB."""
    if profile:
        try:
            return ImageCms.applyTransform(image, _srgb_transform(profile, image.mode))
        except (ImageCms.PyCMSError, OSError):  # a broken profile, or one for another kind of picture
            pass
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=64)  # a data set has few profiles, and building a transform takes longer than using it
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Fitting into a bucket


def cover_scale(size: Size, bucket: Size) -> float:
    """How many times longer the sides get so that a picture just covers its bucket; above 1 it is upscaled.

    Args:
        size, bucket: (width, height) in pixels.
    """
    return max(bucket[0] / size[0], bucket[1] / size[1])


def cover_size(size: Size, bucket: Size) -> Size:
    """The smallest size of the picture's aspect ratio that covers the bucket.

    One side is the bucket's; the other is rounded to the nearest pixel (halves up), so the aspect ratio is that of the
    picture to half a pixel, and no side is shorter than the bucket's.

    Args:
        size, bucket: (width, height) in pixels.

    Returns:
        (width, height) in pixels.
    """
    (width, height), (bucket_width, bucket_height) = size, bucket
    if bucket_width * height >= bucket_height * width:  # narrower than the bucket
        return bucket_width, (2 * bucket_width * height + width) // (2 * width)
    return (2 * bucket_height * width + height) // (2 * height), bucket_height


def fit_picture(
    image: Image.Image,
    bucket: Size,
    generator: np.random.Generator,
    flip: bool = False,
    *,
    original_size: Size | None = None,
) -> tuple[np.ndarray, MicroConditioning]:
    """Resize a picture to cover its bucket, mirror it if wanted, and crop it at a random place.

    Args:
        image: upright, mode RGB.
        bucket: (width, height) in pixels.
        generator: of the place, each as likely as any other.
        flip: mirror left and right.
        original_size: (width, height) of the upright picture in its file (``picture_size``), for one that was opened
            with ``at_least`` and may be smaller.

    Returns:
        (3, height, width) uint8, contiguous, and what SDXL is told about it.

    Raises:
        PictureError: see ``resize_picture``.
    """
    original_size = image.size if original_size is None else original_size
    width, height = cover_size(original_size, bucket)
    pixels = np.asarray(resize_picture(image, (width, height), original_size))
    if flip:
        pixels = pixels[:, ::-1]
    left = int(generator.integers(width - bucket[0], endpoint=True))
    top = int(generator.integers(height - bucket[1], endpoint=True))
    crop = pixels[top : top + bucket[1], left : left + bucket[0]].transpose(2, 0, 1)
    return np.ascontiguousarray(crop), MicroConditioning(original_size[::-1], (top, left), bucket[::-1])


def resize_picture(image: Image.Image, size: Size, original_size: Size) -> Image.Image:
    """Resize by the Lanczos filter, with antialiasing.

    Args:
        image: upright, mode RGB; it may have been opened smaller, with ``at_least``.
        size: (width, height) in pixels.
        original_size: (width, height) of the upright picture in its file.

    Raises:
        PictureError: the picture is not of ``original_size``; or it would become larger than MAX_PIXELS, being a line.
    """
    if size[0] * size[1] > MAX_PIXELS:
        raise PictureError(f"resized it would have {size[0]} x {size[1]} pixels, more than the {MAX_PIXELS} allowed")
    shrunk = round(original_size[0] / image.width)
    if shrunk not in (1, 2, 4, 8) or image.size != tuple(math.ceil(side / shrunk) for side in original_size):
        raise PictureError(f"it has changed: it is no longer {original_size[0]} x {original_size[1]} pixels")
    # opened smaller, a picture may end within its last row and column of pixels
    box = (0, 0, original_size[0] / shrunk, original_size[1] / shrunk)
    return image.resize(size, Image.Resampling.LANCZOS, box)
