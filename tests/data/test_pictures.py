"""Picture files of every kind, made here, come out as one would see them, or are refused in a sentence."""

import struct
import zlib
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ztsnr.data.keyed_random import CROP, keyed_generator
from ztsnr.data.pictures import (
    FORMATS,
    MAX_PIXELS,
    MicroConditioning,
    PictureError,
    cover_size,
    fit_picture,
    open_picture,
    picture_size,
)

LOSSLESS = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}, "JPEG": {"quality": 95}}
TOLERANCE = {"JPEG": 6, "AVIF": 3, "GIF": 40}  # greatest error of a smooth picture; 0 for the others


def scene(width=48, height=32):
    """A smooth picture without any symmetry, (H, W, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    layers = [x * 200 / width, y * 220 / height + 20, 90 + 60 * np.sin(x / 20) * np.cos(y / 25)]
    return np.stack(layers, -1).round().astype(np.uint8)


def encode(image, format, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = BytesIO()
    image.save(file, format, **LOSSLESS.get(format, {}) | options)
    return file.getvalue()


def pixels_of(data, **options):
    picture = open_picture(data, **options)
    assert picture.mode == "RGB"
    if "at_least" not in options:
        assert picture.size == picture_size(data)
    return np.asarray(picture).astype(int)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(values, color_type, extra=b"", size=None, behind=b""):
    """A PNG written by hand, (H, W, channels) uint8 or uint16."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)
    header = struct.pack(">IIBBBBB", *(size or (width, height)), 8 * values.itemsize, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + behind + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ----------------------------------------------------------------------------------------------------------------------
# Formats


def test_avif_is_read_where_pillow_has_it():
    assert set(FORMATS) - {"AVIF"} == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"}
    assert ("AVIF" in FORMATS) == ("AVIF" in Image.SAVE)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format):
    error = np.abs(pixels_of(encode(scene(), format)) - scene())
    assert error.max() <= TOLERANCE.get(format, 0)


def stored(upright, orientation):
    """How the EXIF standard stores a picture: what its row 0 and its column 0 are."""
    row_0, column_0 = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    flipped = upright[:: -1 if "bottom" in (row_0, column_0) else 1, :: -1 if "right" in (row_0, column_0) else 1]
    return flipped.swapaxes(0, 1) if row_0 in ("left", "right") else flipped


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("BMP", "GIF")])
def test_every_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encode(np.ascontiguousarray(stored(scene(), orientation)), format, exif=exif.tobytes())
    pixels = pixels_of(data)
    assert pixels.shape == scene().shape
    assert np.abs(pixels - scene()).max() <= TOLERANCE.get(format, 0)
    assert picture_size(data) == (48, 32)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0rubbish" * 3])
def test_damaged_exif_turns_nothing(exif):
    assert (pixels_of(encode(scene(), "PNG", exif=exif)) == scene()).all()


def test_size_and_pixels_agree_on_exif_behind_the_pixels():
    """Whatever one makes of it, they must: the bucket comes from the size."""
    exif = Image.Exif()
    exif[0x112] = 6
    data = png(scene(), 2, behind=chunk(b"eXIf", exif.tobytes()[6:]))
    assert picture_size(data) == open_picture(data).size == (48, 32)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_first_frame_of_an_animation(format):
    if format not in FORMATS:
        pytest.skip("this Pillow has no AVIF")
    first, second = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    data = encode(first, format, save_all=True, append_images=[second])
    assert Image.open(BytesIO(data)).n_frames == 2
    assert np.abs(pixels_of(data) - [255, 0, 0]).max() <= 3


# ----------------------------------------------------------------------------------------------------------------------
# Colours


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    """Ink on paper; in a JPEG Adobe's programs, and so all others, store it inverted."""
    inks = np.zeros((16, 64, 4), np.uint8)
    inks[:, 16:32, 0] = 255  # cyan
    inks[:, 32:48, 3] = 128  # grey
    inks[:, 48:] = 60, 120, 180, 40
    data = encode(Image.fromarray(inks, mode="CMYK"), format)
    if format == "JPEG":
        assert b"Adobe" in data
        assert np.asarray(Image.open(BytesIO(data)))[8, 8].max() < 8  # no ink
    light = 255 - inks.astype(float)
    expected = light[..., :3] * light[..., 3:] / 255
    assert np.abs(pixels_of(data) - expected)[:, 4:-4].mean() < 3
    assert np.abs(pixels_of(data)[8, [8, 24, 40, 56]] - expected[8, [8, 24, 40, 56]]).max() <= 5


def steps_of_16_bits(channels):
    return np.linspace(0, 65535, 64 * channels).round().astype(np.uint16).reshape(8, 8, channels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF"])
def test_grey_of_16_bits_is_scaled_and_not_clipped(kind):
    values = steps_of_16_bits(1)[..., 0]
    image = Image.fromarray(values.astype(">u2")) if kind == "big-endian TIFF" else Image.fromarray(values)
    pixels = pixels_of(encode(image, kind.split()[-1]))
    assert np.abs(pixels - values[..., None] / 257).max() < 1
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[-1, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("type", "white"), [("u1", 255), ("<u2", 65535)])
def test_tiff_in_which_white_is_0(type, white):
    values = (steps_of_16_bits(1)[..., 0] // (65535 // white)).astype(type)
    data = encode(values, "TIFF")
    order = "<" if data.startswith(b"II") else ">"
    black_is_0, white_is_0 = (struct.pack(f"{order}HHIHH", 262, 3, 1, number, 0) for number in (1, 0))
    assert data.count(black_is_0) == 1
    pixels = pixels_of(data.replace(black_is_0, white_is_0))
    assert np.abs(255 - pixels - values[..., None] * (255 / white)).max() < 1


def test_16_bits_of_the_other_kinds():
    values = steps_of_16_bits(3)
    assert np.abs(pixels_of(png(values, 2)) - values / 257).max() < 1
    for color_type, channels in ((4, 2), (6, 4)):
        values = steps_of_16_bits(channels)
        color, alpha = values[..., :-1] / 257, values[..., -1:] / 65535
        pixels = pixels_of(png(values, color_type), background=(10, 20, 30))
        assert np.abs(pixels - (alpha * color + (1 - alpha) * np.array([10, 20, 30]))).max() < 2.1


def test_transparent_grey_of_16_bits():
    values = np.array([[[0], [1000], [65535]]], np.uint16)
    data = png(values, 0, chunk(b"tRNS", struct.pack(">H", 1000)))
    assert pixels_of(data, background=(1, 2, 3)).tolist() == [[[0] * 3, [1, 2, 3], [255] * 3]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_one_bit(format):
    bits = np.arange(64).reshape(8, 8) % 3 == 0
    assert (pixels_of(encode(Image.fromarray(bits), format)) == 255 * bits[..., None]).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "GIF", "JPEG", "WEBP"])
def test_grey(format):
    grey = scene()[..., 0]
    error = np.abs(pixels_of(encode(Image.fromarray(grey), format)) - grey[..., None])
    assert error.max() <= {"JPEG": 3}.get(format, 0)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "GIF"])
def test_palette(format):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4, mode="P")
    palette = [(200, 10, 20), (30, 220, 40), (50, 60, 250), (7, 8, 9)]
    image.putpalette([value for color in palette for value in color])
    assert (pixels_of(encode(image, format)) == np.array(palette)[np.asarray(image)]).all()
    if format in ("PNG", "GIF"):
        palette[2] = (1, 2, 3)  # the background
        pixels = pixels_of(encode(image, format, transparency=2), background=(1, 2, 3))
        assert (pixels == np.array(palette)[np.asarray(image)]).all()


def test_palette_of_many_transparencies():
    image = Image.fromarray(np.arange(4, dtype=np.uint8)[None], mode="P")
    image.putpalette([200, 10, 20] * 4)
    pixels = pixels_of(encode(image, "PNG", transparency=bytes([0, 51, 204, 255])), background=(0, 110, 220))
    alpha = np.array([0, 0.2, 0.8, 1])[:, None]
    assert np.abs(pixels[0] - (alpha * [200, 10, 20] + (1 - alpha) * [0, 110, 220])).max() <= 0.5


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 128, 250)])
def test_alpha_shows_the_background(format, background):
    """Straight alpha: all of the background and none of the hidden colour where it is 0."""
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., 0], rgba[..., 1], rgba[..., 3] = 250, 30, np.arange(256).reshape(16, 16)
    alpha = rgba[..., 3:] / 255
    expected = alpha * rgba[..., :3] + (1 - alpha) * np.array(background)
    pixels = pixels_of(encode(rgba, format, **({"exact": True} if format == "WEBP" else {})), background=background)
    assert np.abs(pixels - expected).max() <= 0.51
    assert (pixels[0, 0] == background).all()


def test_premultiplied_alpha():
    """A TIFF may hold colours that are multiplied by their alpha already; they are not multiplied twice."""
    rgba = np.full((4, 4, 4), 100, np.uint8)
    rgba[..., 3] = 128  # so the colour is 199
    straight = encode(rgba, "TIFF")
    associated = straight.replace(struct.pack("<HHII", 338, 3, 1, 2), struct.pack("<HHII", 338, 3, 1, 1))
    assert associated != straight
    assert np.abs(pixels_of(straight, background=(0, 0, 0)) - 50).max() <= 1
    assert np.abs(pixels_of(associated, background=(0, 0, 0)) - 100).max() <= 1
    assert np.abs(pixels_of(associated, background=(255, 255, 255)) - 227).max() <= 1


def test_grey_and_alpha():
    la = np.stack(np.meshgrid([0, 255, 100], [0, 255, 102]), -1).astype(np.uint8)
    pixels = pixels_of(encode(Image.fromarray(la, mode="LA"), "PNG"), background=(50, 150, 250))
    alpha = la[..., 1:] / 255
    assert np.abs(pixels - (alpha * la[..., :1] + (1 - alpha) * np.array([50, 150, 250]))).max() <= 0.5


def test_transparent_color_of_rgb_and_grey():
    rgb = png(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8), 2, chunk(b"tRNS", struct.pack(">3H", 9, 9, 9)))
    assert pixels_of(rgb, background=(70, 80, 90)).tolist() == [[[1, 2, 3], [70, 80, 90]]]
    grey = png(np.array([[[4], [9]]], np.uint8), 0, chunk(b"tRNS", struct.pack(">H", 9)))
    assert pixels_of(grey, background=(70, 80, 90)).tolist() == [[[4, 4, 4], [70, 80, 90]]]


# ----------------------------------------------------------------------------------------------------------------------
# ICC profiles, written by hand after ICC.1:2001-04

D50 = (0.9642, 1.0, 0.8249)
DISPLAY_P3 = {"r": (0.51512, 0.24120, -0.00105), "g": (0.29198, 0.69225, 0.04189), "b": (0.15710, 0.06657, 0.78407)}
XYZ_TO_SRGB = np.array(  # from D50, brucelindbloom.com
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
)


def fixed(*numbers):
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))


def icc_profile(space, tags, kind=b"mntr", connection=b"XYZ "):
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50), **tags}
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"", 0x02100000, kind, space, connection)
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + fixed(*D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def gamma_curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(gamma=2.2):
    columns = {f"{c}XYZ".encode(): b"XYZ \0\0\0\0" + fixed(*xyz) for c, xyz in DISPLAY_P3.items()}
    return icc_profile(b"RGB ", columns | {f"{c}TRC".encode(): gamma_curve(gamma) for c in "rgb"})


def srgb(linear):
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG", "AVIF"])
def test_rgb_profile(format):
    if format not in FORMATS:
        pytest.skip("this Pillow has no AVIF")
    linear = (scene() / 255) ** 2.2
    expected = srgb(linear @ np.array(list(DISPLAY_P3.values())) @ XYZ_TO_SRGB.T)
    assert np.abs(expected - scene()).max() > 20
    pixels = pixels_of(encode(scene(), format, icc_profile=rgb_profile()))
    assert np.abs(pixels - expected).mean() < (2 if format in ("JPEG", "AVIF") else 0.6)
    if format not in ("JPEG", "AVIF"):
        assert np.abs(pixels - expected)[scene().min(-1) > 40].max() <= 1.5


def test_profile_of_a_transparent_picture_spares_the_background():
    rgba = np.concatenate([scene(), np.full((32, 48, 1), 128, np.uint8)], -1)
    opaque = pixels_of(encode(scene(), "PNG", icc_profile=rgb_profile()))
    pixels = pixels_of(encode(rgba, "PNG", icc_profile=rgb_profile()), background=(10, 200, 90))
    assert np.abs(pixels - (opaque * 128 + np.array([10, 200, 90]) * 127) / 255).max() <= 0.51


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
def test_grey_profile(mode):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = {
        "L": Image.fromarray(grey),
        "LA": Image.merge("LA", [Image.fromarray(grey), Image.new("L", (16, 16), 255)]),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "1": Image.fromarray(grey > 99),
    }[mode]
    values = (grey > 99) * 1.0 if mode == "1" else grey / 255
    profile = icc_profile(b"GRAY", {b"kTRC": gamma_curve(1.5)})
    error = np.abs(pixels_of(encode(image, "PNG", icc_profile=profile)) - srgb(values**1.5)[..., None])
    assert error.max() < 2
    assert error.mean() < 0.4


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_profile(format):
    """Cyan ink that the profile says is a light violet."""
    lab = np.full((2, 2, 2, 2, 3), (0, 0, 0))
    lab[0, 0, 0, 0], lab[1, 0, 0, 0] = (100, 0, 0), (70, 20, -20)
    table = np.stack([lab[..., 0] * 2.55, lab[..., 1] + 128, lab[..., 2] + 128], -1).round().astype(np.uint8)
    identity = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(*np.eye(3).ravel())
    lut += identity * 4 + table.tobytes() + identity * 3
    profile = icc_profile(b"CMYK", {b"A2B0": lut}, kind=b"prtr", connection=b"Lab ")

    f = (70 + 16) / 116 + np.array([20 / 500, 0, 20 / 200])
    violet = srgb(XYZ_TO_SRGB @ (f**3 * D50))
    for ink, expected in (((0, 0, 0, 0), 255), ((255, 0, 0, 0), violet)):
        data = encode(Image.new("CMYK", (16, 16), ink), format, icc_profile=profile)
        assert np.abs(pixels_of(data)[8, 8] - expected).max() <= 4


@pytest.mark.parametrize(
    "profile",
    [b"rubbish", rgb_profile()[:200], rgb_profile()[:60], icc_profile(b"GRAY", {b"kTRC": gamma_curve(1.0)})],
)
def test_broken_and_foreign_profiles_are_ignored(profile):
    assert (pixels_of(encode(scene(), "PNG", icc_profile=profile)) == scene()).all()


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be used


def refusal(function, file):
    with pytest.raises(PictureError) as caught:
        function(file)
    return str(caught.value)


@pytest.mark.parametrize("function", [open_picture, picture_size])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"a caption, no picture", "it is damaged, or is not a picture in one of the formats JPEG, PNG"),
        (b"\x89PNG\r\n\x1a\n", "it is damaged, or is not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "it is damaged, or is not a picture"),
    ],
)
def test_no_picture(function, data, reason):
    assert refusal(function, data).startswith(reason)


def test_files(tmp_path):
    assert refusal(picture_size, tmp_path / "gone.png") == "it cannot be read: No such file or directory"
    assert refusal(picture_size, tmp_path) == "it cannot be read: Is a directory"
    (tmp_path / "empty.png").touch()
    assert refusal(picture_size, tmp_path / "empty.png") == "it is empty"
    (tmp_path / "good.png").write_bytes(encode(scene(), "PNG"))
    assert picture_size(tmp_path / "good.png") == picture_size(str(tmp_path / "good.png")) == (48, 32)


@pytest.mark.parametrize("function", [open_picture, picture_size])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs(function):
    def bomb(width, height):
        return png(np.zeros((1, 1, 3), np.uint8), 2, size=(width, height))

    assert str(MAX_PIXELS) in refusal(function, bomb(30000, 30000))
    assert refusal(function, bomb(1, MAX_PIXELS + 1)) == (
        f"it has 1 x {MAX_PIXELS + 1} pixels, more than the {MAX_PIXELS} allowed"
    )
    assert picture_size(bomb(1, MAX_PIXELS)) == (1, MAX_PIXELS)


@pytest.mark.parametrize("type", [np.float32, np.int32])
def test_numbers_without_a_white(type):
    data = encode(Image.fromarray(np.ones((4, 4), type)), "TIFF")
    assert refusal(open_picture, data).startswith("its pixels are 32-bit numbers")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("options", [{}, {"progressive": True, "compression": "tiff_lzw"}])
def test_cut_short(format, options):
    """Either the rest is missed, or it was not needed: never a picture whose end is grey."""
    whole = encode(np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8), format, **options)
    expected = pixels_of(whole)
    refused = 0
    for length in sorted({*range(1, 40), *range(40, len(whole), 1 + len(whole) // 60), *range(len(whole))[-20:]}):
        try:
            picture = open_picture(whole[:length])
        except PictureError:
            refused += 1
        else:
            assert (np.asarray(picture) == expected).all(), length
    assert refused > 60


DAMAGED = {format: encode(scene(16, 12), format, icc_profile=rgb_profile()) for format in FORMATS}


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=8))
def test_damage_ends_in_a_picture_or_a_refusal(format, changes):
    data = bytearray(DAMAGED[format])
    for place, value in changes:
        data[place % len(data)] = value
    for function in (open_picture, picture_size):
        with suppress(PictureError):
            function(bytes(data))


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP"])
def test_the_size_needs_the_header_alone(format):
    data = encode(np.random.default_rng(1).integers(0, 256, (200, 300, 3), dtype=np.uint8), format)[:1500]
    assert picture_size(data) == (300, 200)
    refusal(open_picture, data)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_is_decoded_no_smaller_than_needed(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    upright = scene(1200, 800)
    data = encode(np.ascontiguousarray(stored(upright, orientation)), "JPEG", exif=exif.tobytes())
    sizes = {
        at_least: open_picture(data, at_least=at_least).size
        for at_least in [(75, 50), (76, 50), (75, 51), (150, 100), (151, 100), (300, 200), (301, 200), (9999, 9999)]
    }
    assert sizes == {
        (75, 50): (150, 100), (76, 50): (300, 200), (75, 51): (300, 200), (150, 100): (300, 200),
        (151, 100): (600, 400), (300, 200): (600, 400), (301, 200): (1200, 800), (9999, 9999): (1200, 800),
    }  # fmt: skip
    assert open_picture(encode(upright, "PNG"), at_least=(75, 50)).size == (1200, 800)


def test_decoding_smaller_is_hardly_seen():
    """Less than the choice of the filter, in a picture whose spectrum is 1/f as those of photographs."""
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(1600), np.fft.fftfreq(1600)))
    frequencies[0, 0] = 1
    noise = np.random.default_rng(2).normal(size=(1600, 1600))
    noise = np.fft.ifft2(np.fft.fft2(noise) / frequencies).real
    noise = (128 + 45 * noise / noise.std()).clip(0, 255).astype(np.uint8)
    data = encode(np.repeat(noise[..., None], 3, -1), "JPEG")

    small, full = open_picture(data, at_least=(200, 200)), open_picture(data)
    assert small.size == (400, 400)
    resized = np.asarray(full.resize((200, 200), Image.Resampling.LANCZOS)).astype(float)
    bilinear = np.asarray(full.resize((200, 200), Image.Resampling.BILINEAR))
    pixels, _ = fit_picture(small, (200, 200), np.random.default_rng(0), original_size=full.size)
    assert (pixels.transpose(1, 2, 0) - resized).std() < (bilinear - resized).std() < 0.15 * resized.std()


sides = st.integers(1, 5000)


@given(st.tuples(sides, sides), st.tuples(sides, sides))
def test_cover_size(size, bucket):
    (width, height), (w, h) = cover_size(size, bucket), bucket
    assert width >= w
    assert height >= h
    assert width == w or height == h
    scale = max(w / size[0], h / size[1])
    assert abs(width - scale * size[0]) <= 0.5 + 1e-9 * width
    assert abs(height - scale * size[1]) <= 0.5 + 1e-9 * height


def test_cover_size_by_hand():
    assert cover_size((3000, 2000), (1024, 1024)) == (1536, 1024)
    assert cover_size((2000, 3001), (1000, 1000)) == (1000, 1501)  # 1500.5
    assert cover_size((832, 1216), (832, 1216)) == (832, 1216)


# ----------------------------------------------------------------------------------------------------------------------
# Fitting


def painted(width, height):
    """A picture whose colours are its coordinates: red is x, green is y, in shares of its sides."""
    y, x = np.mgrid[:height, :width]
    layers = [(x + 0.5) / width, (y + 0.5) / height, np.zeros((height, width))]
    return Image.fromarray((np.stack(layers, -1) * 256 - 0.5).round().astype(np.uint8))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("size", "bucket"),
    [((256, 64), (64, 64)), ((64, 256), (64, 64)), ((400, 300), (200, 200)), ((90, 160), (120, 120))],
)
def test_the_crop_is_where_it_says(size, bucket, flip):
    """The coordinates of the resized picture, read off its colours."""
    resized = cover_size(size, bucket)
    places = set()
    for picture in range(40):
        pixels, told = fit_picture(painted(*size), bucket, keyed_generator(0, 0, picture, CROP), flip)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels.shape == (3, bucket[1], bucket[0])
        assert told.original_size == size[::-1]
        assert told.target_size == bucket[::-1]
        x = (pixels[0, :, 8:-8] + 0.5) / 256 * resized[0] - 0.5  # away from the edges, where ramps end
        y = (pixels[1, 8:-8, :] + 0.5) / 256 * resized[1] - 0.5
        if flip:
            x = resized[0] - 1 - x
        columns, rows = np.arange(8, bucket[0] - 8), np.arange(8, bucket[1] - 8)
        top, left = (y - rows[:, None]).mean(), (x - columns).mean()
        assert told.crop_top_left == pytest.approx((top, left), abs=0.3)
        places.add(told.crop_top_left)
        assert all(isinstance(number, int) for pair in told for number in pair)
    assert len(places) > 20


def test_a_picture_as_large_as_its_bucket_is_not_touched():
    image = Image.fromarray(scene())
    pixels, told = fit_picture(image, (48, 32), np.random.default_rng(0))
    assert (pixels == scene().transpose(2, 0, 1)).all()
    assert told == MicroConditioning((32, 48), (0, 0), (32, 48))
    mirrored, same = fit_picture(image, (48, 32), np.random.default_rng(0), True)
    assert (mirrored == pixels[..., ::-1]).all()
    assert same == told


def test_the_crop_falls_everywhere_alike():
    image = Image.new("RGB", (20, 10))
    lefts = [fit_picture(image, (10, 10), keyed_generator(3, 1, n, CROP))[1].crop_top_left[1] for n in range(4400)]
    counts = np.bincount(lefts, minlength=11)
    assert len(counts) == 11
    assert ((counts - 400) ** 2 / 400).sum() < 35  # 10 degrees of freedom


def test_resizing_is_antialiased_and_not_in_linear_light():
    """A fine checkerboard of black and white becomes the mean of its values, 127.5, and not that of its light, 188."""
    board = np.indices((256, 256)).sum(0) % 2 * 255
    image = Image.fromarray(np.repeat(board[..., None], 3, -1).astype(np.uint8))
    pixels, _ = fit_picture(image, (32, 32), np.random.default_rng(0))
    assert np.abs(pixels[:, 2:-2, 2:-2] - 127.5).max() < 2


def test_a_picture_opened_smaller_is_told_of_as_it_was():
    data = encode(scene(1203, 801), "JPEG")
    small = open_picture(data, at_least=cover_size((1203, 801), (96, 96)))
    assert small.size == (301, 201)
    pixels, told = fit_picture(small, (96, 96), keyed_generator(0, 0, 0, CROP), original_size=(1203, 801))
    full, same = fit_picture(open_picture(data), (96, 96), keyed_generator(0, 0, 0, CROP))
    assert told == same
    assert told.original_size == (801, 1203)
    assert np.abs(pixels.astype(int) - full).max() <= 3


def test_a_picture_that_is_not_the_one_of_the_index():
    image = Image.new("RGB", (40, 30))
    for size in ((30, 40), (41, 30), (40, 29), (20, 15), (120, 90), (121, 80), (1, 1)):
        with pytest.raises(PictureError, match=f"it has changed: it was {size[0]} x {size[1]} pixels"):
            fit_picture(image, (8, 8), np.random.default_rng(0), original_size=size)


def test_a_line_does_not_become_a_giant():
    """Where aspect ratios are not limited, covering its bucket would take it more memory than there is."""
    line = Image.new("RGB", (2000, 1))
    with pytest.raises(PictureError, match="it would be resized to 2048000 x 1024 pixels"):
        fit_picture(line, (1024, 1024), np.random.default_rng(0))
