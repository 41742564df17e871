"""The image side of inference: pictures and frames in, fused text and vision tokens out, chunk by chunk.

Memory does not grow with the length of a video: of each chunk only the sum of fused text and the vision tokens stay.
Axis letters: N images of a chunk, B rows, P tiles, H,W pixels, I instruction tokens, V vision tokens per image, D width.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmm_jax.data.layout import Layout
from lmm_jax.errors import UserError
from lmm_jax.inference.buckets import power_below, power_of_two
from lmm_jax.inference.compiling import jit
from lmm_jax.inference.prefix_cache import PrefixCache
from lmm_jax.models import apart
from lmm_jax.models.llava_mini import ImagePrefix, LlavaMini
from lmm_jax.sharding import batch_multiple, constrain, platform

CHUNK = 32  # images encoded at once
CHUNK_BYTES = 2**29  # prefixes of so many at most, on a device
PROCESSOR_CHUNK_BYTES = 2**27  # which takes long to copy them
CACHE_BYTES = 2**24  # of a processor: attention scores of so many images go through the encoder together

Medium = np.ndarray | Iterable[np.ndarray]
"""An image: pixels (P,H,W,3); or a video: a sized iterable of such, one per frame. All of a batch are uint8, or all normalised
float32."""


def count_images(medium: Medium) -> int:
    """1, or the number of frames a video promises."""
    return 1 if isinstance(medium, np.ndarray) else len(medium)


class ImageSide:
    """Encodes and fuses the images of a batch.

    Attributes:
      chunk: images that are fused together, at most; what has more is taken in several steps.
      at_once: images that go through the encoder together, at most.
      prefixes: of pictures that may be asked about again.
    """

    def __init__(self, model: LlavaMini, mesh: Mesh, cache_bytes: int) -> None:
        """Compiles nothing yet.

        Args:
          model: gives config and dtype.
          mesh: images come in multiples of its devices, so that each gets as many.
          cache_bytes: device memory for prefixes of pictures that may be asked about again.
        """
        self._model, self._config, self._multiple = model, model.config, batch_multiple(mesh)
        processor = platform(mesh) == "cpu"
        room = PROCESSOR_CHUNK_BYTES if processor else CHUNK_BYTES
        each = min(CHUNK // self._multiple, room // self.prefix_bytes)  # images of a device
        self.chunk = self._multiple * power_below(each)
        at_once = min(each, CACHE_BYTES // self._score_bytes) if processor else each
        self.at_once = self._multiple * power_below(at_once)
        self.prefixes = PrefixCache(cache_bytes)
        self._encode, self._fuse = _jitted(model, mesh)
        self._mesh = mesh
        self._helper = ThreadPoolExecutor(1, "encoder") if apart.is_lone_processor(mesh) else None
        self._put = jit(_put_tokens, mesh, donate_argnums=0, static_argnums=3)
        self._zeros = jit(_zeros, mesh, static_argnums=(0, 1, 2))
        self._split = jit(_split_prefix, mesh)
        self._join = jit(_join_prefixes, mesh)

    def take(
        self, params: Any, layout: Layout, media: Sequence[Sequence[Medium]], between: Callable[[], None] = lambda: None
    ) -> tuple[jax.Array | None, jax.Array | None, list[list[int]]]:
        """Encodes and fuses all images, chunk by chunk; calls `between` before each chunk but the first.

        Returns:
          Sum of each row's fused texts (B,I,D) float32, None without pre-fusion layers; vision tokens of all images in order
          (room for N,V,D); the real number of images of each medium. The first two are None where there are no images.
        """
        counts = [[0] * len(m) for m in media]
        planned = len(layout.image_rows)
        if not planned:
            return None, None, counts
        c, m = self._config, self._multiple
        room = m * power_of_two(-(-planned // m))
        tokens = self._zeros((room, c.tokens_per_image, c.decoder.hidden_size), self._model.dtype, None)
        total = None
        if c.prefusion_layers:
            total = self._zeros((*layout.fused_ids.shape, c.decoder.hidden_size), jnp.float32, "batch")
        in_flight: collections.deque[jax.Array] = collections.deque()
        for number, chunk in enumerate(_chunks(_flow(media, counts, self.kept), self.chunk)):
            if number:
                between()
            size = m * power_of_two(-(-len(chunk) // m))  # of the last one: as few as there are
            rows = np.full(size, len(layout.ids), np.int32)  # past the last row: dropped
            rows[: len(chunk)] = [item.row for item in chunk]
            prefix = self._prefix(params, chunk, size)
            if c.prefusion_layers:
                ids = layout.fused_ids[np.minimum(rows, len(layout.ids) - 1)]
                total = self._fuse(params, total, ids, rows, prefix)
            tokens = self._put(tokens, prefix.tokens, np.int32(number * self.chunk), size)
            in_flight.append(prefix.tokens)
            if len(in_flight) > 2:  # do not run ahead of the device: pixels of a whole video would pile up
                in_flight.popleft().block_until_ready()
        return total, tokens, counts

    @property
    def kept(self) -> int:
        """Pictures that are remembered."""
        return self.prefixes.max_bytes // self.prefix_bytes

    @property
    def prefix_bytes(self) -> int:
        """Device memory of one picture's prefix."""
        c, d = self._config, self._config.decoder
        keys_and_values = 2 * c.prefusion_layers * c.prefix_length * d.num_kv_heads * d.head_dim
        return (keys_and_values + c.tokens_per_image * d.hidden_size) * jnp.dtype(self._model.dtype).itemsize

    @property
    def _score_bytes(self) -> int:
        """Of one picture, in a layer of the encoder."""
        v = self._config.vision
        return 4 * self._config.tiles * v.num_heads * (v.grid**2 + 1) ** 2

    def _prefix(self, params: Any, chunk: list[_Item], size: int) -> ImagePrefix:
        """Prefixes of a chunk's images, padded to `size`, or one, of the picture that all of them are.

        Pictures come from the cache or go there.
        """
        keys = [PrefixCache.key(i.pixels) if i.keep else None for i in chunk]
        known = {k: p for k in set(keys) if k and (p := self.prefixes.get(k))}
        first = {k: n for n, k in reversed(list(enumerate(keys)))}  # a picture that comes twice is encoded once
        missing = [n for n, k in enumerate(keys) if k not in known and (k is None or first[k] == n)]
        for start in range(0, len(missing), self.at_once):
            part = missing[start : start + self.at_once]
            encoded = self._start(params, self._pixels(chunk, part, None if any(keys) else size), start // self.at_once)
            if encoded.tokens.shape[0] == size and not any(keys):
                return encoded
            single = self._split(encoded) if encoded.tokens.shape[0] > 1 else [encoded]
            for slot, n in enumerate(part):
                known[keys[n] or n] = single[slot]
                if keys[n]:
                    self.prefixes.put(keys[n], single[slot])
        parts = [known[k or n] for n, k in enumerate(keys)]
        if self._multiple == 1 and all(part is parts[0] for part in parts):  # one cannot be split between devices
            return parts[0]
        return self._join(parts + [parts[-1]] * (size - len(parts)))

    def _start(self, params: Any, pixels: np.ndarray, number: int) -> ImagePrefix:
        """Starts to encode.

        A processor does what one thread asks for in order; asked by two in turn, it is at one's products while the other's
        program is where a single core works. Of what JAX sets for a thread, the helper is given the mesh.
        """
        if self._helper is None or number % 2 == 0:
            return self._encode(params, pixels)

        def start() -> ImagePrefix:
            with jax.set_mesh(self._mesh):
                return self._encode(params, pixels)

        return self._helper.submit(start).result()

    def _pixels(self, chunk: list[_Item], numbers: list[int], size: int | None) -> np.ndarray:
        """Those of some of a chunk's images, padded to `size` or to as many as the encoder takes."""
        m = self._multiple
        room = min(self.at_once, size or m * power_of_two(-(-len(numbers) // m)))
        pixels = np.zeros((room, *chunk[0].pixels.shape), chunk[0].pixels.dtype)
        for slot, n in enumerate(numbers):
            pixels[slot] = chunk[n].pixels
        return pixels


@functools.lru_cache(maxsize=8)  # engines of the same model share what is compiled
def _jitted(model: LlavaMini, mesh: Mesh) -> tuple[Callable[..., ImagePrefix], Callable[..., jax.Array]]:
    """`encode`: pixels (N,P,H,W,3) -> prefix of N images. `fuse`: ids (N,I) with N images or the one that all are about, whose
    results are added to total (B,I,D) at rows (N,).
    """

    def encode(params: Any, pixels: jax.Array) -> ImagePrefix:
        return model.apply({"params": params}, pixels, method="encode_image")

    def fuse(params: Any, total: jax.Array, ids: jax.Array, rows: jax.Array, prefix: ImagePrefix) -> jax.Array:
        text = model.apply({"params": params}, ids, method="embed")
        fused = model.apply({"params": params}, text, prefix, method="fuse_text")
        return constrain(total.at[rows].add(fused.astype(jnp.float32), mode="drop"), "batch", None, None)

    return jit(encode, mesh), jit(fuse, mesh, donate_argnums=1)


def _zeros(shape: tuple[int, int, int], dtype: Any, axis: str | None) -> jax.Array:
    return constrain(jnp.zeros(shape, dtype), axis, None, None)


def _put_tokens(tokens: jax.Array, new: jax.Array, at: jax.Array, size: int) -> jax.Array:
    """Writes vision tokens (N,V,D) of `size` images, or one's as often, from image number `at` on; on every device, since any
    row may want any of them.
    """
    new = jnp.repeat(new, size // len(new), axis=0)
    start = (at, jnp.int32(0), jnp.int32(0))
    return constrain(jax.lax.dynamic_update_slice(tokens, new.astype(tokens.dtype), start), None, None, None)


def _image_axis(path: tuple) -> int:
    return 1 if any(getattr(k, "key", None) == "stack" for k in path) else 0


def _split_prefix(prefix: ImagePrefix) -> list[ImagePrefix]:
    """One prefix per image, each with N = 1."""

    def take(n: int) -> ImagePrefix:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jax.lax.slice_in_dim(x, n, n + 1, axis=_image_axis(path)), prefix
        )

    return [take(n) for n in range(prefix.tokens.shape[0])]


def _join_prefixes(prefixes: list[ImagePrefix]) -> ImagePrefix:
    return jax.tree_util.tree_map_with_path(lambda path, *xs: jnp.concatenate(xs, axis=_image_axis(path)), *prefixes)


@dataclasses.dataclass
class _Item:
    row: int
    pixels: np.ndarray
    keep: bool  # worth a place in the prefix cache


def _flow(media: Sequence[Sequence[Medium]], counts: list[list[int]], fits: int) -> Iterator[_Item]:
    """All images and frames in order; `counts` is filled with how many each medium really had, UserError where that is none.

    Media of at most `fits` images are kept: a longer video would only push everything out of the cache.
    """
    for row, of_row in enumerate(media):
        for m, medium in enumerate(of_row):
            keep = count_images(medium) <= fits
            for pixels in [medium] if isinstance(medium, np.ndarray) else medium:
                counts[row][m] += 1
                yield _Item(row, pixels, keep)
            if not counts[row][m]:
                raise UserError(f"a video gave none of its {count_images(medium)} frames: give one that can be read again")


def _chunks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    chunk: list[_Item] = []
    for item in items:
        if len(chunk) == size:
            yield chunk
            chunk = []
        chunk.append(item)
    if chunk:
        yield chunk
