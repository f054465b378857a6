"""From the bytes of a picture file to the pixels of a bucket.

A picture is opened (upright, sRGB, opaque), resized so that it covers its bucket, mirrored if wanted and cropped.

Resizing uses a Lanczos filter with antialiasing on the sRGB values, not in linear light, because the pictures that
Stable Diffusion and SDXL learned from were resized this way, and so are those that people compare with.  Linear light
would make dark lines on white thinner and bright lines on black thicker.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.ExifTags import Base as Tag
from PIL.ImageColor import getrgb
from PIL.TiffImagePlugin import TiffImageFile

from ..canvas import Size
from ..errors import UserError
from ..files import special_kind

Color = tuple[int, int, int]

WHITE = (255, 255, 255)
MAX_PIXELS = 1024**3 // 4 // 3  # a quarter of a GiB as RGB, where Pillow also starts to suspect a decompression bomb
# A JPEG that is decoded at a reduced size is still this many times larger than its final size.  That changes a resized
# picture less (PSNR of 45 dB or more for a 1/f spectrum) than replacing Lanczos by a bilinear filter would.
DRAFT_MARGIN = 2

Image.init()
FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN]
# What Pillow raises for a damaged picture, or for a format that it supports only in part.
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
# file endings of pictures, whether they can be opened here or not
SUFFIXES = (frozenset(Image.registered_extensions()) | {".avif", ".heic", ".heif", ".jxl"}) - {
    *(".pdf", ".ps", ".mpg", ".mpeg"),  # documents and films, which Pillow writes or names
    *(".h5", ".hdf", ".grib", ".bufr", ".fit", ".fits"),  # tables of measurements
}

# EXIF orientation -> the operation that makes the picture upright
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
    """A picture cannot be used.  The message says why, in a sentence whose subject "it" is the picture."""


class MicroConditioning(NamedTuple):
    """SDXL's micro-conditioning: how a training picture was resized and cropped (arXiv 2307.01952, section 2.2).

    The three pairs in this order are the six numbers of ``add_time_ids``.

    Attributes:
        original_size: (height, width) of the upright picture, before resizing.
        crop_top_left: (top, left) of the crop, in pixels of the picture after resizing and mirroring.
        target_size: (height, width) of the crop, which is the size of the bucket.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]


def height_first(size: Size) -> tuple[int, int]:
    """(height, width) of (width, height), and the other way round."""
    return size[1], size[0]


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def open_picture(data: bytes, background: Color = WHITE, *, at_least: Size | None = None) -> Image.Image:
    """Decode a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF (if Pillow supports it) as a viewer would show it.

    The picture is turned upright by its EXIF orientation.  Of an animation the first frame is used, of a TIFF the first
    page, of 16-bit values the upper 8 bits.  Colours with an embedded ICC profile are converted to sRGB; a broken
    profile is ignored, and so is other colour information such as the gamma of a PNG.  Transparent pixels show the
    background.

    Args:
        data: content of the file.
        background: sRGB colour, 0 to 255 each, behind transparent pixels.
        at_least: (width, height) that the upright picture will be resized to.  A JPEG of more than
            2 * DRAFT_MARGIN times that size is decoded at 1/2, 1/4 or 1/8 of its size, which is faster.

    Returns:
        A picture of mode RGB.

    Raises:
        PictureError: the file is empty, truncated, damaged, too large (MAX_PIXELS), or not a picture in one of these
            formats.  Pillow does not notice all damage inside a JPEG.
    """
    with _refusing(), _opened(BytesIO(data)) as image:
        orientation = _orientation(image)
        if at_least is not None:
            width, height = height_first(at_least) if orientation in LYING else at_least
            image.draft(None, (DRAFT_MARGIN * width, DRAFT_MARGIN * height))
        image.load()
        picture = _over(background, _eight_bits(image))
        if orientation in TURNS and image.format != "TIFF":  # Pillow has turned TIFFs already
            picture = picture.transpose(TURNS[orientation])
        return picture


def picture_size(file: str | Path | bytes) -> Size:
    """(width, height) of the upright picture, read from its header alone.

    Args:
        file: the file's path or its content.

    Raises:
        PictureError: the file cannot be read, or its header shows an error of ``open_picture``.
    """
    with _refusing(), _stream(file) as stream, _opened(stream) as image:
        size = image.size
        if isinstance(image, TiffImageFile):  # newer Pillows have turned the size already, older ones not
            size = image.tag_v2[Tag.ImageWidth], image.tag_v2[Tag.ImageLength]
        return height_first(size) if _orientation(image) in LYING else size


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn whatever Pillow raises for a damaged file into a PictureError."""
    try:
        yield
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"it is damaged, or is not a picture in one of the formats {', '.join(FORMATS)}") from None
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
    """The EXIF orientation; 1 if it is missing or damaged.  In a PNG only what precedes the pixels is searched."""
    try:
        # not image.getexif(), which in a PNG decodes all pixels to get behind them
        return Image.Image.getexif(image).get(Tag.Orientation, 1)
    except DAMAGED:
        return 1


# ----------------------------------------------------------------------------------------------------------------------
# Colours


def parse_color(name: str, setting: str) -> Color:
    """Red, green and blue, 0 to 255, of a colour given by name, such as "white", or as #rrggbb.

    Raises:
        UserError: the colour is neither; the message names the setting.
    """
    try:
        return getrgb(name)[:3]
    except ValueError:
        raise UserError(f"{setting} = {name!r} is not a colour: give a name or #rrggbb") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Reduce 16-bit grey to 8 bits.  Pillow does this for other 16-bit pictures, but would clip the grey ones."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image)
        if isinstance(image, TiffImageFile) and image.tag_v2.get(Tag.PhotometricInterpretation) == 0:  # white is 0
            values = 65535 - values  # Pillow inverts only 8-bit pictures
        layers = [values >> 8]
        if "transparency" in image.info:
            layers.append(np.where(values == image.info["transparency"], 0, 255))
        grey = Image.merge("L" if len(layers) == 1 else "LA", [Image.fromarray(a.astype(np.uint8)) for a in layers])
        grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
        return grey
    if image.mode in ("I", "F"):
        raise PictureError("its pixels are 32-bit numbers, and nothing says which value is white")
    return image


def _over(background: Color, image: Image.Image) -> Image.Image:
    """The picture in sRGB, with the background behind its transparent pixels."""
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
    """Convert a picture of mode L, RGB or CMYK to sRGB."""
    if profile:
        try:
            changed = ImageCms.applyTransform(image, _srgb_transform(profile, image.mode))
            return cast(Image.Image, changed)  # None only for a change in place
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


def cover_size(size: Size, bucket: Size) -> Size:
    """The smallest size of the picture's aspect ratio that covers the bucket.

    One side equals the bucket's.  The other is rounded to the nearest pixel (halves up), so the aspect ratio is kept to
    half a pixel, and no side is shorter than the bucket's.

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
    """Resize a picture to cover its bucket, optionally mirror it, and crop it at a random place.

    Args:
        image: upright, mode RGB.
        bucket: (width, height) in pixels.
        generator: chooses the place, uniformly.
        flip: mirror left and right.
        original_size: (width, height) of the upright picture in its file (``picture_size``).  Needed if the picture was
            opened with ``at_least``, which may have made it smaller.

    Returns:
        (3, height, width) uint8, contiguous, and the micro-conditioning.

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
    return np.ascontiguousarray(crop), MicroConditioning(height_first(original_size), (top, left), height_first(bucket))


def resize_picture(image: Image.Image, size: Size, original_size: Size) -> Image.Image:
    """Resize by the Lanczos filter, with antialiasing.

    Args:
        image: upright, mode RGB; it may have been opened smaller, with ``at_least``.
        size: (width, height) in pixels.
        original_size: (width, height) of the upright picture in its file.

    Raises:
        PictureError: the picture does not have ``original_size``, or is so elongated that it would exceed MAX_PIXELS.
    """
    if size[0] * size[1] > MAX_PIXELS:
        raise PictureError(f"it would be resized to {size[0]} x {size[1]} pixels, more than the {MAX_PIXELS} allowed")
    shrunk = round(original_size[0] / image.width)
    if shrunk not in (1, 2, 4, 8) or image.size != tuple(math.ceil(side / shrunk) for side in original_size):
        raise PictureError(f"it has changed: it was {original_size[0]} x {original_size[1]} pixels when it was indexed")
    # in a picture opened at a reduced size, the last row and column may be only partly covered
    box = (0, 0, original_size[0] / shrunk, original_size[1] / shrunk)
    return image.resize(size, Image.Resampling.LANCZOS, box)
