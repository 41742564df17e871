"""NumPy arrays laid out as the published implementation's, so that numbers can be compared.

Axis letters: B rows, T text tokens, P tiles per image, F frames, H,W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmm_jax.config import IGNORE_LABEL, IMAGE_TOKEN_ID, ModelConfig
from lmm_jax.data.layout import Row, decoder_length
from lmm_jax.errors import UserError
from lmm_jax.inference.images import Medium


def rows(
    config: ModelConfig,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None,
    pixel_values: np.ndarray | None,
    labels: np.ndarray | None = None,
) -> tuple[list[Row], list[list[Medium]]]:
    """Rows without padding, and the media of each.

    Args:
      config: gives the shape of pixel_values.
      input_ids: (B,T) int; IMAGE_TOKEN_ID is a row's image or video.
      attention_mask: (B,T), 0 on padding; None: no padding.
      pixel_values: (B,P,3,H,W) normalised float32, or a video per row (B,F,P,3,H,W), or None.
      labels: (B,T) int or None.

    Raises:
      UserError: shapes that do not fit together, labels outside the vocabulary.
    """
    input_ids = np.asarray(input_ids)
    mask = np.ones(input_ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    _check(config, input_ids, mask, pixel_values, labels)
    out, media = [], []
    for b, seen in enumerate(mask):
        ids = input_ids[b][seen]
        of_row: list[Medium] = []
        if pixel_values is not None and (ids == IMAGE_TOKEN_ID).any():
            pixels = np.moveaxis(np.asarray(pixel_values[b]), -3, -1)  # (P,H,W,3), or (F,P,H,W,3)
            of_row = [list(pixels) if pixels.ndim == 5 else pixels]
        images = tuple(len(m) if isinstance(m, list) else 1 for m in of_row)
        out.append(Row(ids, images, None if labels is None else np.asarray(labels)[b][seen]))
        media.append(of_row)
    return out, media


def padded_length(config: ModelConfig, input_ids: np.ndarray, rows: Sequence[Row]) -> int:
    """Decoder positions of the longest row, its padding included."""
    return max(np.shape(input_ids)[1] - len(r.ids) + decoder_length(r, config) for r in rows)


def _check(
    config: ModelConfig, ids: np.ndarray, mask: np.ndarray, pixels: np.ndarray | None, labels: np.ndarray | None
) -> None:
    if ids.ndim != 2 or mask.shape != ids.shape or (labels is not None and np.shape(labels) != ids.shape):
        shapes = f"{ids.shape}, {mask.shape}" + ("" if labels is None else f", {np.shape(labels)}")
        raise UserError(f"input_ids, attention_mask and labels must all have the shape (B, T), got {shapes}")
    if not len(ids):
        raise UserError("input_ids have no rows: give at least one")
    vocabulary = config.decoder.vocab_size
    known = np.asarray(IGNORE_LABEL if labels is None else labels)
    bad = known[(known != IGNORE_LABEL) & ((known < 0) | (known >= vocabulary))]
    if bad.size:
        raise UserError(f"label {bad[0]} is neither {IGNORE_LABEL} nor a token of the model's vocabulary of {vocabulary}")
    if pixels is None:
        return
    side = config.vision.image_size
    picture, shape = (config.tiles, 3, side, side), np.shape(pixels)
    if len(shape) not in (5, 6) or shape[0] != len(ids) or shape[-4:] != picture:
        wanted = ", ".join(map(str, picture))
        raise UserError(f"pixel_values have the shape {shape}: expected (B, {wanted}), or (B, F, {wanted}) for videos")
