"""Attention by whichever kernel fits: one function, `attend`.

Axis letters: B batch, T queries, S keys, N heads, K key/value heads (N is a multiple of K), H channels of a head.

    causal, T ≤ S: query t sees key s where s ≤ t + (S − T)      S →
                                                             T  x x x x . .
                                                             ↓  x x x x x .
                                                                x x x x x x

| implementation | can do | "auto" takes it |
|---|---|---|
| cudnn | bfloat16 and float16, H ≤ 128 in steps of 8, T > 1, no mask, square where causal | on NVIDIA from Ampere on |
| splash | causal, no mask | on TPU, where scores are many; XLA fuses the few as well |
| blocks | anything, in memory linear in S | elsewhere, where scores are many |
| plain | anything | elsewhere |

Whoever names an implementation gets it in every call that it can do, and blocks or plain in the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from lmm_jax import sharding
from lmm_jax.errors import UserError

IMPLEMENTATIONS = ("auto", "plain", "blocks", "cudnn", "splash", "splash_interpret")
MANY = 1024**2  # scores (T·S) per head from which on they are not all held at once
BLOCK = 256  # queries per block
PARTS, PART = 4, 192  # of causal attention on a processor: so many parts at most, of so many queries at least
NAME = "attention"  # of the result, for what a backward pass keeps
SPLASH_BLOCK, LANES = 512, 128  # splash's blocks of queries and keys: at most, and in multiples of


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    mask: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention, scores scaled by H^-½, softmax in float32.

    Args:
      q: (B,T,N,H). k, v: (B,S,K,H), same dtype.
      causal: as drawn above; the last query is aligned with the last key.
      mask: (B,T,S) bool, True where a query sees a key; excludes `causal`.
      implementation: one of IMPLEMENTATIONS, see the table above.

    Returns:
      (B,T,N,H), dtype of q.

    Raises:
      UserError: unknown implementation.
      ValueError: causal and a mask.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"there is no attention {implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if causal and mask is not None:
        raise ValueError("attend takes causal or a mask, not both")
    chosen = _choose(implementation, q, k, causal, mask)
    if chosen.startswith("splash"):  # which names its result, and what else its backward pass needs, itself
        return _on_shards(functools.partial(_splash, interpret=chosen.endswith("interpret")), q, k, v)
    if chosen == "cudnn":
        out = _on_shards(functools.partial(_cudnn, causal=causal), q, k, v)
    elif chosen == "blocks":
        out = _blocks(q, k, v, causal, mask)
    elif causal:
        out = _in_parts(q, k, v)
    else:
        out = _plain(q, k, v, mask)
    return checkpoint_name(out, NAME)


def _choose(wanted: str, q: jax.Array, k: jax.Array, causal: bool, mask: jax.Array | None) -> str:
    """The implementation that runs."""
    many = q.shape[1] * k.shape[1] >= MANY
    portable = "blocks" if many else "plain"
    platform = sharding.platform()
    if wanted == "auto" and platform == "gpu" and _is_ampere_or_later():
        wanted = "cudnn"
    elif wanted == "auto":
        wanted = "splash" if platform == "tpu" and many else portable
    able = True
    if wanted == "cudnn":  # which aligns the first query with the first key
        half = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
        able = half and mask is None and q.shape[1] > 1 and (not causal or q.shape[1] == k.shape[1])
    elif wanted.startswith("splash"):
        able = causal and mask is None
    return wanted if able else portable


def _is_ampere_or_later() -> bool:
    """Whether the GPU is one that cuDNN's attention needs; AMD's name themselves gfx…, not 8.0."""
    major = getattr(jax.local_devices()[0], "compute_capability", "").split(".")[0]
    return major.isdecimal() and int(major) >= 8


def _causal_mask(queries: int, keys: int, first: int | jax.Array) -> jax.Array:
    """(1,T,S): query t sees the keys up to `first + t`."""
    return (jnp.arange(keys) <= jnp.arange(queries)[:, None] + first)[None]


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Products with heads first and weights on the left: in another order XLA's CPU backend transposes all weights."""
    length, heads = q.shape[1], k.shape[2]
    q = rearrange(q, "b t (k g) h -> b k (g t) h", k=heads)
    k, v = (rearrange(x, "b s k h -> b k s h") for x in (k, v))
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        grouped = rearrange(scores, "b k (g t) s -> b k g t s", t=length)
        scores = jnp.where(mask[:, None, None], grouped, jnp.finfo(jnp.float32).min).reshape(scores.shape)
    if sharding.platform() == "cpu":  # there each step of a softmax goes over all scores again: the last one can wait
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        out = (jnp.matmul(weights.astype(v.dtype), v) / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    else:
        out = jnp.matmul(jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return rearrange(out, "b k (g t) h -> b t (k g) h", t=length)


def _in_parts(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal, on a processor a part of the queries after the other, each with the keys that it sees."""
    length, later = q.shape[1], k.shape[1] - q.shape[1]
    most = PARTS if sharding.platform() == "cpu" else 1  # an accelerator likes it all at once
    size = -(-length // max(1, min(most, length // PART)))
    parts = []
    for first in range(0, length, size):
        end = min(first + size, length)
        seen = _causal_mask(end - first, end + later, first + later)
        parts.append(_plain(q[:, first:end], k[:, : end + later], v[:, : end + later], seen))
    return jnp.concatenate(parts, axis=1)


def _blocks(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, mask: jax.Array | None) -> jax.Array:
    """A scan over blocks of queries, each against all keys; its backward pass computes the scores again."""
    length, keys = q.shape[1], k.shape[1]
    size = min(BLOCK, length)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -length % size)) + ((0, 0),) * (x.ndim - 2))
        return rearrange(x, "b (i t) ... -> i b t ...", t=size)

    @jax.checkpoint
    def one(xs: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        i, block, seen = xs
        if causal:
            seen = _causal_mask(size, keys, i * size + keys - length)
        return _plain(block, k, v, seen)

    blocks = split(q)
    out = jax.lax.map(one, (jnp.arange(len(blocks)), blocks, None if mask is None else split(mask)))
    return rearrange(out, "i b t n h -> b (i t) n h")[:, :length]


def _on_shards(kernel: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Runs a kernel, which the partitioner cannot see into, on every device's own rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v)
    spec = sharding.logical_spec(mesh, q.shape, "batch", None, "heads", None)
    if spec != sharding.logical_spec(mesh, k.shape, "batch", None, "kv_heads", None):
        # the mesh divides the query heads only: each takes its own copy of keys and values along
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """cuDNN's kernel. JAX refuses to differentiate it at odd lengths, so these get one more position."""
    length, keys = q.shape[1], k.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    # a padded key comes after every real query: causality alone hides it
    visible = None if causal or keys % 2 == 0 else jnp.full(len(k), keys, jnp.int32)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, key_value_seq_lengths=visible, implementation="cudnn")
    return out[:, :length]


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool) -> jax.Array:
    """The TPU's causal kernel, which leaves out blocks that no query sees."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, keys = q.shape[1], k.shape[1]
    block_q, block_kv = (min(SPLASH_BLOCK, n + -n % LANES) for n in (length, keys))

    def pad(x: jax.Array, block: int) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
        return rearrange(x, "b t n h -> b n t h")

    # padded keys come after every real query, so causality alone hides them
    q, k, v = pad(q * q.shape[-1] ** -0.5, block_q), pad(k, block_kv), pad(v, block_kv)
    mask = masks.CausalMask((q.shape[2], k.shape[2]), offset=keys - length)
    sizes = kernels.BlockSizes(
        **dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), block_q),
        **dict.fromkeys(("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq"), block_kv),
    )
    run = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * q.shape[1]), block_sizes=sizes, interpret=interpret, residual_checkpoint_name=NAME
    )
    return rearrange(jax.vmap(run)(q, k, v), "b n t h -> b t n h")[:, :length]
