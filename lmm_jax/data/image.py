"""Pictures: a file, bytes or a Pillow image -> RGB pixels as the vision encoder wants them (spec sections 6 and 7).

P tiles per image, H and W pixels. Everything stays uint8 up to `normalize`, which is one table lookup, so that four times
fewer bytes travel to the device and the device can use the same table.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterator
from typing import BinaryIO, Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from lmm_jax.errors import UserError

MAX_PIXELS = 178_956_970  # where Pillow itself refuses; a 108-megapixel phone picture or a 60-megapixel panorama passes
MAX_ASPECT = 500  # long edge over short edge; with the short edge resized to 336, the long one stays below 170,000

# Every reader is code that a malicious file can reach: only formats that people have pictures in.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM")

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_MEAN_COLOUR = (122, 116, 104)
_STRIP_PIXELS = 1 << 22

# float32 (256, 3): pixel value and channel -> normalised value; the order of operations decides the last bit
NORMALIZATION_TABLE = ((np.arange(256) * (1 / 255)).astype(np.float32)[:, None] - _MEAN) / _STD

_UPRIGHT = {  # EXIF orientation -> what puts the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_warning_filters = threading.Lock()


def load_image(source: str | os.PathLike | bytes | Image.Image, *, upright: bool, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads and fully decodes one picture as RGB; an alpha channel is dropped.

    Args:
      source: a path, the content of a picture file, or a Pillow image.
      upright: whether to turn the picture as its EXIF orientation says.
      max_pixels: that are read, at most.

    Raises:
      UserError: the file is missing, a directory, empty, cut short, broken or no picture; the picture has more than
        `max_pixels` pixels or one edge is more than `MAX_ASPECT` times the other.
    """
    name = os.fsdecode(source) if isinstance(source, str | os.PathLike) else "the given picture"
    try:
        if isinstance(source, Image.Image):
            return _decode(source, name, upright, max_pixels)
        with _file(source, name) as file:
            return _decode(_open(file), name, upright, max_pixels)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not a picture in a known format ({', '.join(FORMATS)}).") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has too many pixels: at most {MAX_PIXELS:,} are read. Make it smaller.") from error
    except Exception as error:  # broken files make Pillow's readers raise nearly anything
        raise UserError(f"{name} cannot be read as a picture, it is broken or cut short ({error}).") from error


def existing_file(path: str | os.PathLike, kind: str) -> str:
    """The path as a string, when it leads to a file that is not empty.

    Raises:
      UserError: nothing there, a directory, or an empty file; `kind` says what was expected ("picture", "video").
    """
    path = os.fsdecode(path)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; give the path of a {kind} file.")
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file; give the path of a {kind} file.")
    if not os.path.getsize(path):
        raise UserError(f"{path} is empty; a {kind} was expected.")
    return path


def preprocess(image: Image.Image, *, size: int, aspect_ratio: Literal["square", "pad"], resolution_ratio: int) -> np.ndarray:
    """The pixels the vision encoder sees of one RGB picture (spec section 7), not yet normalised.

    Args:
      image: RGB, as `load_image` gives it.
      size: H = W, the encoder's input in pixels.
      aspect_ratio: "square" crops the centre, "pad" fills up with the mean colour (every tile on its own).
      resolution_ratio: n; above 1 the picture is cut into n×n tiles.

    Returns:
      uint8 (P, H, W, 3): n² tiles in row-major order, then the whole picture; P = 1 when n is 1.

    Raises:
      UserError: the picture has fewer than n pixels along an edge.
    """
    pieces = [image] if resolution_ratio == 1 else [*_tiles(image, resolution_ratio), image]
    fit = {"square": _crop_to_square, "pad": _pad_to_square}[aspect_ratio]
    return np.stack([np.asarray(fit(piece, size)) for piece in pieces])


def normalize(pixels: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) RGB -> float32 (..., 3), mean 0 and deviation 1 over CLIP's training pictures (spec section 7)."""
    return NORMALIZATION_TABLE[pixels, np.arange(3)]


def squash(frame: np.ndarray, size: int) -> np.ndarray:
    """Nearest-neighbour resize of a video frame, aspect ratio not kept (spec section 6).

    Args:
      frame: uint8 (h, w, 3).
      size: H = W in pixels.

    Returns:
      uint8 (H, W, 3).
    """
    rows, columns = (_nearest(edge, size) for edge in frame.shape[:2])
    return frame[rows[:, None], columns]


def _nearest(source: int, target: int) -> np.ndarray:
    # torch computes in float32; exact integers differ at 360, 720, 1080 and 2160
    indices = np.floor(np.arange(target, dtype=np.float32) * np.float32(source / target)).astype(np.int64)
    return np.minimum(indices, source - 1)


def _file(source: str | os.PathLike | bytes, name: str) -> BinaryIO:
    if isinstance(source, str | os.PathLike):
        return open(existing_file(source, "picture"), "rb")
    if not isinstance(source, bytes):
        raise UserError(f"a picture is given as a path, as bytes or as a Pillow image, not as {type(source).__name__}.")
    if not source:
        raise UserError(f"{name} is empty: 0 bytes.")
    return io.BytesIO(source)


def _open(file: BinaryIO) -> Image.Image:
    Image.init()
    with _no_bomb_warning():
        return Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])


@contextlib.contextmanager
def _no_bomb_warning() -> Iterator[None]:
    """`MAX_PIXELS` decides, not the lower size at which Pillow warns. The filters are global, hence the lock."""
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _decode(image: Image.Image, name: str, upright: bool, max_pixels: int) -> Image.Image:
    _check_size(image.size, name, max_pixels)
    # only the TIFF reader warns again while it decodes; the others can decode in several threads at once
    with _no_bomb_warning() if image.format == "TIFF" else contextlib.nullcontext():
        image.load()
    _check_size(image.size, name, max_pixels)  # some readers learn the true size only now
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation)) if upright else None
    if isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # straight to RGB gives the same colours and a warning that alpha is lost
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if min(size) < 1 or width * height > max_pixels:
        raise UserError(f"{name} is {width}x{height} pixels; between 1 and {max_pixels:,} pixels are read.")
    if max(size) > MAX_ASPECT * min(size):
        raise UserError(
            f"{name} is {width}x{height} pixels; one edge may be at most {MAX_ASPECT} times as long as the other. Crop it."
        )


def _tiles(image: Image.Image, n: int) -> list[Image.Image]:
    width, height = image.width // n, image.height // n
    if not width or not height:
        raise UserError(
            f"a picture of {image.width}x{image.height} pixels cannot be cut into {n}x{n} tiles; give a larger one."
        )
    boxes = [(column * width, row * height) for row in range(n) for column in range(n)]
    return [image.crop((left, top, left + width, top + height)) for left, top in boxes]


def _crop_to_square(image: Image.Image, size: int) -> Image.Image:
    long = int(size * max(image.size) / min(image.size))
    shape = (size, long) if image.width <= image.height else (long, size)
    image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _pad_to_square(image: Image.Image, size: int) -> Image.Image:
    """Pads and resizes. The padded square never exists: of a 20000x2000 panorama it would take 1.6 GB.

    Pillow resizes rows first, then columns, rounding to uint8 in between; so rows may be padded and resized a strip at a time.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side), _MEAN_COLOUR)  # the square after its rows are resized
    rows = max(1, _STRIP_PIXELS // side)
    for start in range(0, image.height, rows):
        stop = min(start + rows, image.height)
        strip = Image.new("RGB", (side, stop - start), _MEAN_COLOUR)
        strip.paste(image.crop((0, start, image.width, stop)), (left, 0))
        narrow.paste(strip.resize((size, stop - start), Image.Resampling.BICUBIC), (0, top + start))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)
