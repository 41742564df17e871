"""The jitted programs of inference, and the host code that feeds them.

    images, frames ─ encode ─ fuse ─┐        chunks of images: memory does not grow with a video's length
    prompt ids ─────────────────────┴─ place ─ prefill ─ decode … decode        rows of a batch

Every shape is rounded up to a bucket, so the number of compiled programs is bounded whatever is asked.
Axis letters: B rows, N images of a chunk, P tiles, H,W pixels, T decoder positions, I instruction tokens, M new tokens,
V vision tokens per image, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct
from jax.sharding import Mesh

from lmm_jax import sharding
from lmm_jax.config import ModelConfig
from lmm_jax.data.layout import Layout, Row, check_row, decoder_length, fused_length, lay_out
from lmm_jax.errors import UserError
from lmm_jax.inference.buckets import length_bucket, power_of_two
from lmm_jax.inference.images import ImageSide, Medium, count_images
from lmm_jax.inference.sampling import Sampler, Sampling, sample
from lmm_jax.models.llama import KV, empty_cache
from lmm_jax.models.llava_mini import LlavaMini
from lmm_jax.models.loss import next_token_loss
from lmm_jax.sharding import constrain

MAX_BATCH = 32  # rows, where nothing else is asked for
MAX_POSITIONS = 32768  # rows × positions of one batch on a device, the room for answers included
CACHE_BYTES = 4 * 2**30  # keys and values of so many positions at most
STREAM_STEPS = 8  # tokens between two looks at a stream, once it runs


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue: ids with a placeholder for each medium."""

    ids: np.ndarray
    media: Sequence[Medium] = ()
    sampling: Sampling = Sampling()

    def row(self) -> Row:
        """The prompt without its pixels."""
        return Row(self.ids, tuple(count_images(m) for m in self.media))


@struct.dataclass
class DecodeState:
    """A batch in the middle of generating.

    Attributes:
      cache: keys and values, see `llama.empty_cache`.
      position: (B,) int32, where each row's newest token is written next.
      tokens: (B,M) int32, generated so far, the end token included.
      count: (B,) int32, how many of them.
      limit: (B,) int32, at most so many.
      done: (B,) bool.
      sampler: settings of the rows.
    """

    cache: dict[str, KV]
    position: jax.Array
    tokens: jax.Array
    count: jax.Array
    limit: jax.Array
    done: jax.Array
    sampler: Sampler


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
        prefix_cache_bytes: int = 512 * 2**20,
    ) -> None:
        """Takes parameters already on the mesh; compiles nothing yet.

        Args:
          config: sizes.
          params: nested dict as `abstract_params` describes.
          mesh: from `sharding.make_mesh`.
          dtype: of arithmetic and of the key/value cache.
          attention: kernel, see `models.attention`.
          prefix_cache_bytes: device memory for image prefixes.
        """
        self.config, self.params, self.mesh, self.dtype = config, params, mesh, jnp.dtype(dtype)
        self._model = LlavaMini(config, dtype, attention)
        self._multiple = sharding.batch_multiple(mesh)
        self.images = ImageSide(self._model, self._multiple, prefix_cache_bytes)
        self._place_text = jax.jit(self._place_mean)
        self._place_vision = jax.jit(
            lambda x, tokens, index: self._apply({}, "place_vision", x, rearrange(tokens, "n v d -> 1 (n v) d"), index)
        )
        self._prefill = jax.jit(self._prefill_rows, static_argnames="room")
        self._decode = jax.jit(self._decode_steps, donate_argnums=1)
        self._all_logits = jax.jit(lambda params, x: self._apply(params, "decode", x)[0])
        self._loss = jax.jit(lambda params, x, labels: next_token_loss(self._apply(params, "decode", x)[0], labels))

    # ---- what people call -----------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], stop_ids: Sequence[int]) -> list[list[int]]:
        """New tokens of every request, up to and with the first of `stop_ids`."""
        done = dict(self.as_completed(requests, stop_ids))
        return [done[i] for i in range(len(requests))]

    def as_completed(
        self, requests: Sequence[Request], stop_ids: Sequence[int], batch_size: int = MAX_BATCH
    ) -> Iterator[tuple[int, list[int]]]:
        """As `generate`: (number of the request, its new tokens) as they are done.

        Requests of like length share a batch of at most `batch_size` rows, fewer where they are long.
        """
        stop = np.array(stop_ids, np.int32)
        batches = self._batches(requests, batch_size)
        given = [[requests[i] for i in batch] for batch in batches]
        coming = self._embed(given[0]) if given else None
        for k, batch in enumerate(batches):
            state, failed = self._start(given[k], *coming, stop), None
            state = self._advance(state, stop, state.tokens.shape[1])
            try:
                coming = self._embed(given[k + 1]) if k + 1 < len(given) else None  # while the device generates
            except UserError as error:
                failed = error
            tokens, count = np.asarray(state.tokens), np.asarray(state.count)
            del state  # its cache, before there is another one
            yield from ((i, tokens[b, : count[b]].tolist()) for b, i in enumerate(batch))
            if failed:
                raise failed

    def stream(self, request: Request, stop_ids: Sequence[int]) -> Iterator[int]:
        """New tokens of one request as they come, up to and with the first of `stop_ids`."""
        self._check(request.row(), new=1)
        stop = np.array(stop_ids, np.int32)
        state, seen, steps = self._start([request], *self._embed([request]), stop), 0, 1
        while True:
            tokens, count, done = (np.asarray(x)[0] for x in (state.tokens, state.count, state.done))
            yield from tokens[seen:count].tolist()
            if done:
                return
            seen, state = count, self._advance(state, stop, steps)
            steps = min(2 * steps, STREAM_STEPS)

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

    def embed(self, rows: Sequence[Row], media: Sequence[Sequence[Medium]]) -> tuple[jax.Array, Layout]:
        """The decoder's input (B,T,D), rows and lengths padded to buckets, and its layout.

        `media` holds, per row, what its placeholders stand for. A video that ends early takes the room of its real frames.
        Raises UserError where the model's context cannot hold a row.
        """
        for row in rows:
            self._check(row)
        batch = self._multiple * power_of_two(-(-len(rows) // self._multiple))
        longest = max(fused_length(r, self.config) for r in rows)
        fused = length_bucket(longest) if longest else 1

        def arrange(rows: Sequence[Row]) -> Layout:
            length = length_bucket(max(decoder_length(r, self.config) for r in rows))
            return lay_out(rows, self.config, length=length, fused=fused, batch=batch)

        layout = arrange(rows)
        with jax.set_mesh(self.mesh):
            total, tokens, counts = self.images.take(self.params, layout, media)
            real = [dataclasses.replace(r, images=tuple(c)) for r, c in zip(rows, counts)]
            if any(a.images != b.images for a, b in zip(rows, real)):
                layout = arrange(real)
            images = np.bincount(layout.image_rows, minlength=batch).astype(np.float32)
            x = self._place_text(self.params, layout.ids, total, images, layout.fused_index)
            return (x if tokens is None else self._place_vision(x, tokens, layout.vision_index)), layout

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

    def _batches(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        """Indices grouped so that rows of one batch are of like length."""
        lengths = [self._check(r.row(), new=1) for r in requests]
        d, m = self.config.decoder, self._multiple
        position = 2 * d.num_layers * d.num_kv_heads * d.head_dim * self.dtype.itemsize
        room = m * min(MAX_POSITIONS, CACHE_BYTES // position)
        batches: list[list[int]] = []
        longest = 0  # tokens that a row of the batch may generate
        for i in sorted(range(len(requests)), key=lambda i: lengths[i]):
            longest = max(longest, requests[i].sampling.max_new_tokens)
            size = length_bucket(lengths[i]) + length_bucket(longest)
            rows = m * power_of_two(-(-(len(batches[-1]) + 1) // m)) if batches else 0
            if not batches or len(batches[-1]) == most or rows * size > room:
                batches.append([])
                longest = requests[i].sampling.max_new_tokens
            batches[-1].append(i)
        return batches

    def _embed(self, requests: Sequence[Request]) -> tuple[jax.Array, Layout]:
        return self.embed([r.row() for r in requests], [r.media for r in requests])

    def _start(self, requests: Sequence[Request], x: jax.Array, layout: Layout, stop: np.ndarray) -> DecodeState:
        context = self.config.decoder.max_position_embeddings
        limits = np.zeros(len(layout.lengths), np.int32)  # padding rows are done at once
        settings = [r.sampling for r in requests]
        limits[: len(requests)] = [min(s.max_new_tokens, context - n) for s, n in zip(settings, layout.lengths)]
        settings += [Sampling()] * (len(limits) - len(requests))
        room = length_bucket(int(limits.max()))
        with jax.set_mesh(self.mesh):
            return self._prefill(self.params, x, layout.lengths, limits, Sampler.of(settings), stop, room=room)

    def _advance(self, state: DecodeState, stop: np.ndarray, steps: int) -> DecodeState:
        with jax.set_mesh(self.mesh):
            return self._decode(self.params, state, stop, np.int32(steps))

    # ---- the programs ---------------------------------------------------------------------------------------------

    def _apply(self, params: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._model.apply({"params": params}, *args, method=method, **kwargs)

    def _place_mean(
        self, params: Any, ids: jax.Array, total: jax.Array | None, images: jax.Array, fused_index: jax.Array
    ) -> jax.Array:
        fused = None if total is None else total / jnp.maximum(images, 1)[:, None, None]
        return self._apply(params, "place_text", ids, fused, fused_index)

    def _prefill_rows(
        self, params: Any, x: jax.Array, lengths: jax.Array, limits: jax.Array, sampler: Sampler, stop: jax.Array, *, room: int
    ) -> DecodeState:
        batch, length = x.shape[:2]
        cache = empty_cache(self.config.decoder, batch, length + room, self._model.dtype)
        logits, cache = self._apply(params, "decode", x, cache=cache, queries=(lengths - 1)[:, None])
        count = jnp.zeros(batch, jnp.int32)
        token = sample(logits[:, 0], sampler, count)
        tokens = jnp.zeros((batch, room), jnp.int32).at[:, 0].set(token)
        done = jnp.isin(token, stop) | (limits <= 1)
        return _spread(DecodeState(cache, lengths, tokens, count + (limits > 0), limits, done, sampler))

    def _decode_steps(self, params: Any, state: DecodeState, stop: jax.Array, steps: jax.Array) -> DecodeState:
        """Up to `steps` tokens for every row that is not done."""
        rows = jnp.arange(state.tokens.shape[0])

        def one(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
            step, s = carry
            newest = s.tokens[rows, jnp.maximum(s.count - 1, 0)]
            x = self._apply(params, "embed", newest[:, None])
            logits, cache = self._apply(params, "decode", x, cache=s.cache, write_at=s.position)
            token = sample(logits[:, 0], s.sampler, s.count)
            going = ~s.done
            count = s.count + going
            return step + 1, s.replace(
                cache=cache,
                position=s.position + going,
                tokens=s.tokens.at[rows, jnp.where(going, s.count, s.tokens.shape[1])].set(token, mode="drop"),
                count=count,
                done=s.done | jnp.isin(token, stop) | (count >= s.limit),
            )

        def more(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
            return (carry[0] < steps) & ~carry[1].done.all()

        return _spread(jax.lax.while_loop(more, one, (jnp.int32(0), state))[1])


def _spread(state: DecodeState) -> DecodeState:
    """Rows over the batch axes: whatever made a state, it is laid out in one way, so that one program takes it."""
    rows = {name: constrain(getattr(state, name), "batch") for name in ("position", "count", "limit", "done")}
    sampler = jax.tree.map(lambda x: constrain(x, "batch"), state.sampler)
    return state.replace(tokens=constrain(state.tokens, "batch", None), sampler=sampler, **rows)
