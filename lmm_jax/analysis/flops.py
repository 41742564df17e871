"""What a question costs, and a token of the answer: matrix products by component, ours and as published (spec section 12).

The published program runs the encoder's last block though nothing reads it, every layer for all positions, and computes the
logits of the whole prompt. Its figures count products with weights only (attention's own are left out) and are those of a
prompt of `PUBLISHED_TEXT` tokens, the number at which all five published totals come out to within 0.01 TFLOPs.
"""

from __future__ import annotations

from lmm_jax.analysis import products
from lmm_jax.analysis.products import Product
from lmm_jax.config import ModelConfig

PUBLISHED_TEXT = 43

Components = dict[str, list[Product]]  # by component, in the order of the data


def question(config: ModelConfig, images: int, text: int, *, kept: bool = False, published: bool = False) -> Components:
    """Products from pixels and prompt to the first token's logits.

    Args:
      config: of the model.
      images: pictures, or frames of a video (N).
      text: tokens of the prompt, without the placeholder's.
      kept: whether the images were asked about before, so that their side of the model is there already.
      published: as the published program computes, else as ours.
    """
    found = {} if kept or not images else _image_side(config, images, published)
    d, length = config.decoder, images * config.tokens_per_image + text
    if images and config.prefusion_layers:
        keys = config.prefix_length + text
        found["pre-fusion, text"] = products.decoder(
            "prefusion_layers", d, config.prefusion_layers, rows=images, tokens=text, last=text, keys=keys
        )
    last = length if published else 1
    found["decoder"] = products.decoder("layers", d, d.num_layers, rows=1, tokens=length, last=last, keys=length)
    found["logits"] = products.head(d, last)
    return found


def token(config: ModelConfig, length: int) -> Components:
    """Products of one more token, when the decoder holds `length` positions with it."""
    d = config.decoder
    layers = products.decoder("layers", d, d.num_layers, rows=1, tokens=1, last=1, keys=length)
    return {"decoder": layers, "logits": products.head(d, 1)}


def totals(components: Components, *, attention: bool = False) -> dict[str, float]:
    """FLOPs by component, and "total"; products of attention's own only where they are asked for."""
    found = {name: products.flops(of, attention=attention) for name, of in components.items()}
    return found | {"total": sum(found.values())}


def _image_side(c: ModelConfig, images: int, published: bool) -> Components:
    v, d, fused = c.vision, c.decoder, c.prefusion_layers
    pictures, features = images * c.tiles, (c.resolution_ratio * v.grid) ** 2
    encoder = products.encoder(v, pictures, layers=v.num_layers - (not published))
    found = {"vision encoder": products.patches(v, pictures) + encoder}
    if c.compressor:
        found["compressor"] = products.compressor(c.compressor, v.hidden_size, images, features, published=published)
    projected = images * (c.prefix_length if fused else c.tokens_per_image)
    found["projector"] = products.projector(v.hidden_size, d.hidden_size, projected)
    if fused:
        length = c.prefix_length
        last = length if published else c.tokens_per_image
        sizes = {"rows": images, "tokens": length, "last": last, "keys": length}
        found["pre-fusion, image"] = products.decoder("prefusion_layers", d, fused, **sizes)
    return found
