"""What a device would hold while questions are answered: the engine's programs are compiled, none is run.

The engine goes through all it does for its requests, with shapes instead of arrays. So sizes that no memory here would hold
are known beforehand, also for devices that are not here (`jax.experimental.topologies`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmm_jax import sharding
from lmm_jax.config import ModelConfig
from lmm_jax.errors import UserError
from lmm_jax.inference.engine import Engine, Request
from lmm_jax.models import apart, quantization
from lmm_jax.models.llava_mini import abstract_params
from lmm_jax.sharding import leaf_paths


@dataclasses.dataclass
class Program:
    """One compiled program; bytes are those of one device.

    Attributes:
      name: of the engine's attribute.
      runs: how often it would have run.
      temporaries: beside its arguments and results.
      peak: most that is alive in any of its runs: parameters, what the engine keeps, arguments, results, temporaries.
      text: the compiled program.
    """

    name: str
    runs: int
    temporaries: int
    peak: int
    text: str


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What was compiled.

    Attributes:
      parameters: bytes of one device.
      programs: in order of their first run; one for each combination of sizes.
      rows: that generate at once, at most.
    """

    parameters: int
    programs: list[Program]
    rows: int

    @property
    def peak(self) -> int:
        """Most bytes that one device holds."""
        return max(p.peak for p in self.programs)


def rehearse(
    config: ModelConfig,
    requests: Sequence[Request],
    mesh: Mesh,
    *,
    dtype: Any,
    quantize: str | None = None,
    kv_cache: str | None = None,
    attention: str = "auto",
) -> Rehearsal:
    """Compiles what it takes to answer requests with full answers.

    Args:
      config: sizes of the model.
      requests: their pixels are not looked at.
      mesh: of devices that are here or of a topology.
      dtype, quantize, kv_cache, attention: as `loading.load` takes them.

    Raises:
      TooLargeError: a program does not fit into the memory of the devices.
    """
    held = _Held(sharding.platform(mesh))
    params = abstract_params(config, mesh, dtype)
    if quantize:
        paths = iter(leaf_paths(params))
        params = jax.tree.map(lambda leaf: _quantized(next(paths), leaf, quantize), params)
    elif apart.is_lone_processor(mesh):
        unsplit = NamedSharding(mesh, PartitionSpec())
        shapes = jax.eval_shape(lambda p: apart.as_loaded(p, mesh), params)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=unsplit), shapes)
    held.bytes = parameters = sum(map(device_bytes, jax.tree.leaves(params)))
    engine = Engine(config, params, mesh, dtype=dtype, kv_cache=kv_cache, attention=attention, prefix_cache_bytes=0)
    programs: list[Program] = []
    for owner in (engine, engine.images, engine.programs):
        for name, value in vars(owner).items():
            if isinstance(value, jax.stages.Wrapped):
                setattr(owner, name, _Rehearsed(name.strip("_"), value, programs, held))
    collections.deque(engine.as_completed(requests, ()), maxlen=0)
    return Rehearsal(parameters, programs, engine.most_rows(requests))


class TooLargeError(UserError):
    """A program needs more memory than its devices have.

    Attributes:
      needed: bytes of one device, at least; None where the compiler does not tell.
    """

    def __init__(self, needed: float | None) -> None:
        """Made by `compile_for`."""
        size = "more memory than there is" if needed is None else f"{needed / 1e9:.1f} GB"
        super().__init__(f"the program would take {size} on a device: more devices, fewer rows, or shorter ones")
        self.needed = needed


def compile_for(lowered: jax.stages.Lowered, options: Mapping[str, str] | None = None) -> jax.stages.Compiled:
    """Compiles, with options of the compiler.

    Raises:
      TooLargeError: the devices have not enough memory.
      UserError: another reason of the compiler.
    """
    try:
        return lowered.compile(compiler_options=dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"the compiler refuses the program: {str(error).splitlines()[0]}") from error
        said = r"Used ([\d.]+)([KMGT]) of \S+ hbm|HLO temporaries \(([\d.]+)([KMGT])\)"  # all; or temporaries alone
        used = re.search(said, str(error))
        number, unit = [part for part in used.groups() if part] if used else ("", "")
        raise TooLargeError(float(number) * 2 ** (10 * ("KMGT".index(unit) + 1)) if used else None) from error


class _Held:
    """Bytes of a device that are taken."""

    def __init__(self, platform: str) -> None:
        self.platform, self.bytes = platform, 0


class _Array:
    """The shape of an array; takes its bytes as long as it lives. Read back, it is full of ones: every row is done."""

    def __init__(self, shape: jax.ShapeDtypeStruct, held: _Held) -> None:
        self.abstract, self.shape, self.dtype = shape, shape.shape, shape.dtype
        self._held, self._bytes = held, device_bytes(shape)
        held.bytes += self._bytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.ones(self.shape, dtype or self.dtype)

    def block_until_ready(self) -> _Array:
        return self

    def release(self) -> None:
        self._held.bytes -= self._bytes
        self._bytes = 0

    def __del__(self) -> None:
        self.release()


class _Rehearsed:
    """Stands for a jitted function: takes arrays or their shapes, gives the shapes of its results."""

    def __init__(self, name: str, jitted: Any, programs: list[Program], held: _Held) -> None:
        self._name, self._jitted, self._programs, self._held = name, jitted, programs, held
        self._known: dict[str, tuple[Program, Any, list[bool], int]] = {}

    def __call__(self, *args: Any) -> Any:
        abstract = jax.tree.map(_abstract, args)
        key = str(abstract)
        if key not in self._known:
            self._known[key] = self._compile(abstract)
        program, results, donated, new = self._known[key]
        arrays = [x for x in jax.tree.leaves(args) if hasattr(x, "shape")]
        from_host = sum(x.nbytes for x in arrays if isinstance(x, (np.ndarray, np.generic)))
        program.runs += 1
        program.peak = max(program.peak, self._held.bytes + from_host + new)
        for array, is_donated in zip(arrays, donated, strict=True):
            if is_donated:
                array.release()
        return jax.tree.map(lambda x: _Array(x, self._held), results)

    def _compile(self, args: Sequence[Any]) -> tuple[Program, Any, list[bool], int]:
        lowered = self._jitted.lower(*args)
        compiled = compile_for(lowered)
        memory = compiled.memory_analysis()
        new = beside_arguments(memory, self._held.platform)
        temporaries = new - memory.output_size_in_bytes + memory.alias_size_in_bytes
        program = Program(self._name, 0, temporaries, 0, compiled.as_text())
        self._programs.append(program)
        results = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            lowered.out_info,
            compiled.output_shardings,
        )
        donated = [info.donated for info in jax.tree.leaves(lowered.args_info)]
        return program, results, donated, new


def _abstract(x: Any) -> Any:
    if isinstance(x, _Array):
        return x.abstract
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, (np.ndarray, np.generic)) else x


def beside_arguments(memory: Any, platform: str) -> int:
    """Bytes of results and temporaries that are alive at once, from `jax.stages.Compiled.memory_analysis`.

    libtpu's sum of temporaries counts some room more than once; what it calls the peak holds the arguments, too.
    """
    if platform == "tpu" and memory.peak_memory_in_bytes:
        return max(0, memory.peak_memory_in_bytes - memory.argument_size_in_bytes)
    return memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def device_bytes(x: jax.ShapeDtypeStruct) -> int:
    """Of an array, on one device."""
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return math.ceil(math.prod(shape) * _bits(x.dtype) / 8)


def _bits(dtype: Any) -> int:
    return 4 if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize


def _quantized(path: str, leaf: jax.ShapeDtypeStruct, kind: str) -> Any:
    """A parameter as `quantization.quantize_leaf` gives it."""
    lowered = jax.jit(functools.partial(quantization.quantize_leaf, path, kind=kind)).lower(leaf)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        lowered.compile().output_shardings,
    )
