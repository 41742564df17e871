"""How the programs of inference are compiled, and where they are kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from lmm_jax.sharding import platform

_LEVEL = "xla_backend_optimization_level"


def jit(function: Callable[..., Any], mesh: Mesh, **how: Any) -> Any:
    """`jax.jit` for programs on a mesh; `how` as there.

    On a processor LLVM optimises at level 1, not 3, unless XLA_FLAGS names a level: that compiles sooner, and what is compiled
    is about as fast (`benchmarks/optimization_level.py`), since libraries do the products.
    """
    light = platform(mesh) == "cpu" and _LEVEL not in os.environ.get("XLA_FLAGS", "")
    return jax.jit(function, compiler_options={_LEVEL: 1} if light else None, **how)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told where (JAX_COMPILATION_CACHE_DIR)."""
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "lmm-jax", "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # by default those that compile within a second are not
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
