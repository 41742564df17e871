"""Token ids with image placeholders -> the fixed-shape arrays that the model takes.

One row, two images, V = 2 vision tokens each; `*` marks an answer, `·` padding:

    ids            BOS  <img>   what  <img>   else?   red*  EOS*
    fused_ids      BOS  what    else?  ·                              instruction tokens only, packed: pre-fusion is then
                                                                      purely causal and nothing in it needs a mask
    position       BOS  v0 v1   what  v2 v3   else?   red*  EOS*  ·   what the decoder sees
    fused_index     0   -  -     1    -  -     2       -     -    -
    vision_index    -   0  1     -    2  3     -       -     -    -

Axis letters: B rows, T decoder positions, I instruction tokens, N images of all rows, V vision tokens per image.
Facts: spec sections 4, 5, 6 and 8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lmm_jax.config import IGNORE_LABEL, IMAGE_TOKEN_ID, ModelConfig
from lmm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt.

    Attributes:
      ids: (t,) int, IMAGE_TOKEN_ID where an image or a video stands.
      images: how many images each placeholder stands for: 1, or the number of frames of a video.
      labels: (t,) int or None at inference; positions that are not IGNORE_LABEL are answers, which are never fused.
    """

    ids: np.ndarray
    images: tuple[int, ...] = ()
    labels: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Rows padded to common lengths; see the drawing above.

    Attributes:
      ids: (B,T) int32, 0 under vision tokens and padding.
      fused_index: (B,T) int32 into I, −1 where not fused.
      vision_index: (B,T) int32 into N·V, −1 where no vision token.
      labels: (B,T) int32, IGNORE_LABEL where none.
      lengths: (B,) int32, real positions of each row.
      fused_ids: (B,I) int32, 0 under padding.
      image_rows: (N,) int32, the row each image belongs to.
    """

    ids: np.ndarray
    fused_index: np.ndarray
    vision_index: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    fused_ids: np.ndarray
    image_rows: np.ndarray


def decoder_length(row: Row, config: ModelConfig) -> int:
    """Positions the row takes in the decoder: each placeholder becomes its images' vision tokens."""
    return len(row.ids) - len(row.images) + sum(row.images) * config.tokens_per_image


def fused_length(row: Row, config: ModelConfig) -> int:
    """Instruction tokens of the row that go through pre-fusion; 0 without images."""
    return int(_fused(row, config).sum())


def check_row(row: Row, config: ModelConfig) -> None:
    """Raises UserError for placeholders that do not match the images and ids outside the vocabulary."""
    ids = np.asarray(row.ids)
    found = int((ids == IMAGE_TOKEN_ID).sum())
    if found != len(row.images):
        raise UserError(
            f"the prompt has {found} image placeholder(s) but {len(row.images)} image(s) or video(s) were given: "
            "there must be one <image> for each"
        )
    bad = ids[(ids != IMAGE_TOKEN_ID) & ((ids < 0) | (ids >= config.decoder.vocab_size))]
    if bad.size:
        raise UserError(f"token id {bad[0]} is outside the model's vocabulary of {config.decoder.vocab_size}")
    if not ids.size:
        raise UserError("the prompt is empty: give at least one token")


def lay_out(
    rows: Sequence[Row],
    config: ModelConfig,
    *,
    length: int | None = None,
    fused: int | None = None,
    batch: int | None = None,
) -> Layout:
    """Lays out rows in order; images are numbered over the rows, as they stand in the prompts.

    Args:
      rows: at least one.
      config: gives V and whether text is fused.
      length, fused, batch: T, I and B to pad to; at least what the rows need, which is the default.

    Raises:
      UserError: see `check_row`.
    """
    for row in rows:
        check_row(row, config)
    length = length or max(decoder_length(r, config) for r in rows)
    fused = fused or max(1, *(fused_length(r, config) for r in rows))
    batch = batch or len(rows)
    out = Layout(
        ids=np.zeros((batch, length), np.int32),
        fused_index=np.full((batch, length), -1, np.int32),
        vision_index=np.full((batch, length), -1, np.int32),
        labels=np.full((batch, length), IGNORE_LABEL, np.int32),
        lengths=np.ones(batch, np.int32),  # a padding row has one position, so that nothing divides by zero
        fused_ids=np.zeros((batch, fused), np.int32),
        image_rows=np.repeat(np.arange(len(rows)), [sum(r.images) for r in rows]).astype(np.int32),
    )
    first_image = 0
    for b, row in enumerate(rows):
        _lay_out_row(out, b, row, config, first_image)
        first_image += sum(row.images)
    return out


def _lay_out_row(out: Layout, b: int, row: Row, config: ModelConfig, first_image: int) -> None:
    ids, n = np.asarray(row.ids), decoder_length(row, config)
    is_image = ids == IMAGE_TOKEN_ID
    width = np.ones(len(ids), int)  # decoder positions of each token
    width[is_image] = np.array(row.images, int) * config.tokens_per_image
    source = np.repeat(np.arange(len(ids)), width)  # token each decoder position comes from
    vision = is_image[source]
    fused = _fused(row, config)

    out.lengths[b] = n
    out.ids[b, :n] = np.where(vision, 0, ids[source])
    out.vision_index[b, :n][vision] = first_image * config.tokens_per_image + np.arange(vision.sum())
    out.fused_ids[b, : fused.sum()] = ids[fused]
    out.fused_index[b, :n] = np.where(fused, np.cumsum(fused) - 1, -1)[source]
    if row.labels is not None:
        out.labels[b, :n] = np.where(vision, IGNORE_LABEL, np.asarray(row.labels)[source])


def _fused(row: Row, config: ModelConfig) -> np.ndarray:
    """(t,) bool: tokens that pre-fusion sees: in rows with an image, ids above 0 that are no answer (spec section 4)."""
    ids = np.asarray(row.ids)
    if not (config.prefusion_layers and row.images):
        return np.zeros(len(ids), bool)
    answer = np.zeros(len(ids), bool) if row.labels is None else np.asarray(row.labels) != IGNORE_LABEL
    return (ids > 0) & ~answer
