"""What the published implementation computed, computed by ours: for tests and for benchmarks/parity.py."""

import functools

import jax
import numpy as np
from einops import rearrange
from support import relative_error

from conversion.names import table
from lmm_jax.checkpoint import unstack
from lmm_jax.data.layout import Row, lay_out
from lmm_jax.models.llava_mini import LlavaMini
from lmm_jax.models.loss import next_token_loss


def rows_of(arrays):
    rows = []
    for b, mask in enumerate(arrays["attention_mask"]):
        ids, labels = arrays["input_ids"][b], arrays.get("labels")
        images = arrays["pixel_values"].shape[1] if np.ndim(arrays.get("pixel_values")) == 6 else 1
        keep = mask > 0
        count = int((ids[keep] == -200).sum())
        rows.append(Row(ids[keep], (images,) * count, None if labels is None else labels[b][keep]))
    return rows


def pixels_of(arrays):
    """(N,P,H,W,3), frames of all rows in order."""
    pixels = arrays["pixel_values"]
    return np.moveaxis(pixels.reshape(-1, *pixels.shape[-4:]), 2, -1)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply(model, method, params, *args):
    return model.apply({"params": params}, *args, method=method)


def partial_call(model, params, method, *args):
    return apply(model, method, params, *args)


def decoder_input(model, params, layout, arrays):
    """Prefix, fused text (B,I,D) and decoder input, by the model's own functions."""

    call = functools.partial(partial_call, model, params)

    if "pixel_values" not in arrays:
        return None, None, call("embed", layout.ids)
    prefix = call("encode_image", pixels_of(arrays))
    fused = None
    if model.config.prefusion_layers:
        each = call("fuse_text", call("embed", layout.fused_ids)[layout.image_rows], prefix)
        count = np.bincount(layout.image_rows, minlength=len(layout.ids))[:, None, None]
        fused = jax.ops.segment_sum(each, layout.image_rows, len(layout.ids)) / count
    x = call("place_text", layout.ids, fused, layout.fused_index)
    x = call("place_vision", x, rearrange(prefix.tokens, "n v d -> 1 (n v) d"), layout.vision_index)
    return prefix, fused, x


def intermediate_errors(assistant, expected):
    """Relative error of everything a scenario's arrays hold but the greedy tokens."""
    model, params = LlavaMini(assistant.config), assistant.engine.params
    layout = lay_out(rows_of(expected), assistant.config)
    prefix, fused, x = decoder_input(model, params, layout, expected)
    logits = apply(model, "decode", params, x)[0]
    real = expected["inputs_embeds_mask"] > 0
    errors = {
        "inputs_embeds": relative_error(x[real], expected["inputs_embeds"][real]),
        "logits": relative_error(logits[real], expected["logits"][real]),
    }
    if prefix is not None:
        errors |= image_side_errors(model, params, expected)
    if model.config.compressor and prefix is not None:
        frames = len(expected["prefusion_compressed"])  # of a video the arrays hold the first frame
        errors["prefusion_compressed"] = relative_error(prefix.tokens[:frames], expected["prefusion_compressed"])
        errors["prefusion_text"] = relative_error(*fused_text(model, params, layout, expected, prefix))
    return errors


def image_side_errors(model, params, expected):
    call = functools.partial(partial_call, model, params)

    features = call("vision_features", pixels_of(expected))
    count = len(expected["vision_features"]) // features.shape[1]
    errors = {
        "vision_features": relative_error(features[:count].reshape(-1, *features.shape[2:]), expected["vision_features"])
    }
    if not model.config.compressor:
        return errors | {
            "projected_features": relative_error(call("project", features[:, -1]), expected["projected_features"])
        }
    grid = call("stitch", features[:, :-1]) if model.config.resolution_ratio > 1 else features[:, -1]
    tokens, attention = (part[:count] for part in call("compress", grid))
    return errors | {
        "compressor_output": relative_error(tokens, expected["compressor_output"]),
        "compressor_attention": relative_error(attention, expected["compressor_attention"]),
        "projected_compressed": relative_error(call("project", tokens), expected["projected_compressed"]),
    }


def fused_text(model, params, layout, expected, prefix):
    """First frame's fused text, plain embeddings where masked, as the published code lays it out (B,T,D)."""
    text = apply(model, "embed", params, layout.fused_ids[layout.image_rows])
    each = apply(model, "fuse_text", params, text, prefix)
    out = np.array(apply(model, "embed", params, np.maximum(expected["input_ids"], 0)))
    for b in range(len(out)):
        visible = (expected["attention_mask"][b] > 0) & (expected["input_ids"][b] > 0)
        out[b, visible] = each[int(np.argmax(layout.image_rows == b)), : visible.sum()]
    return out, expected["prefusion_text"]


def loss_and_gradients(model, params, expected):
    layout = lay_out(rows_of(expected), model.config)

    def objective(params):
        _, _, x = decoder_input(model, params, layout, expected)
        logits = model.apply({"params": params}, x, method="decode")[0]
        total, count = next_token_loss(logits, layout.labels)
        return total / count, logits

    (loss, logits), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    return loss, logits, layout, gradients


def to_hf_names(config, tree):
    """A tree like the parameters, under the names and in the layout of the published checkpoint."""
    leaves = unstack(tree)
    return {
        entry.tensor: entry.join([leaves[name].read() for name, _ in entry.leaves])
        for entry in table(config)
        if all(name in leaves for name, _ in entry.leaves)
    }
