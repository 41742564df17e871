"""Where a decoder looks, layer by layer, and what it misses when it may not (the paper's analysis, its section 3).

    question, pictures, answer ─ engine.embed ─► decoder input ─► layer after layer ─┬─► weights and entropies by type
                                                                                     └─► logits, with vision hidden in some

Layers run one at a time, outside of the scan, since their attention weights are wanted: slow, and exact.

Axis letters: T positions, N heads, K key/value heads, H their channels, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax.config import IGNORE_LABEL, DecoderConfig
from lmm_jax.data.conversation import render
from lmm_jax.data.layout import Row
from lmm_jax.errors import UserError
from lmm_jax.inference.assistant import Assistant, Conversation
from lmm_jax.inference.images import Medium, count_images
from lmm_jax.models import apart, layers
from lmm_jax.models.llama import DecoderLayer, Step
from lmm_jax.models.llava_mini import LlavaMini

TYPES = ("instruction", "vision", "response")


@dataclasses.dataclass(frozen=True)
class Input:
    """What the decoder is given of a question and its answer.

    Attributes:
      x: (1,T,D).
      types: (T,) int, index into TYPES.
      answer: (A,) int, tokens of the answer; they are the last ones.
    """

    x: jax.Array
    types: np.ndarray
    answer: np.ndarray


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of every layer, mean over heads and over the positions of a type; NaN where there are none.

    Attributes:
      weights: (L,3,3) float32, how much positions of one type look at all keys of another; rows sum to 1.
      entropy: (L,3,3) float32, in nats, of how that is spread over the keys of the other type.
      probabilities: (A,V) float32, of the answer's tokens.
    """

    weights: np.ndarray
    entropy: np.ndarray
    probabilities: np.ndarray


def decoder_input(assistant: Assistant, conversation: Conversation, media: Sequence[Medium], template: str | None) -> Input:
    """The decoder's input for a conversation that ends with an answer, laid out as in training.

    Args:
      assistant: the model.
      conversation: with one placeholder for each of `media`.
      media: pixels, or lists of frames.
      template: of the prompt; None is the model's own.

    Raises:
      UserError: the answer has no words.
    """
    spans = render(conversation.messages, template or assistant.config.template, assistant.tokenizer, generate=False)
    ids, labels = assistant.tokenizer.encode(spans)
    answer = ids[labels != IGNORE_LABEL]
    if not conversation.messages[-1].content.strip() or not answer.size:
        raise UserError("the answer has no words: give one with --answer")
    row = Row(ids, tuple(count_images(m) for m in media), labels)
    x, layout = assistant.engine.embed([row], [media])
    length = int(layout.lengths[0])
    vision, response = layout.vision_index[0, :length] >= 0, layout.labels[0, :length] != IGNORE_LABEL
    return Input(x[:1, :length], np.where(vision, 1, np.where(response, 2, 0)), answer)


def look(assistant: Assistant, given: Input, hidden: Collection[int] = ()) -> Attention:
    """Runs the decoder.

    Args:
      assistant: the model.
      given: from `decoder_input`.
      hidden: numbers of layers, from 0, in which no other position sees the vision tokens.
    """
    config, params = assistant.config, assistant.engine.params
    d, length = config.decoder, len(given.types)
    causal = np.tril(np.ones((length, length), bool))
    blind = causal & ((given.types != 1)[None, :] | (given.types == 1)[:, None])
    groups = np.eye(len(TYPES), dtype=np.float32)[given.types]  # (T,3)
    x, weights, entropy = given.x, [], []
    with jax.set_mesh(assistant.engine.mesh):
        for number in range(d.num_layers):
            mask = blind if number in hidden else causal
            x, *of = _layer(d, _layer_params(params["layers"], number, d.num_layers), x, mask[None], groups)
            weights.append(of[0])
            entropy.append(of[1])
        logits = _logits(LlavaMini(config, assistant.engine.dtype), params, x)
    last = np.asarray(jax.nn.softmax(logits[0, -len(given.answer) - 1 : -1]))
    return Attention(np.stack(weights), np.stack(entropy), last)


def divergence(seeing: Attention, blind: Attention) -> float:
    """Mean over the answer's tokens of the Kullback-Leibler divergence of the second's probabilities, in nats."""
    p, q = (np.maximum(a.probabilities.astype(np.float64), 1e-30) for a in (seeing, blind))
    return float((p * np.log(p / q)).sum(-1).mean())


def _layer_params(params: Mapping[str, Any], number: int, total: int) -> Any:
    if number == total - 1:
        return params["last"]
    return apart.layer(params["stack"], number)


@functools.partial(jax.jit, static_argnums=0)
def _layer(
    d: DecoderConfig, params: Any, x: jax.Array, mask: jax.Array, groups: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x (1,T,D) -> the layer's output, mean weights (3,3) and entropies (3,3) between types; groups (T,3) says who is what."""
    rope = layers.rotary_table(jnp.arange(x.shape[1]), layers.rotary_frequencies(d.head_dim, d.rope_theta, d.rope_scaling))
    step = Step(rope, mask=mask, implementation="plain")
    ((x, _), _), seen = DecoderLayer(d).apply(
        {"params": params},
        (x, None),
        (None, None),
        step,
        capture_intermediates=lambda module, _: module.name in ("q_proj", "k_proj"),
        mutable="intermediates",
    )
    q, k = (seen["intermediates"]["self_attn"][f"{name}_proj"]["__call__"][0] for name in "qk")
    q, k = layers.rotate(q, rope)[0], layers.rotate(k, rope)[0]  # (T,N,H), (T,K,H)
    k = jnp.repeat(k, d.num_heads // d.num_kv_heads, axis=1)

    def head(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores = jnp.einsum("th,sh->ts", *pair, preferred_element_type=jnp.float32) * d.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(mask[0], scores, -jnp.inf), axis=-1)
        mass = weights @ groups  # (T,3)
        inside = jnp.where(weights > 0, weights * jnp.log(jnp.maximum(weights, 1e-30)), 0.0) @ groups
        # of w / m, within a type of mass m: -Σ w/m · log(w/m) = log m − Σ w·log w / m
        entropy = jnp.log(jnp.maximum(mass, 1e-30)) - inside / jnp.maximum(mass, 1e-30)
        return mass, jnp.where(mass > 0, entropy, jnp.nan)

    mass, entropy = jax.lax.map(head, (q.swapaxes(0, 1), k.swapaxes(0, 1)))  # one head at a time: (N,T,3)
    return x, _by_type(mass, groups), _by_type(entropy, groups)


def _by_type(values: jax.Array, groups: jax.Array) -> jax.Array:
    """(N,T,3) -> (3,3): mean over heads, and over those positions of each type that have a value."""
    there = jnp.isfinite(values)
    total = jnp.einsum("ntb,ta->ab", jnp.where(there, values, 0.0), groups)
    count = jnp.einsum("ntb,ta->ab", there.astype(jnp.float32), groups)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: LlavaMini, params: Any, x: jax.Array) -> jax.Array:
    return model.apply({"params": params}, x, method=lambda module, x: module.logits(module.norm(x)))
