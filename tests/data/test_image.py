import io
import json
import pathlib
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from safetensors.numpy import load_file

from lmm_jax.data import image as module
from lmm_jax.data.image import NORMALIZATION_TABLE, load_image, normalize, preprocess, squash
from lmm_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "preprocessing"
EXPECTED = load_file(GOLDEN / "expected.safetensors")


def picture(width=60, height=40, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(small).resize((width, height))


def encode(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def png_header(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT"


@pytest.mark.parametrize("case", sorted(k for k in EXPECTED if k != "frame.nearest56"))
def test_pixels_equal_the_published_ones(case):
    name, mode, tiles = case.split(".")
    n = int(tiles.removeprefix("tiles"))
    image = load_image(GOLDEN / f"{name}.png", upright=False)
    pixels = preprocess(image, size=56, aspect_ratio=mode, resolution_ratio=n)
    assert pixels.dtype == np.uint8 and pixels.shape == (1 if n == 1 else n * n + 1, 56, 56, 3)
    values = normalize(pixels)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.transpose(0, 3, 1, 2), EXPECTED[case])


def test_table_is_the_normalization():
    assert NORMALIZATION_TABLE.shape == (256, 3) and NORMALIZATION_TABLE.dtype == np.float32
    exact = (np.arange(256)[:, None] / 255 - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(NORMALIZATION_TABLE, exact, atol=1e-6)


def test_squash_takes_the_published_pixels():
    for case, indices in json.loads((GOLDEN / "nearest_indices.json").read_text()).items():
        source, target = map(int, case.split(","))
        for axis in (0, 1):
            ramp = np.zeros((source, source, 3), np.uint16)
            ramp += np.arange(source, dtype=np.uint16).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
            assert np.moveaxis(squash(ramp, target), axis, 0)[:, 0, 0].tolist() == indices
    frame = np.asarray(load_image(GOLDEN / "frame.png", upright=False))
    np.testing.assert_array_equal(squash(frame, 56), EXPECTED["frame.nearest56"])


@pytest.mark.parametrize("size", [(300, 40), (41, 333), (90, 90), (56, 20), (13, 56)])
def test_padding_in_strips_equals_padding_at_once(size, monkeypatch):
    monkeypatch.setattr(module, "_STRIP_PIXELS", 7 * max(size))
    image = picture(*size)
    side = max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    got = preprocess(image, size=56, aspect_ratio="pad", resolution_ratio=1)[0]
    np.testing.assert_array_equal(got, np.asarray(square.resize((56, 56), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_on_request(orientation, fmt):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), fmt, exif=exif)
    as_stored = load_image(data, upright=False)
    assert as_stored.size == (60, 40)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(data, upright=True)), np.asarray(want))


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_leaves_the_picture_as_it_is(exif):
    data = encode(picture(), "JPEG")
    broken = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    np.testing.assert_array_equal(np.asarray(load_image(broken, upright=True)), np.asarray(load_image(data, upright=False)))


def test_every_way_to_give_a_picture(tmp_path):
    path = tmp_path / "ü picture.png"
    picture().save(path)
    sources = [path, str(path), path.read_bytes(), Image.open(path), picture()]
    for source in sources:
        loaded = load_image(source, upright=True)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(picture()))


def test_alpha_is_dropped_without_a_warning():
    solid = np.asarray(picture())
    clear = Image.fromarray(np.concatenate([solid, np.zeros((40, 60, 1), np.uint8)], axis=2))
    np.testing.assert_array_equal(np.asarray(load_image(encode(clear, "PNG"), upright=False)), solid)
    palette = picture().quantize(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(encode(palette, "PNG", transparency=bytes(range(0, 256, 16))), upright=False)
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_other_modes_become_rgb(mode, tmp_path):
    source = picture().convert("L") if mode == "I;16" else picture()
    path = tmp_path / "picture.tiff"
    source.convert(mode).save(path)
    np.testing.assert_array_equal(np.asarray(load_image(path, upright=False)), np.asarray(Image.open(path).convert("RGB")))


GOOD = encode(picture(), "JPEG")
BAD = {  # file name: (content, message)
    "empty.jpg": (b"", "empty.jpg is empty"),
    "cut.jpg": (GOOD[:-40], "cut.jpg .*cut short"),
    "text.jpg": (b"This is not a picture. " * 50, "text.jpg is not a picture"),
    "drawing.eps": (encode(picture(), "EPS"), "drawing.eps is not a picture"),
    "bomb.png": (png_header(60000, 60000), "bomb.png has too many pixels"),
    "thread.png": (encode(Image.new("L", (1, 60000)), "PNG"), "thread.png is 1x60000 .*Crop"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_image(tmp_path / name, upright=True)
    with pytest.raises(UserError, match="the given picture"):
        load_image(content, upright=True)


def test_bad_sources(tmp_path):
    cases = [
        (tmp_path / "missing.jpg", "missing.jpg does not exist"),
        (tmp_path, "is not a file"),
        ("a\0b.jpg", "does not exist"),
        (3, "not as int"),
        (None, "not as NoneType"),
        (Image.open(io.BytesIO(GOOD[:-40])), "cut short"),
        (Image.new("RGB", (0, 5)), "0x5"),
    ]
    for source, message in cases:
        with pytest.raises(UserError, match=message):
            load_image(source, upright=True)


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_own_limit_replaces_pillows_warning(fmt, monkeypatch):
    data = encode(picture(60, 40), fmt)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # Pillow warns above 1500 and refuses above 3000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data, upright=True).size == (60, 40)
        with pytest.raises(UserError, match="60x40"):
            load_image(data, upright=True, max_pixels=2000)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(UserError, match="too many pixels"):
            load_image(data, upright=True)


def test_panoramas_and_long_screenshots_pass():
    for size in ((8000, 400), (200, 9000)):
        image = load_image(encode(picture(*size), "PNG"), upright=True)
        for mode in ("square", "pad"):
            assert preprocess(image, size=56, aspect_ratio=mode, resolution_ratio=2).shape == (5, 56, 56, 3)


@pytest.mark.parametrize("size", [(1, 30), (30, 2)])
def test_too_small_for_tiles(size):
    with pytest.raises(UserError, match=f"{size[0]}x{size[1]} pixels cannot be cut into 3x3"):
        preprocess(picture(*size), size=56, aspect_ratio="square", resolution_ratio=3)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
@pytest.mark.filterwarnings("ignore")
def test_broken_files_give_pictures_or_clear_errors(fmt):
    whole = encode(picture(), fmt)
    draw = random.Random(fmt)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 3, 20])):
            data[draw.randrange(min(len(data), draw.choice([64, 400, len(data)])))] = draw.randrange(256)
        data = data[: draw.randrange(len(data))] if draw.random() < 0.2 else data
        try:
            assert load_image(bytes(data), upright=True).mode == "RGB"
        except UserError:
            refused += 1
    assert refused
