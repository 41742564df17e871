"""Rows that generate side by side: fixed slots of one key/value cache, which rows enter and leave between steps.

    decoder input ─ prefill ─► keys, values, first token ─ insert ─► slots ─ decode … decode ─► tokens of finished rows

Jitted programs. A finished row's slot is free at once, so short and long answers share the device without waiting for
each other. The cache is donated from program to program and lies in memory once; only while it is made larger or smaller
(move) there are two.

Axis letters: B slots, R rows that enter, T positions of a prompt, S positions of a slot, M new tokens, D width, L layers,
K key/value heads, H their channels.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from lmm_jax.inference.buckets import power_of_two
from lmm_jax.inference.compiling import jit
from lmm_jax.inference.sampling import Sampler, Sampling, sample
from lmm_jax.models import kv_cache
from lmm_jax.models.kv_cache import Cache
from lmm_jax.models.llava_mini import LlavaMini
from lmm_jax.sharding import batch_multiple, constrain, logical_spec


@struct.dataclass
class State:
    """All slots.

    Attributes:
      cache: keys and values, see `kv_cache`.
      position: (B,) int32, where each row's newest token is written next.
      tokens: (B,M) int32, generated so far, the end token included.
      count: (B,) int32, how many of them.
      limit: (B,) int32, at most so many.
      done: (B,) bool; a slot that is free is done.
      sampler: settings of the rows.
    """

    cache: dict[str, Cache]
    position: jax.Array
    tokens: jax.Array
    count: jax.Array
    limit: jax.Array
    done: jax.Array
    sampler: Sampler


class Programs:
    """What is compiled, once for every combination of sizes."""

    def __init__(self, model: LlavaMini, mesh: Mesh, cache_dtype: Any, *, apart: bool = False) -> None:
        """Compiles nothing yet; `apart` tells whether the decoder's layers are, see `models.apart`."""
        self.model, self.mesh, self._multiple = model, mesh, batch_multiple(mesh)
        self.cache_dtype = jnp.dtype(cache_dtype)
        self._cache = functools.partial(kv_cache.empty, model.config.decoder, dtype=self.cache_dtype, apart=apart)
        self.empty = jit(self._empty, mesh, static_argnums=(0, 1, 2, 3))
        self.prefill = jit(self._prefill, mesh)
        self.insert = jit(self._insert, mesh, donate_argnums=0)
        self.decode = jit(self._decode, mesh, donate_argnums=1)
        self.move = jit(self._move, mesh, static_argnums=(2, 3))
        self.end = jit(self._end, mesh)

    def size(self, rows: int) -> int:
        """Rows rounded up to a power of two for each part of the mesh that takes some."""
        return self._multiple * power_of_two(-(-rows // self._multiple))

    def _apply(self, params: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.model.apply({"params": params}, *args, method=method, **kwargs)

    def _empty(self, rows: int, length: int, room: int, draws: bool) -> State:
        cache = self._cache(rows, length)
        zeros = jnp.zeros(rows, jnp.int32)
        sampler = jax.tree.map(jnp.asarray, Sampler.of([Sampling()] * rows, draws))
        return _spread(State(cache, zeros, jnp.zeros((rows, room), jnp.int32), zeros, zeros, zeros == 0, sampler))

    def _prefill(self, params: Any, x: jax.Array, rows: jax.Array, lengths: jax.Array) -> tuple[dict[str, Cache], jax.Array]:
        """x (N,T,D), of which `rows` (R,) enter -> keys and values of R rows, logits (R,V) after `lengths` (R,) positions."""
        x = constrain(x[rows], "batch", None, None)
        cache = self._cache(*x.shape[:2])
        logits, cache = self._apply(params, "decode", x, cache=cache, queries=(lengths - 1)[:, None])
        return cache, logits[:, 0]

    def _insert(
        self,
        state: State,
        new: dict[str, Cache],
        logits: jax.Array,
        slots: jax.Array,
        lengths: jax.Array,
        limits: jax.Array,
        sampler: Sampler,
        stop: jax.Array,
    ) -> State:
        """Rows enter their `slots` (R,), with their first token; those whose slot is B are padding and enter nowhere."""
        count = jnp.zeros(len(slots), jnp.int32)
        token = sample(logits, sampler, count)
        done = _is_end(token, stop, sampler) | (limits <= 1)

        def put(old: jax.Array, entering: jax.Array) -> jax.Array:
            return old.at[slots].set(entering, mode="drop")

        cache = {name: jax.tree.map(functools.partial(self._copy, name, slots), state.cache[name], new[name]) for name in new}
        return _spread(
            State(
                cache,
                put(state.position, lengths),
                put(state.tokens, jnp.zeros((len(slots), state.tokens.shape[1]), jnp.int32).at[:, 0].set(token)),
                put(state.count, count + 1),
                put(state.limit, limits),
                put(state.done, done),
                jax.tree.map(put, state.sampler, sampler),
            )
        )

    def _copy(self, name: str, slots: jax.Array, cache: jax.Array, new: jax.Array) -> jax.Array:
        """A leaf (…,R,K,T,…) into slots of (…,B,K,S,…), on the devices that hold each; nothing else is touched."""
        axes = (kv_cache.STACK_AXES if name == "stack" else kv_cache.LAYER_AXES)[: cache.ndim]
        rows = axes.index("batch")
        held = logical_spec(self.mesh, cache.shape, *axes)
        entering = logical_spec(self.mesh, new.shape, *(None if a == "batch" else a for a in axes))
        over = held[rows] or ()

        def local(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
            here = cache.shape[rows]
            where = slots - here * jax.lax.axis_index(over) if over else slots

            def one(i: jax.Array, cache: jax.Array) -> jax.Array:
                row = jax.lax.dynamic_slice_in_dim(new, i, 1, rows)
                start = [jnp.int32(0)] * cache.ndim
                start[rows] = jnp.clip(where[i], 0, here - 1)
                old = jax.lax.dynamic_slice(cache, start, row.shape)
                is_here = (where[i] >= 0) & (where[i] < here)
                return jax.lax.dynamic_update_slice(cache, jnp.where(is_here, row, old), start)

            return jax.lax.fori_loop(0, len(slots), one, cache)

        if self.mesh.size == 1:
            return local(cache, new, slots)
        specs = (held, entering, PartitionSpec())
        return jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=held, check_vma=False)(cache, new, slots)

    def _decode(self, params: Any, state: State, stop: jax.Array, steps: jax.Array, enough: jax.Array) -> State:
        """Up to `steps` tokens for every row that is not done, or until `enough` slots are free."""
        rows = jnp.arange(state.tokens.shape[0])

        def one(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            step, s = carry
            newest = s.tokens[rows, jnp.maximum(s.count - 1, 0)]
            x = self._apply(params, "embed", newest[:, None])
            going = ~s.done  # what another row writes nobody reads; at the start, so that it does not count as long
            logits, cache = self._apply(params, "decode", x, cache=s.cache, write_at=jnp.where(going, s.position, 0))
            token = sample(logits[:, 0], s.sampler, s.count)
            count = s.count + going
            return step + 1, s.replace(
                cache=cache,
                position=s.position + going,
                tokens=s.tokens.at[rows, jnp.where(going, s.count, s.tokens.shape[1])].set(token, mode="drop"),
                count=count,
                done=s.done | _is_end(token, stop, s.sampler) | (count >= s.limit),
            )

        def more(carry: tuple[jax.Array, State]) -> jax.Array:
            return (carry[0] < steps) & (carry[1].done.sum() < enough)

        return _spread(jax.lax.while_loop(more, one, (jnp.int32(0), state))[1])

    def _move(self, state: State, source: jax.Array, length: int, room: int) -> State:
        """Slots of another size: slot b takes what `source` (B′,) says, or nothing and is free where that is past the last."""
        empty = self._empty(source.shape[0], length, room, state.sampler.temperature is not None)

        def rows(new: jax.Array, old: jax.Array, axis: int = 0) -> jax.Array:
            moved = jnp.take(old, source, axis, mode="fill", fill_value=0)
            common = tuple(slice(min(a, b)) for a, b in zip(new.shape, moved.shape))
            return jnp.zeros_like(new).at[common].set(moved[common])

        def cached(name: str) -> Cache:
            axes = kv_cache.STACK_AXES if name == "stack" else kv_cache.LAYER_AXES

            def leaf(new: jax.Array, old: jax.Array) -> jax.Array:
                return constrain(rows(new, old, axes.index("batch")), *axes[: new.ndim])

            return jax.tree.map(leaf, empty.cache[name], state.cache[name])

        cache = {name: cached(name) for name in empty.cache}
        there = source < state.done.shape[0]
        moved = jax.tree.map(rows, empty.replace(cache=None), state.replace(cache=None))
        return _spread(moved.replace(cache=cache, done=moved.done | ~there))

    def _end(self, done: jax.Array, left: jax.Array) -> jax.Array:
        """Rows that are not wanted any more, `left` (B,) bool, are done."""
        return constrain(done | left, "batch")


class _Held(NamedTuple):
    """Who is in a slot, and how many new tokens it may have."""

    key: Hashable
    limit: int


class Slots:
    """The slots of one cache and who is in them."""

    def __init__(
        self, programs: Programs, params: Any, rows: int, length: int, room: int, stop: np.ndarray, draws: bool = True
    ) -> None:
        """All slots are free.

        Args:
          programs: of the model.
          params: of the model.
          rows: how many at once; there may be more slots, see `Programs.size`.
          length: positions of each (S), at least those of any prompt's bucket, and of any prompt with its answer.
          room: new tokens (M), at least those of any answer.
          stop: token ids that end an answer.
          draws: whether rows may draw their tokens; programs take longer to compile then.
        """
        self._programs, self._params, self._stop, self._draws = programs, params, stop, draws
        self._held: dict[int, _Held] = {}  # slot -> who is in it
        self._rows, self._size = rows, programs.size(rows)
        with jax.set_mesh(programs.mesh):
            self._state = programs.empty(self._size, length, room, draws)

    @property
    def busy(self) -> int:
        """Rows that have a slot."""
        return len(self._held)

    @property
    def free(self) -> int:
        """Rows that may enter."""
        return self._rows - len(self._held)

    @property
    def is_ready(self) -> bool:
        """Whether the device has done all that was asked of it."""
        return self._state.done.is_ready()

    def enter(self, x: jax.Array, rows: Sequence[tuple[Hashable, int, int, Sampling]]) -> None:
        """Rows enter free slots and have their first token.

        Args:
          x: (N,T,D), decoder inputs padded right.
          rows: of each that enters what `leave` calls it, its number in x, how many of its positions are real, and its
            settings, whose max_new_tokens is at most the room, and 1 at least.
        """
        programs = self._programs
        slots = [slot for slot in range(self._size) if slot not in self._held][: len(rows)]
        self._held |= {slot: _Held(key, s.max_new_tokens) for slot, (key, *_, s) in zip(slots, rows)}
        padding = programs.size(len(rows)) - len(rows)
        rows = [*rows, *[rows[0]] * padding]  # which enter a slot that is not there
        slots += [self._size] * padding
        _, index, lengths, settings = zip(*rows)
        where, index, lengths = (np.array(of, np.int32) for of in (slots, index, lengths))
        limits = np.array([s.max_new_tokens for s in settings], np.int32)
        with jax.set_mesh(programs.mesh):
            cache, logits = programs.prefill(self._params, x, index, lengths)
            told = (where, lengths, limits, Sampler.of(settings, self._draws), self._stop)
            self._state = programs.insert(self._state, cache, logits, *told)

    def advance(self, steps: int, enough: int | None = None) -> None:
        """Starts to generate up to `steps` tokens for each row, until `enough` rows may enter; None: until all are done.

        Does not wait for the device, and does nothing where no row has a slot, or none may have more than its first token.
        """
        if all(row.limit <= 1 for row in self._held.values()):
            return
        enough = self._size if enough is None else self._size - self._rows + min(enough, self._rows)
        with jax.set_mesh(self._programs.mesh):
            self._state = self._programs.decode(self._params, self._state, self._stop, np.int32(steps), np.int32(enough))

    def leave(self) -> list[tuple[Hashable, list[int]]]:
        """Finished rows with their tokens; their slots are free from now on. Waits for the device."""
        done = np.asarray(self._state.done) if self._held else ()
        finished = {slot: row.key for slot, row in self._held.items() if done[slot]}
        if not finished:
            return []
        self._held = {slot: row for slot, row in self._held.items() if slot not in finished}
        tokens, count = np.asarray(self._state.tokens), np.asarray(self._state.count)
        return [(key, tokens[slot, : count[slot]].tolist()) for slot, key in finished.items()]

    def tokens(self) -> dict[Hashable, list[int]]:
        """What each row has generated so far. Waits for the device."""
        tokens, count = np.asarray(self._state.tokens), np.asarray(self._state.count)
        return {row.key: tokens[slot, : count[slot]].tolist() for slot, row in self._held.items()}

    def drop(self, keys: Collection[Hashable]) -> None:
        """These rows' slots are free from now on, finished or not."""
        left = np.zeros(self._size, bool)
        left[[slot for slot, row in self._held.items() if row.key in keys]] = True
        if left.any():
            self._held = {slot: row for slot, row in self._held.items() if not left[slot]}
            with jax.set_mesh(self._programs.mesh):
                self._state = self._state.replace(done=self._programs.end(self._state.done, left))

    def resize(self, rows: int, length: int, room: int) -> None:
        """Other sizes, as for `__init__`; rows that have a slot go on, so that the sizes must hold them."""
        if len(self._held) > rows:
            raise ValueError(f"{len(self._held)} rows have a slot, {rows} would not hold them")
        size = self._programs.size(rows)
        source = np.full(size, self._size, np.int32)
        source[: len(self._held)] = list(self._held)
        with jax.set_mesh(self._programs.mesh):
            self._state = self._programs.move(self._state, source, length, room)
        self._held = dict(enumerate(self._held.values()))
        self._rows, self._size = rows, size


def _is_end(token: jax.Array, stop: jax.Array, sampler: Sampler) -> jax.Array:
    return jnp.isin(token, stop) & ~sampler.ignore_eos


def _spread(state: State) -> State:
    """Rows over the batch axes: whatever made a state, it is laid out in one way, so that one program takes it."""
    rows = {name: constrain(getattr(state, name), "batch") for name in ("position", "count", "limit", "done")}
    sampler = jax.tree.map(lambda x: constrain(x, "batch"), state.sampler)
    return state.replace(tokens=constrain(state.tokens, "batch", None), sampler=sampler, **rows)
