"""The jitted programs of inference, and the host code that feeds them.

    images, frames ─ encode ─ fuse ─┐        chunks of images: memory does not grow with a video's length
    prompt ids ─────────────────────┴─ place ─► decoder input ─► slots: prefill, insert, decode … decode

Every shape is rounded up to a bucket, so the number of compiled programs is bounded whatever is asked.
Axis letters: B rows, N images of a chunk, P tiles, H,W pixels, T decoder positions, I instruction tokens, V vision tokens per
image, D width.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh

from lmm_jax import sharding
from lmm_jax.config import ModelConfig
from lmm_jax.data.layout import Layout, Row, check_row, decoder_length, fused_length, lay_out
from lmm_jax.errors import DeviceError, UserError
from lmm_jax.inference.buckets import length_bucket
from lmm_jax.inference.compiling import jit
from lmm_jax.inference.images import ImageSide, Medium, count_images
from lmm_jax.inference.sampling import Sampling
from lmm_jax.inference.slots import Programs, Slots
from lmm_jax.models import apart
from lmm_jax.models.kv_cache import position_bytes
from lmm_jax.models.llava_mini import LlavaMini
from lmm_jax.models.loss import next_token_loss

MAX_BATCH = 32  # rows, where nothing else is asked for
MAX_POSITIONS = 32768  # rows × positions of one batch on a device, the room for answers included
CACHE_BYTES = 4 * 2**30  # keys and values of so many positions at most
STREAM_STEPS = 8  # tokens between two looks at a stream, once it runs
YIELD_STEPS = 8  # tokens that rows generate between two chunks of a long video that is encoded meanwhile


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue: ids with a placeholder for each medium."""

    ids: np.ndarray
    media: Sequence[Medium] = ()
    sampling: Sampling = Sampling()

    def row(self) -> Row:
        """The prompt without its pixels."""
        return Row(self.ids, tuple(count_images(m) for m in self.media))


@dataclasses.dataclass(frozen=True)
class _Group:
    """Requests that share one cache.

    Attributes:
      members: numbers of the requests, in the order in which they begin.
      rows: of them at once.
      length: positions of a row (S).
      room: new tokens of a row (M).
      draws: whether any draws its tokens.
    """

    members: list[int]
    rows: int
    length: int
    room: int
    draws: bool


class Engine:
    """A model on a mesh."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        mesh: Mesh,
        *,
        dtype: Any,
        attention: str = "auto",
        kv_cache: str | None = None,
        prefix_cache_bytes: int = 512 * 2**20,
    ) -> None:
        """Takes parameters already on the mesh; compiles nothing yet.

        Args:
          config: sizes.
          params: nested dict as `abstract_params` describes.
          mesh: from `sharding.make_mesh`.
          dtype: of arithmetic.
          attention: kernel, see `models.attention`.
          kv_cache: what keys and values are kept in, see `models.kv_cache`; by default as they are computed.
          prefix_cache_bytes: device memory for image prefixes.
        """
        self.config, self.params, self.mesh, self.dtype = config, params, mesh, jnp.dtype(dtype)
        self._model = LlavaMini(config, dtype, attention)
        self._multiple = sharding.batch_multiple(mesh)
        self.images = ImageSide(self._model, mesh, prefix_cache_bytes)
        self._helper = ThreadPoolExecutor(1, "embedding") if apart.is_lone_processor(mesh) else None
        self._place_text, self._place_vision, self._all_logits, self._loss = _jitted(self._model, mesh)
        shared = _programs(self._model, mesh, jnp.dtype(kv_cache or dtype), apart.is_apart((params or {}).get("layers")))
        self.programs = copy.copy(shared)  # so that to replace one touches no other engine

    # ---- what people call -----------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], stop_ids: Sequence[int]) -> list[list[int]]:
        """New tokens of every request, up to and with the first of `stop_ids`."""
        done = dict(self.as_completed(requests, stop_ids))
        return [done[i] for i in range(len(requests))]

    def as_completed(
        self, requests: Sequence[Request], stop_ids: Sequence[int], batch_size: int = MAX_BATCH
    ) -> Iterator[tuple[int, list[int]]]:
        """As `generate`: (number of the request, its new tokens) as they are done.

        At most `batch_size` rows generate at once, fewer where they are long; where one is done the next one enters.
        """
        stop = np.array(stop_ids, np.int32)
        for group in self._groups(requests, batch_size):
            left = group
            while left.members:
                done = set()
                try:
                    for i, tokens in self._run(requests, left, stop):
                        done.add(i)
                        yield i, tokens
                except jax.errors.JaxRuntimeError as error:  # the cache is lost with the program that it was given to
                    if left.rows <= 1 or not _exhausted(error):
                        raise failed(error) from error
                    left = dataclasses.replace(left, rows=left.rows // 2)
                left = dataclasses.replace(left, members=[i for i in left.members if i not in done])

    def most_rows(self, requests: Sequence[Request], batch_size: int = MAX_BATCH) -> int:
        """How many of the requests would generate at once, at most."""
        return max(group.rows for group in self._groups(requests, batch_size))

    def stream(self, request: Request, stop_ids: Sequence[int]) -> Iterator[int]:
        """New tokens of one request as they come, up to and with the first of `stop_ids`."""
        (group,) = self._groups([request], 1)
        seen, steps = 0, 1
        try:
            slots = self._slots(group, np.array(stop_ids, np.int32))
            x, layout = self._embed([request])
            slots.enter(x, [self._row(0, request, group, 0, layout)])
            while slots.busy:
                ((_, tokens),) = slots.leave() or slots.tokens().items()
                yield from tokens[seen:]
                seen = len(tokens)
                if slots.busy:
                    slots.advance(steps)
                    steps = min(2 * steps, STREAM_STEPS)
        except jax.errors.JaxRuntimeError as error:
            raise failed(error) from error

    def logits(self, rows: Sequence[Row], media: Sequence[Sequence[Medium]]) -> tuple[np.ndarray, Layout]:
        """Next-token logits at every position of every row: (B,T,vocab) float32, with the layout that says what T holds."""
        x, layout = self.embed(rows, media)
        with jax.set_mesh(self.mesh):
            out = self._all_logits(self.params, x)
        return np.asarray(out)[: len(rows)], layout

    def loss(self, rows: Sequence[Row], media: Sequence[Sequence[Medium]]) -> tuple[float, float]:
        """Sum of the cross-entropies of all labels in nats, and their number."""
        x, layout = self.embed(rows, media)
        with jax.set_mesh(self.mesh):
            total, count = self._loss(self.params, x, layout.labels)
        return float(total), float(count)

    def embed(
        self, rows: Sequence[Row], media: Sequence[Sequence[Medium]], between: Callable[[], None] = lambda: None
    ) -> tuple[jax.Array, Layout]:
        """The decoder's input (B,T,D), rows and lengths padded to buckets, and its layout.

        `media` holds, per row, what its placeholders stand for. A video that ends early takes the room of its real frames.
        Where images come in several chunks, `between` is called between them.
        Raises UserError where the model's context cannot hold a row.
        """
        for row in rows:
            self._check(row)
        batch = self.programs.size(len(rows))
        longest = max(fused_length(r, self.config) for r in rows)
        fused = length_bucket(longest) if longest else 1

        def arrange(rows: Sequence[Row]) -> Layout:
            length = length_bucket(max(decoder_length(r, self.config) for r in rows))
            return lay_out(rows, self.config, length=length, fused=fused, batch=batch)

        layout = arrange(rows)
        with jax.set_mesh(self.mesh):
            total, tokens, counts = self.images.take(self.params, layout, media, between)
            real = [dataclasses.replace(r, images=tuple(c)) for r, c in zip(rows, counts)]
            if any(a.images != b.images for a, b in zip(rows, real)):
                layout = arrange(real)
            images = np.bincount(layout.image_rows, minlength=batch).astype(np.float32)
            x = self._place_text(self.params, layout.ids, total, images, layout.fused_index)
            return (x if tokens is None else self._place_vision(x, tokens, layout.vision_index)), layout

    def embed_aside(self, rows: Sequence[Row], media: Sequence[Sequence[Medium]]) -> tuple[jax.Array, Layout]:
        """As `embed`, of little, while the device goes on with what this thread has asked for.

        A processor does in order what one thread asks for, so another one asks, which nothing can interrupt.
        """
        return self._helper.submit(self.embed, rows, media).result() if self._helper else self.embed(rows, media)

    def measure(self, request: Request) -> tuple[int, int]:
        """Positions that a request's prompt takes, and new tokens at most; raises UserError where there is no room for one."""
        length = self._check(request.row(), new=1)
        return length, self._limit(request, length)

    @property
    def positions(self) -> int:
        """Of all rows of one cache, at most."""
        each = position_bytes(self.config.decoder, self.programs.cache_dtype)
        return self._multiple * min(MAX_POSITIONS, CACHE_BYTES // each)

    # ---- host side of the programs --------------------------------------------------------------------------------

    def _check(self, row: Row, new: int = 0) -> int:
        """Positions the prompt takes; raises UserError where the model's context cannot hold it and `new` tokens."""
        check_row(row, self.config)
        length, limit = decoder_length(row, self.config), self.config.decoder.max_position_embeddings
        if length + new > limit:
            raise UserError(
                f"the prompt takes {length} positions with its images, the model's context is {limit}: "
                "shorten the text, give fewer images or a lower --fps"
            )
        return length

    def _groups(self, requests: Sequence[Request], most: int) -> list[_Group]:
        """Requests whose prompts and answers are of like length, `most` of which generate at once if there is memory."""
        prompts, limits = zip(*[self.measure(r) for r in requests]) if requests else ((), ())
        sizes = [_room(n, limit) for n, limit in zip(prompts, limits)]
        groups: list[list[int]] = []
        for i in sorted(range(len(requests)), key=lambda i: sizes[i]):
            if not groups or (sizes[i] > 4 * sizes[groups[-1][0]] and len(groups[-1]) >= most):
                groups.append([])
            groups[-1].append(i)
        found = []
        for members in groups:
            members.sort(key=lambda i: (-length_bucket(limits[i]), prompts[i]))  # who takes long begins early
            length = max(sizes[i] for i in members)
            rows = min(most, len(members))
            while rows > 1 and self.programs.size(rows) * length > self.positions:
                rows //= 2
            room, draws = length_bucket(max(limits[i] for i in members)), any(requests[i].sampling.draws for i in members)
            found.append(_Group(members, rows, length, room, draws))
        return found

    def _limit(self, request: Request, length: int) -> int:
        """New tokens of a request whose prompt takes so many positions."""
        return min(request.sampling.max_new_tokens, self.config.decoder.max_position_embeddings - length)

    def _slots(self, group: _Group, stop: np.ndarray) -> Slots:
        return Slots(self.programs, self.params, group.rows, group.length, group.room, stop, group.draws)

    def _run(self, requests: Sequence[Request], group: _Group, stop: np.ndarray) -> Iterator[tuple[int, list[int]]]:
        """Generates the rows of a group; the decoder input of those that come next is made while the device generates.

        A long video among them does not hold up the others: between its chunks they generate some tokens.
        """
        slots, waiting, failed = self._slots(group, stop), collections.deque(group.members), None
        ready: list[int] = []  # embedded, in this order, of which those from `entered` on have not entered
        entered = 0
        while waiting or entered < len(ready) or slots.busy:
            if slots.busy:
                more = waiting or entered < len(ready)
                slots.advance(group.room, max(1, group.rows // 4) if more else None)
            if waiting and entered == len(ready):
                ready, entered = [waiting.popleft() for _ in range(min(group.rows, len(waiting)))], 0
                try:
                    embedded = self._embed([requests[i] for i in ready], lambda: slots.advance(YIELD_STEPS))
                except UserError as error:  # of those that generate none is lost
                    failed, ready = error, []
                    waiting.clear()
            yield from slots.leave()
            count = min(slots.free, len(ready) - entered)
            if count and (not slots.busy or slots.free >= max(1, group.rows // 4)):
                x, layout = embedded
                numbers = range(entered, entered + count)
                slots.enter(x, [self._row(ready[n], requests[ready[n]], group, n, layout) for n in numbers])
                entered += count
        if failed:
            raise failed

    def _row(self, key: int, request: Request, group: _Group, number: int, layout: Layout) -> tuple[int, int, int, Sampling]:
        """What `Slots.enter` takes of a member of the group, which is the row of the layout with this number."""
        length = int(layout.lengths[number])
        limit = min(self._limit(request, length), group.room)
        return key, number, length, dataclasses.replace(request.sampling, max_new_tokens=limit)

    def _embed(self, requests: Sequence[Request], between: Callable[[], None] = lambda: None) -> tuple[jax.Array, Layout]:
        return self.embed([r.row() for r in requests], [r.media for r in requests], between)


def _room(prompt: int, new: int) -> int:
    """Positions of a slot for a prompt of so many with so many new tokens: alike for like requests, which share programs.

    The smaller of two roundings: a few tokens after a long prompt do not take the next bucket.
    """
    prompt = length_bucket(prompt)
    return min(length_bucket(prompt + new), prompt + length_bucket(new))


# ---- the programs: engines of the same model share what is compiled -------------------------------------------------


@functools.lru_cache(maxsize=8)
def _programs(model: LlavaMini, mesh: Mesh, cache_dtype: jnp.dtype, is_apart: bool) -> Programs:
    return Programs(model, mesh, cache_dtype, apart=is_apart)


@functools.lru_cache(maxsize=8)
def _jitted(model: LlavaMini, mesh: Mesh) -> tuple[Callable[..., Any], ...]:
    """Text into place; vision tokens into place; logits at every position; sum and number of the labels' cross-entropies."""

    def place_text(
        params: Any, ids: jax.Array, total: jax.Array | None, images: jax.Array, fused_index: jax.Array
    ) -> jax.Array:
        fused = None if total is None else total / jnp.maximum(images, 1)[:, None, None]
        return model.apply({"params": params}, ids, fused, fused_index, method="place_text")

    def place_vision(x: jax.Array, tokens: jax.Array, index: jax.Array) -> jax.Array:
        return model.apply({}, x, rearrange(tokens, "n v d -> 1 (n v) d"), index, method="place_vision")

    def all_logits(params: Any, x: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x, method="decode")[0]

    def loss(params: Any, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        return next_token_loss(all_logits(params, x), labels)

    return tuple(jit(f, mesh) for f in (place_text, place_vision, all_logits, loss))


def _exhausted(error: jax.errors.JaxRuntimeError) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


def failed(error: jax.errors.JaxRuntimeError) -> UserError:
    """What the user is told when the device failed or its memory is too small."""
    line = str(error).splitlines()[0]
    if _exhausted(error):
        return UserError(
            f"the device's memory is too small for this: shorten the text, give fewer images or a lower --fps ({line})"
        )
    return DeviceError(f"the device failed: {line}")
