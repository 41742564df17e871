"""LLaVA-Mini: composition of the parts, no arithmetic of its own (paper figure 6, spec sections 4-6).

    pixels ── encode_image ──► ImagePrefix ─┐
                                            ├─ fuse_text ──► fused text ── place_text ─┐
    instruction ids ── embed ───────────────┘                                          ├─ place_vision ── decode ──► logits
    ImagePrefix.tokens ────────────────────────────────────────────────────────────────┘

The image side never depends on the question, so an ImagePrefix serves every question about its image. Without compressor
and pre-fusion layers the same composition is LLaVA-v1.5: all projected features are tokens, and text is not fused.

Axis letters: B rows, N images (a flat axis over all rows), P tiles per image, H,W pixels, G patch grid side, n tiles per side,
V vision tokens per image, S prefix length, T decoder positions, I instruction tokens, D width, Dv vision width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from lmm_jax import sharding
from lmm_jax.config import ModelConfig
from lmm_jax.models import clip_vit, layers, prefusion
from lmm_jax.models.compressor import Compressor
from lmm_jax.models.kv_cache import Cache
from lmm_jax.models.llama import KV, LayerStack, Step
from lmm_jax.models.projector import Projector
from lmm_jax.models.shapes import param_shapes
from lmm_jax.sharding import constrain


@struct.dataclass
class ImagePrefix:
    """All that the rest of the model needs of an image.

    Attributes:
      layers: keys and values in each pre-fusion layer, {"stack": (L−1,N,S,K,H) twice, "last": (N,S,K,H) twice}; {} without
        pre-fusion layers.
      tokens: vision tokens for the decoder (N,V,D).
    """

    layers: dict[str, KV]
    tokens: jax.Array


class LlavaMini(nn.Module):
    """The model. Use its methods through ``model.apply({"params": params}, …, method="encode_image")``.

    Attributes:
      config: sizes.
      dtype: in which arithmetic runs; parameters are cast to it where they are used.
      attention: kernel, one of `attention.IMPLEMENTATIONS`.
      remat: what a backward pass computes again, see `layers.rematerialised`.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"

    def setup(self) -> None:
        """Declares the parts under their Hugging Face names."""
        c = self.config
        self.vision_tower = clip_vit.VisionTower(c.vision, self.attention, self.remat)
        self.mm_projector = Projector(c.vision.hidden_size, c.decoder.hidden_size)
        if c.compressor:
            self.compressor = Compressor(c.compressor, c.vision.hidden_size)
        if c.prefusion_layers:
            self.prefusion_layers = LayerStack(c.decoder, c.prefusion_layers, self.remat)
        self.embed_tokens = layers.Embed(c.decoder.vocab_size, c.decoder.hidden_size)
        self.layers = LayerStack(c.decoder, c.decoder.num_layers, self.remat)
        self.norm = layers.RMSNorm(c.decoder.rms_norm_eps)
        if not c.decoder.tie_word_embeddings:
            self.lm_head = layers.Proj((c.decoder.hidden_size,), (c.decoder.vocab_size,), float32=True)

    # ---- the image side -------------------------------------------------------------------------------------------

    def encode_image(self, pixels: jax.Array) -> ImagePrefix:
        """pixels (N,P,H,W,3), uint8 or normalised float -> ImagePrefix of N images."""
        c = self.config
        features = self.vision_features(pixels)
        tiles, whole = features[:, :-1], features[:, -1]  # (N,P−1,G²,Dv), (N,G²,Dv)
        if not c.compressor:
            return ImagePrefix({}, self.mm_projector(whole))
        if c.resolution_ratio > 1:
            fine = self.stitch(tiles)
            tokens = self.mm_projector(self.compress(fine)[0])
            parts = [self.mm_projector(fine), self.mm_projector(whole), tokens]
        else:
            tokens = self.mm_projector(self.compress(whole)[0])
            parts = [self.mm_projector(whole), tokens]
        if not c.prefusion_layers:
            return ImagePrefix({}, tokens)
        x = constrain(jnp.concatenate(parts, axis=1), "batch", None, None)
        return ImagePrefix(*prefusion.fuse_image(self.prefusion_layers, x, c.tokens_per_image, c.decoder, self.attention))

    def vision_features(self, pixels: jax.Array) -> jax.Array:
        """pixels (N,P,H,W,3) -> CLIP features (N,P,G²,Dv)."""
        if pixels.dtype == jnp.uint8:
            pixels = clip_vit.normalize_pixels(pixels)
        flat = rearrange(pixels.astype(self.dtype), "n p h w c -> (n p) h w c")
        return rearrange(self.vision_tower(flat), "(n p) s d -> n p s d", p=pixels.shape[1])

    def stitch(self, tiles: jax.Array) -> jax.Array:
        """Tile features (N,n²,G²,Dv) -> one grid, row-major (N,(nG)²,Dv)."""
        n, g = self.config.resolution_ratio, self.config.vision.grid
        return rearrange(tiles, "b (r c) (y x) d -> b (r y c x) d", r=n, c=n, y=g, x=g)

    def compress(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features (N,S,Dv) on a square grid -> compressed tokens (N,C²,Dv), compression map (N,C²,S)."""
        return self.compressor(features)

    def project(self, x: jax.Array) -> jax.Array:
        """(…, Dv) -> (…, D)."""
        return self.mm_projector(x)

    # ---- the text side --------------------------------------------------------------------------------------------

    def embed(self, ids: jax.Array) -> jax.Array:
        """ids (…) int32 -> word embeddings (…, D)."""
        table = constrain(self.embed_tokens().astype(self.dtype), "vocab", None)  # else the gather replicates it
        return table[ids]

    def fuse_text(self, text: jax.Array, prefix: ImagePrefix) -> jax.Array:
        """Instruction embeddings text (R,I,D) of N images, R/N rows of each in turn, padded right -> fused text (R,I,D).

        Word embeddings enter without gradient (spec section 4).
        """
        text = constrain(jax.lax.stop_gradient(text), "batch", None, None)
        return prefusion.fuse_text(self.prefusion_layers, text, prefix.layers, self.config.decoder, self.attention)

    def place_text(self, ids: jax.Array, fused: jax.Array | None, fused_index: jax.Array) -> jax.Array:
        """The decoder's input but for its vision tokens (spec section 5).

        Args:
          ids: (B,T) int32, what stands at each position that is not fused.
          fused: (B,I,D), mean over each row's images; None where no row has an image, and without pre-fusion layers.
          fused_index: (B,T) int32 into I, −1 where not fused.

        Returns:
          (B,T,D).
        """
        x = self.embed(ids)
        if fused is not None:
            with_image = (fused_index >= 0).any(axis=1)[:, None, None]
            x = jnp.where(with_image, jax.lax.stop_gradient(x), x)
            at = jnp.maximum(fused_index, 0)[..., None]
            x = jnp.where(fused_index[..., None] >= 0, jnp.take_along_axis(fused.astype(x.dtype), at, axis=1), x)
        return constrain(x, "batch", None, None)

    def place_vision(self, x: jax.Array, tokens: jax.Array, vision_index: jax.Array) -> jax.Array:
        """Puts vision tokens in their places (spec section 5).

        Args:
          x: (B,T,D), from `place_text`.
          tokens: (B,M,D), each row's own, or (1,M,D), those of all rows.
          vision_index: (B,T) int32 into M, −1 where no vision token.

        Returns:
          (B,T,D).
        """
        at = jnp.maximum(vision_index, 0)[..., None]
        if tokens.shape[0] == 1:
            found = tokens[0][at[..., 0]]
        else:
            found = jnp.take_along_axis(tokens, at, axis=1)
        return constrain(jnp.where(vision_index[..., None] >= 0, found.astype(x.dtype), x), "batch", None, None)

    # ---- the decoder ----------------------------------------------------------------------------------------------

    def decode(
        self,
        x: jax.Array,
        *,
        cache: dict[str, Cache] | None = None,
        write_at: jax.Array | None = None,
        queries: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Cache] | None]:
        """Decoder layers, final norm and head: `logits` of what `hidden` gives."""
        x, cache = self.hidden(x, cache=cache, write_at=write_at, queries=queries)
        return self.logits(x), cache

    def hidden(
        self,
        x: jax.Array,
        *,
        cache: dict[str, Cache] | None = None,
        write_at: jax.Array | None = None,
        queries: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Cache] | None]:
        """Decoder layers and final norm.

        Args:
          x: (B,T,D), each row padded right; or (B,1,D) in a decode step.
          cache: keys and values to fill, see `kv_cache`.
          write_at: (B,) int32, in a decode step the position of the new token.
          queries: (B,Q) int32, ascending: the positions of each row that are wanted; None for all.

        Returns:
          (B,T,D) or (B,Q,D); the cache.
        """
        d = self.config.decoder
        positions = jnp.arange(x.shape[1]) if write_at is None else write_at[:, None]
        rope = layers.rotary_table(positions, layers.rotary_frequencies(d.head_dim, d.rope_theta, d.rope_scaling))
        x, _, cache = self.layers(x, Step(rope, write_at, queries, implementation=self.attention), cache=cache)
        return self.norm(x), cache

    def logits(self, x: jax.Array) -> jax.Array:
        """x (B,T,D), from `hidden` -> (B,T,vocab) float32."""
        if self.config.decoder.tie_word_embeddings:
            y = jnp.einsum("btd,vd->btv", x, self.embed_tokens().astype(x.dtype), preferred_element_type=jnp.float32)
        else:
            y = self.lm_head(x)
        return constrain(y, "batch", None, "vocab")

    def __call__(self, pixels: jax.Array, ids: jax.Array) -> jax.Array:
        """Touches every parameter, for initialisation: pixels (1,P,H,W,3), ids (1,I) -> logits (1,I+V,vocab)."""
        prefix = self.encode_image(pixels)
        text = self.embed(ids)
        fused = self.fuse_text(text, prefix) if self.config.prefusion_layers else text
        return self.decode(jnp.concatenate([prefix.tokens, fused], axis=1))[0]


def abstract_params(config: ModelConfig, mesh: Mesh, dtype: Any = None) -> Any:
    """Shapes, dtypes and shardings of all parameters, without memory: a nested dict of ShapeDtypeStructs.

    Args:
      config: sizes.
      mesh: from `sharding.make_mesh`.
      dtype: of every leaf; None keeps float32.
    """
    shapes = param_shapes(config)
    shardings = sharding.param_shardings(shapes, mesh)
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, dtype or s.dtype, sharding=sh), shapes, shardings)


def init_params(config: ModelConfig, mesh: Mesh, seed: int = 0, dtype: Any = None) -> Any:
    """Random parameters, each device making its own shards only."""
    return init_parts(config, abstract_params(config, mesh, dtype), seed)


def init_parts(config: ModelConfig, abstract: Any, seed: int) -> Any:
    """Random parameters for some of the top-level modules, the same as `init_params` gives them.

    Args:
      config: sizes.
      abstract: module name -> ShapeDtypeStructs with shardings, a part of `abstract_params` or all of it.
      seed: of all parameters.
    """

    def make(key: jax.Array) -> Any:
        params = _init(config, key)
        return jax.tree.map(lambda s, p: p.astype(s.dtype), abstract, {name: params[name] for name in abstract})

    return jax.jit(make, out_shardings=jax.tree.map(lambda s: s.sharding, abstract))(jax.random.key(seed))


def _init(config: ModelConfig, key: jax.Array) -> Any:
    v = config.vision
    pixels = jnp.zeros((1, config.tiles, v.image_size, v.image_size, 3))
    return LlavaMini(config).init(key, pixels, jnp.zeros((1, 8), jnp.int32))["params"]
