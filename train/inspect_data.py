"""What a run would be trained on: counts, what is skipped, shapes of batches, lengths, and some records as they are read.

No model is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np

from lmm_jax.config import IGNORE_LABEL, IMAGE_TOKEN_ID, ModelConfig
from lmm_jax.data.conversation import IMAGE
from lmm_jax.data.tokenize import Tokenizer
from train.config import TrainConfig
from train.data import TrainData, read_media
from train.lengths import encode
from train.records import Skipped, UnusableError

_BARS = 16  # of the histogram
_BAR = 50  # characters of its longest bar
_NAMED = 3  # records that are named for each reason
_CONTROL = ("<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def inspect(
    config: TrainConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    samples: int = 3,
    media: int = 100,
    print: Callable[[str], None] = print,
) -> None:
    """Prints it.

    Args:
      config: the run.
      model: the model that it trains.
      tokenizer: that model's.
      samples: records to show.
      media: records whose pictures or videos are read, to see whether they can be.
      print: takes a line at a time.

    Raises:
      UserError: see `data.TrainData`.
    """
    data = TrainData(config.data, model, tokenizer, cache=Path(config.folder) / ".cache")
    order = np.random.default_rng(config.data.seed).permutation(len(data.sizes.record))
    parts = (_counts(data), _skipped(data), _steps(data), _histogram(data), _readable(data, order, media))
    for part in (*parts, _samples(data, order, samples)):
        for line in part:
            print(line)
        print("")


def _table(head: tuple[str, ...], rows: list[tuple]) -> Iterator[str]:
    """The first column is text and stands left, the others are numbers and stand right."""
    cells = [head, *(tuple(f"{c:,}" if isinstance(c, int) else c for c in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        yield "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])


def _counts(data: TrainData) -> Iterator[str]:
    rows = []
    for source, counts in zip(data.sources, data.lengths):
        kinds = np.where(counts.media == 0, 0, 1 + counts.is_video)[counts.tokens > 0]
        text, pictures, videos = (int(n) for n in np.bincount(kinds, minlength=3))
        unusable = len(source) - len(kinds)
        rows.append((source.config.file, source.config.sampling, source.total, len(source), pictures, videos, text, unusable))
    head = ("source", "sampling", "records", "chosen", "pictures", "videos", "text only", "unusable")
    yield from _table(head, rows)


def _skipped(data: TrainData) -> Iterator[str]:
    skipped = data.skipped_beforehand
    yield f"Skipped beforehand: {len(skipped):,} of {data.records:,} records ({len(skipped) / data.records:.2%})"
    if len(skipped) > data.config.max_skipped * data.records:
        yield f"  This is more than data.max_skipped, {data.config.max_skipped:.2%}: a run would stop."
    yield from _by_reason(skipped)


def _by_reason(skipped: list[Skipped]) -> Iterator[str]:
    for reason, count in Counter(s.reason for s in skipped).most_common():
        yield f"  {count:,}  {reason}"
        for s in [s for s in skipped if s.reason == reason][:_NAMED]:
            name = f" ({s.id})" if s.id else ""
            yield f"      record {s.record}{name} of {s.file}" + (f": {s.detail}" if s.detail else "")


def _steps(data: TrainData) -> Iterator[str]:
    plan = data.plan
    yield f"{plan.steps_per_epoch:,} steps an epoch, {len(plan):,} in {plan.epochs} epoch(s), of {plan.batch_size} rows each"
    yield f"{len(plan.buckets)} shapes of batches; {plan.padding:.1%} of all positions are padding"
    rows = [(str(b.images), b.length, b.fused, b.targets, count, plan.batches[b]) for b, count in sorted(plan.rows.items())]
    yield from _table(("pictures or frames", "positions", "fused", "predicted", "records", "batches"), rows)


def _histogram(data: TrainData) -> Iterator[str]:
    lengths = data.sizes.length
    yield f"Decoder positions: {lengths.min()} to {lengths.max()}, {lengths.mean():.1f} on average"
    first = int(lengths.min())
    width = (int(lengths.max()) - first) // _BARS + 1
    counts = np.bincount((lengths - first) // width)
    for i, count in enumerate(counts):
        bar = "█" * -(-int(count) * _BAR // int(counts.max()))
        yield f"  {first + i * width:>6,} to {first + (i + 1) * width - 1:>6,}  {bar} {count:,}"


def _readable(data: TrainData, order: np.ndarray, wanted: int) -> Iterator[str]:
    chosen = order[data.sizes.images[order] > 0][:wanted]
    with ThreadPoolExecutor(data.config.threads) as pool:
        skipped = [s for s in pool.map(lambda i: _read(data, i), chosen) if s]
    yield f"Media of {len(chosen):,} records were read: {len(skipped):,} cannot be"
    yield from _by_reason(skipped)


def _read(data: TrainData, i: int) -> Skipped | None:
    source, number = data.locate(int(data.sizes.record[i]))
    size, images = data.model.vision.image_size, int(data.sizes.images[i])
    try:
        out = np.empty((images, data.model.tiles, size, size, 3), np.uint8)
        read_media(source.record(number), data.config, data.model, out)
    except UnusableError as error:
        return source.skipped(number, error)
    return None


def _samples(data: TrainData, order: np.ndarray, wanted: int) -> Iterator[str]:
    """Some records; first one of every kind."""
    _, first = np.unique(data.sizes.images[order], return_index=True)
    chosen = [*order[first], *np.delete(order, first)][:wanted]
    if chosen:
        yield "Samples; what is learnt stands between ⟦ and ⟧"
    for i in chosen:
        source, number = data.locate(int(data.sizes.record[i]))
        record = source.record(number)
        name = f" ({record.id})" if record.id else ""
        yield f"--- record {source.numbers[number]}{name} of {source.config.file}, {data.sizes.length[i]} positions"
        yield from (f"    {path}" for path in record.media)
        yield marked(*encode(record, data.template, data.tokenizer), data.tokenizer)


def marked(ids: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of token ids (t,), with ⟦ and ⟧ around stretches whose labels (t,) are not IGNORE_LABEL."""
    control = {tokenizer.token_id(token): token for token in _CONTROL} | {IMAGE_TOKEN_ID: IMAGE}
    text = ""
    for learnt, run in groupby(zip(ids.tolist(), labels.tolist()), key=lambda pair: pair[1] != IGNORE_LABEL):
        pieces = [control[i].encode() if i in control else tokenizer.token_bytes(i) for i, _ in run]
        part = b"".join(pieces).decode("utf-8", "replace")
        text += f"⟦{part}⟧" if learnt else part
    return text
