"""Records -> batches of arrays, loaded ahead by threads (Grain).

The plan says which rows are in a batch; every process loads its own of them. Axis letters: R rows of this process, T
decoder positions, I instruction tokens, Q predicting positions, n pictures or frames of a row, V vision tokens of a picture,
P tiles of a picture, H and W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from lmm_jax import storage
from lmm_jax.config import IGNORE_LABEL, ModelConfig
from lmm_jax.data.frames import video_file
from lmm_jax.data.image import load_image, preprocess
from lmm_jax.data.layout import Row, lay_out
from lmm_jax.data.tokenize import Tokenizer
from lmm_jax.data.video import take_frames
from lmm_jax.errors import UserError
from train.config import DataConfig
from train.lengths import Lengths, encode, measure
from train.plan import Bucket, Plan, Sizes
from train.records import Record, Skipped, Source, UnusableError, load_sources

__all__ = ["Batch", "Batches", "Bucket", "Plan", "SkipReport", "Skipped", "TrainData", "write_skipped"]


@dataclasses.dataclass
class Batch:
    """The rows of one batch that this process loads.

    Attributes:
      index: of the batch in the run, from 0.
      bucket: its shape.
      arrays:
        ids: int32 (R,T), 0 under vision tokens and padding.
        fused_index: int32 (R,T) into I, −1 where not fused.
        vision_index: int32 (R,T) into the row's own n·V, −1 where no vision token.
        fused_ids: int32 (R,I), 0 under padding.
        queries: int32 (R,Q), ascending positions whose next position is labelled, then T−1.
        targets: int32 (R,Q), the label of that next position, then IGNORE_LABEL.
        lengths: int32 (R,), decoder positions in use, 0 in an empty slot.
        used: int32 (R,), 1 where the row counts.
        skipped: int32 (R,), 1 where a picture or video could not be read: nothing in the row is labelled then.
        pixels: uint8 (R,n,P,H,W,3), only where n > 0; 0 in rows that do not count.
      skipped: what could not be read.
    """

    index: int
    bucket: Bucket
    arrays: dict[str, np.ndarray]
    skipped: list[Skipped]


class TrainData:
    """The records of a run and the plan of its batches.

    Attributes:
      config, model: as given.
      tokenizer: as given.
      template: prompt template in use.
      sources: files, in the order of the mixture.
      lengths: of each source's records.
      sizes: of the usable records.
      plan: which of them are in which batch.
      records: how many were chosen from the sources, usable or not.
      skipped_beforehand: those that are not usable, whatever their media are.
    """

    def __init__(
        self,
        config: DataConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        *,
        cache: Path,
        progress: bool = True,
    ) -> None:
        """Read the sources, count their tokens and plan the batches. Media are not looked at.

        Args:
          config: what to read.
          model: tells how many positions a picture takes.
          tokenizer: the model's.
          cache: folder of counts, see `lengths.measure`; `config.cache` wins.
          progress: whether to show a bar while tokens are counted.

        Raises:
          UserError: see `records.load_sources`; the tokenizer is not the model's; no record is usable.
        """
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.template = config.template or model.template
        self.sources = load_sources(config)
        folder = Path(config.cache) if config.cache else cache
        self.lengths = [measure(s, self.template, tokenizer, folder, progress=progress) for s in self.sources]
        self._starts = np.cumsum([0, *map(len, self.sources)])
        self.records = int(self._starts[-1])
        largest = max((int(counts.largest.max(initial=0)) for counts in self.lengths), default=0)
        if largest >= model.decoder.vocab_size:
            raise UserError(
                f"the tokenizer in {tokenizer.folder} gives token id {largest}, the model's vocabulary has "
                f"{model.decoder.vocab_size} tokens: it needs the tokenizer that it was made with"
            )
        self.sizes, self.skipped_beforehand = self._usable()
        if not len(self.sizes.record):
            reasons = ", ".join(f"{reason} ({n})" for reason, n in self.reasons().most_common(3))
            raise UserError(f"none of the {self.records} records can be trained on: {reasons or 'the files are empty'}")
        buckets = [b for b in config.buckets if b < config.max_length] + [config.max_length]
        self.plan = Plan(self.sizes, lengths=buckets, batch_size=config.batch_size, epochs=config.epochs, seed=config.seed)

    @property
    def fingerprint(self) -> str:
        """16 bytes, in hexadecimal digits: of the content of the records that are trained on and of their sizes in tokens."""
        whole = hashlib.blake2b(self.template.encode(), digest_size=16)
        for source in self.sources:
            whole.update(source.fingerprint.encode())
        for column in (*(source.numbers for source in self.sources), *dataclasses.astuple(self.sizes)):
            whole.update(np.ascontiguousarray(column, "<i8").tobytes())
        return whole.hexdigest()

    def locate(self, record: int) -> tuple[Source, int]:
        """The source that a record of the mixture comes from, and its index among the chosen ones there."""
        number = int(np.searchsorted(self._starts, record, "right")) - 1
        return self.sources[number], record - int(self._starts[number])

    def reasons(self) -> Counter[str]:
        """How many records were skipped beforehand for each reason."""
        return Counter(s.reason for s in self.skipped_beforehand)

    def batches(self, rows: np.ndarray, start: int = 0) -> Batches:
        """Batches `start`, `start` + 1, ... of the run; the same from any start.

        Args:
          rows: int (R,), which of the rows 0..B−1 of every batch this process loads, in the order it wants them.
          start: first batch.

        Raises while iterating:
          UserError: a file of the mixture, or the tokenizer, is not what its tokens were counted with.
        """
        return Batches(self, np.asarray(rows), start)

    def _usable(self) -> tuple[Sizes, list[Skipped]]:
        sizes = [_sizes(counts, self.config, self.model) for counts in self.lengths]
        whole = Sizes(np.arange(self.records), *(np.concatenate(column) for column in zip(*sizes)))
        skipped = []
        for source, counts, (_, length, _, _) in zip(self.sources, self.lengths, sizes):
            faults = [(i, UnusableError(reason, detail)) for i, reason, detail in counts.faults]
            reason = f"longer than {self.config.max_length} positions"
            long = np.flatnonzero(length > self.config.max_length)
            faults += [(int(i), UnusableError(reason, f"{length[i]} positions")) for i in long]
            skipped += [source.skipped(i, error) for i, error in sorted(faults, key=lambda fault: fault[0])]
        usable = (whole.length > 0) & (whole.length <= self.config.max_length)
        return Sizes(*(column[usable] for column in dataclasses.astuple(whole))), skipped


def _sizes(counts: Lengths, config: DataConfig, model: ModelConfig) -> tuple[np.ndarray, ...]:
    """Images, length, fused and targets of every record, as `layout.lay_out` will find them; length 0: unusable."""
    images = counts.media * np.where(counts.is_video, config.video_frames, 1)
    length = counts.tokens - counts.media + images * model.tokens_per_image
    fused = counts.fused * (counts.media > 0) * (model.prefusion_layers > 0)
    return images, length, fused, counts.labelled


class Batches(Iterator[Batch]):
    """Batches in order, loaded ahead by threads. Close it, or use it as a context manager."""

    def __init__(self, data: TrainData, rows: np.ndarray, start: int) -> None:
        """Made by `TrainData.batches`."""
        import grain

        self._data, self._rows = data, rows
        # Grain's threads hold one batch each and wait; those of the pool load the rows, earlier batches first.
        self._pool = ThreadPoolExecutor(data.config.threads, thread_name_prefix="row")
        ahead = data.config.prefetch
        dataset = grain.MapDataset.range(len(data.plan)).map(self._load)
        self._batches = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)))
        self._batches.set_state({"next_index": start})

    def __next__(self) -> Batch:
        """The next batch."""
        return next(self._batches)

    def close(self) -> None:
        """Stops loading. May be called more than once."""
        self._batches.close()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Batches:
        """Itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Closes it."""
        self.close()

    def _load(self, index: int) -> Batch:
        bucket, records = self._data.plan[int(index)]
        arrays = empty_arrays(bucket, len(self._rows), self._data.model)
        work = ((row, int(record)) for row, record in enumerate(records[self._rows]) if record >= 0)
        tasks = [self._pool.submit(_load_row, self._data, bucket, arrays, row, record) for row, record in work]
        skipped = [task.result() for task in tasks]
        return Batch(int(index), bucket, arrays, [s for s in skipped if s])


def empty_arrays(bucket: Bucket, rows: int, model: ModelConfig) -> dict[str, np.ndarray]:
    """A batch of empty slots."""
    arrays = {
        "ids": np.zeros((rows, bucket.length), np.int32),
        "fused_index": np.full((rows, bucket.length), -1, np.int32),
        "vision_index": np.full((rows, bucket.length), -1, np.int32),
        "fused_ids": np.zeros((rows, bucket.fused), np.int32),
        "queries": np.full((rows, bucket.targets), bucket.length - 1, np.int32),
        "targets": np.full((rows, bucket.targets), IGNORE_LABEL, np.int32),
        "lengths": np.zeros(rows, np.int32),
        "used": np.zeros(rows, np.int32),
        "skipped": np.zeros(rows, np.int32),
    }
    if bucket.images:
        size = model.vision.image_size
        arrays["pixels"] = np.zeros((rows, bucket.images, model.tiles, size, size, 3), np.uint8)
    return arrays


def _load_row(data: TrainData, bucket: Bucket, arrays: dict[str, np.ndarray], row: int, number: int) -> Skipped | None:
    """Fills one row of the arrays; says why where its media cannot be read."""
    source, i = data.locate(number)
    try:
        record = source.record(i)
        ids, labels = encode(record, data.template, data.tokenizer)
        images = (data.config.video_frames if record.is_video else 1,) * len(record.media)
        layout = lay_out([Row(ids, images, labels)], data.model, length=bucket.length, fused=bucket.fused, batch=1)
        queries = np.flatnonzero(layout.labels[0, 1:] != IGNORE_LABEL)
        arrays["queries"][row, : len(queries)] = queries
    except (ValueError, UnusableError) as error:
        raise UserError(
            f"record {source.numbers[i]} of {source.config.file} is not as it was when its tokens were counted: was the "
            "tokenizer changed meanwhile? If not, delete the cache (data.cache) and start again"
        ) from error
    for name in ("ids", "fused_index", "vision_index", "fused_ids", "lengths"):
        arrays[name][row] = getattr(layout, name)[0]
    try:
        if record.media:
            read_media(record, data.config, data.model, arrays["pixels"][row])
    except UnusableError as error:
        arrays["queries"][row] = bucket.length - 1
        arrays["pixels"][row] = 0
        arrays["skipped"][row] = 1
        return source.skipped(i, error)
    arrays["targets"][row, : len(queries)] = layout.labels[0, queries + 1]
    arrays["used"][row] = 1
    return None


def read_media(record: Record, config: DataConfig, model: ModelConfig, out: np.ndarray) -> None:
    """Fills uint8 (n,P,H,W,3) with a record's pictures or frames (spec sections 6 and 7).

    Raises:
      UnusableError: one of them is missing or cannot be read completely.
    """
    size = model.vision.image_size
    settings = {"size": size, "aspect_ratio": model.image_aspect_ratio, "resolution_ratio": model.resolution_ratio}
    kind, place = ("video" if record.is_video else "picture"), 0
    for path in record.media:
        try:
            path = video_file(path) if record.is_video else path
            if not storage.exists(path):
                raise UnusableError(f"{kind} missing", path)
            with storage.local(path) as file:
                if record.is_video:
                    pictures = map(Image.fromarray, take_frames(file, size=size, frames=config.video_frames))
                else:
                    pictures = [load_image(file, upright=False)]
                for picture in pictures:
                    out[place] = preprocess(picture, **settings)
                    place += 1
        except UserError as error:
            raise UnusableError(f"{kind} unreadable", str(error)) from error
        except (ValueError, OSError) as error:  # broken files make readers raise nearly anything
            if storage.is_on_the_way(error):  # nothing is wrong with the record
                raise
            raise UnusableError(f"{kind} unreadable", f"{path}: {error}") from error


class SkipReport:
    """A file with one line of JSON for every record that was skipped, each once, also when a run is continued."""

    def __init__(self, file: str | os.PathLike) -> None:
        """Continue the file if it is there; a line that a killed run left half written is removed."""
        self._file = Path(file)
        self._named: set[tuple[str, int]] = set()
        with contextlib.suppress(FileNotFoundError):
            whole = self._file.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            os.truncate(self._file, len(whole))
            entries = map(json.loads, whole.splitlines())
            self._named = {(entry["file"], entry["record"]) for entry in entries}

    def __call__(self, skipped: Skipped) -> None:
        """Name a record, unless it is named already."""
        key = skipped.file, skipped.record
        if key in self._named:
            return
        self._named.add(key)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(_line(skipped))


def write_skipped(file: Path, skipped: Iterable[Skipped]) -> None:
    """The records that are known to be unusable before a run, one line of JSON each, in place of what the file held."""
    part = file.with_name(f".{file.name}.part")
    with part.open("w", encoding="utf-8") as lines:
        lines.writelines(map(_line, skipped))
    os.replace(part, file)


def _line(skipped: Skipped) -> str:
    return json.dumps(dataclasses.asdict(skipped)) + "\n"
