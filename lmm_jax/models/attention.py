"""Attention by whichever kernel fits: one function, `attend`.

Axis letters: B batch, T queries, S keys, N heads, K key/value heads (N is a multiple of K), H channels of a head.

    causal, T ≤ S: query t sees key s where s ≤ t + (S − T)      S →
                                                             T  x x x x . .
                                                             ↓  x x x x x .
                                                                x x x x x x

| implementation | where | when |
|---|---|---|
| cudnn | NVIDIA, fp16/bf16 | no explicit mask, and square where causal |
| splash | TPU | causal and square, from 1,024 tokens; shorter ones fit XLA's own fusion |
| blocks | anywhere | otherwise, where there is no explicit mask and scores are many: blocks of queries, memory linear in S |
| plain | anywhere | otherwise |
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from lmm_jax import sharding

IMPLEMENTATIONS = ("auto", "plain", "blocks", "cudnn", "splash", "splash_interpret")
LONG = 1024  # T·S from the square of this on, scores are no longer held at once
BLOCK = 256  # queries per block


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
      implementation: one of IMPLEMENTATIONS; "auto" chooses by platform, shape and dtype.

    Returns:
      (B,T,N,H), dtype of q.
    """
    if implementation == "auto":
        implementation = _choose(q, k, causal, mask)
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    if implementation.startswith("splash"):
        return _splash(q, k, v, interpret=implementation.endswith("interpret"))
    if implementation == "blocks":
        return _blocks(q, k, v, causal)
    if causal:
        mask = _causal_mask(q.shape[1], k.shape[1], k.shape[1] - q.shape[1])
    return _plain(q, k, v, mask)


def _choose(q: jax.Array, k: jax.Array, causal: bool, mask: jax.Array | None) -> str:
    platform = jax.default_backend()
    square = q.shape[1] == k.shape[1]
    long = q.shape[1] * k.shape[1] >= LONG**2
    if platform == "gpu" and mask is None and (square or not causal) and q.shape[1] > 1 and _fits_cudnn(q):
        return "cudnn"
    if platform == "tpu" and causal and square and long and q.shape[-1] % 128 == 0:
        return "splash"
    return "blocks" if long and mask is None else "plain"


def _fits_cudnn(q: jax.Array) -> bool:
    """cuDNN takes half precision and heads of up to 128 channels in multiples of 8."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _causal_mask(queries: int, keys: int, first: int | jax.Array) -> jax.Array:
    """(1,T,S): query t sees the keys up to `first + t`."""
    return (jnp.arange(keys) <= jnp.arange(queries)[:, None] + first)[None]


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    mask = None if mask is None else mask[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def _blocks(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """A scan over blocks of queries, each against all keys; its backward pass computes the scores again."""
    length, keys = q.shape[1], k.shape[1]
    q = jnp.pad(q, ((0, 0), (0, -length % BLOCK), (0, 0), (0, 0)))
    blocks = rearrange(q, "b (i t) n h -> i b t n h", t=BLOCK)

    @jax.checkpoint
    def one(xs: tuple[jax.Array, jax.Array]) -> jax.Array:
        i, block = xs
        return _plain(block, k, v, _causal_mask(BLOCK, keys, i * BLOCK + keys - length) if causal else None)

    out = jax.lax.map(one, (jnp.arange(len(blocks)), blocks))
    return rearrange(out, "i b t n h -> b (i t) n h")[:, :length]


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool) -> jax.Array:
    """The TPU's block-sparse kernel, causal and square. Opaque to the partitioner, hence the shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    kernel = functools.partial(_splash_local, interpret=interpret)
    if not mesh.empty and mesh.size > 1:
        heads = sharding.logical_spec(mesh, k.shape, "batch", None, "kv_heads", None)
        kernel = jax.shard_map(kernel, in_specs=(heads,) * 3, out_specs=heads, check_vma=False)
    return kernel(q, k, v)


def _splash_local(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    pad = -length % 128  # padded keys come after every real query, so causality alone hides them
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q * q.shape[-1] ** -0.5, k, v))
    size = next(b for b in (512, 384, 256, 128) if (length + pad) % b == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = kernels.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), size))
    mask = masks.MultiHeadMask([masks.CausalMask((length + pad, length + pad))] * groups)
    run = kernels.make_splash_mqa_single_device(mask, block_sizes=sizes, interpret=interpret)
    q = rearrange(q, "b t (k g) h -> b k g t h", g=groups)
    k, v = (rearrange(x, "b s k h -> b k s h") for x in (k, v))
    out = jax.vmap(jax.vmap(run))(q, k, v)
    return rearrange(out, "b k g t h -> b t (k g) h")[:, :length]
