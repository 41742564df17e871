"""From a model folder to an Assistant."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lmm_jax import checkpoint, sharding, storage
from lmm_jax.config import KV_CACHES, QUANTIZATIONS
from lmm_jax.errors import UserError
from lmm_jax.inference.assistant import Assistant
from lmm_jax.inference.compiling import use_compilation_cache
from lmm_jax.inference.engine import Engine
from lmm_jax.models import apart, quantization
from lmm_jax.models.attention import IMPLEMENTATIONS
from lmm_jax.models.llava_mini import abstract_params

DTYPES = ("float32", "bfloat16")

_M_ARENA_MAX = -8  # in glibc's malloc.h


def load(
    folder: str | os.PathLike,
    *,
    mesh: Mesh | str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    kv_cache: str | None = None,
    attention: str = "auto",
    prefix_cache_bytes: int = 512 * 2**20,
) -> Assistant:
    """Loads a model folder, each device its own shards.

    Args:
      folder: made by ``python -m conversion from-hf``.
      mesh: of `sharding.make_mesh`, or its text form ``"data=1,fsdp=8,tensor=1"``; None is one device.
      dtype: of weights and arithmetic, "float32" or "bfloat16"; None is bfloat16 on TPU and GPU, float32 on CPU.
      quantize: "int8" or "int4" keeps the decoder's weights in so many bits, see `models.quantization`.
      kv_cache: "bfloat16" or "int8" keeps the decoder's keys and values so, see `models.kv_cache`; None: as computed.
      attention: kernel, one of `models.attention.IMPLEMENTATIONS`.
      prefix_cache_bytes: device memory for pictures that may be asked about again.

    Raises:
      UserError: no model folder, not converted yet, damaged; a mesh that does not fit the devices; an unknown dtype,
        quantisation, cache or kernel.
    """
    share_heaps()
    if attention not in IMPLEMENTATIONS:
        raise UserError(f"there is no attention {attention!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"a model cannot compute in {dtype!r}: choose one of {', '.join(DTYPES)}")
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise UserError(f"weights cannot be quantised to {quantize!r}: choose one of {', '.join(QUANTIZATIONS)}")
    if kv_cache is not None and kv_cache not in KV_CACHES:
        raise UserError(f"keys and values cannot be kept in {kv_cache!r}: choose one of {', '.join(KV_CACHES)}")
    folder = storage.as_path(folder)
    config = checkpoint.read_config(folder)
    mesh = mesh if isinstance(mesh, Mesh) else sharding.make_mesh(mesh)
    use_compilation_cache()
    dtype = jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
    params = load_params(folder, abstract_params(config, mesh, dtype), mesh, quantize)
    settings = {"attention": attention, "kv_cache": kv_cache, "prefix_cache_bytes": prefix_cache_bytes}
    engine = Engine(config, params, mesh, dtype=dtype, **settings)
    return Assistant(folder, config, engine)


def load_params(folder: Path, abstract: Any, mesh: Mesh, quantize: str | None = None) -> Any:
    """The parameters of a model folder in the form that inference on a mesh wants; `abstract` as of `abstract_params`."""
    how: dict[str, Any] = {}
    if quantize:
        how = {"each": functools.partial(quantization.quantize_leaf, kind=quantize)}
    elif apart.is_wanted(abstract, mesh):
        transpose = jax.jit(lambda matrix: matrix.T)  # not jnp's: what is compiled for it goes with it
        how = {"layers_apart": True, "each": functools.partial(apart.turn, transpose=transpose)}
    elif apart.is_lone_processor(mesh):
        how = {"whole": True}
    params = checkpoint.load_params(folder, abstract, **how)
    _return_freed()
    return params


def share_heaps() -> None:
    """Has this process's threads share a heap for every four cores, unless MALLOC_ARENA_MAX says otherwise.

    By default glibc gives nearly every thread its own, and what one has freed no other may take. To be called first: threads
    that run already keep theirs.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        _glibc("mallopt", _M_ARENA_MAX, max(1, (os.cpu_count() or 1) // 4))


def _return_freed() -> None:
    """What is free in this process's heaps goes back to the system, such as what reading took and let go of."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *args: int) -> None:
    """Calls a function that glibc has, and other C libraries do not."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
    if function is not None:
        function(*args)
