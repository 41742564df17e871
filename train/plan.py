"""Which rows are in which batch: a function of the configuration, the lengths and the epoch, the same on every host.

Rows of a batch have the same number of pictures and nearly the same length, so that shapes are few and fixed. What is left
of a bucket when it is cut into batches moves up into the next longer one; what is left at the end is filled up with empty
slots: every record is seen once in every epoch, and every epoch has the same batches, in another order with other rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

_STEP = 16  # I and Q are multiples of it, so that they change little when records are added


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """The shape of a batch.

    Attributes:
      images: pictures or frames of a row (n).
      length: decoder positions (T).
      fused: instruction tokens that go through pre-fusion (I); at least 1.
      targets: positions that predict (Q).
    """

    images: int
    length: int
    fused: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the U usable records, (U,) each.

    Attributes:
      record: int64, the record's number in the whole mixture.
      images: pictures or frames.
      length: decoder positions.
      fused: instruction tokens that go through pre-fusion.
      targets: tokens that are predicted.
    """

    record: np.ndarray
    images: np.ndarray
    length: np.ndarray
    fused: np.ndarray
    targets: np.ndarray


class Plan(Sequence[tuple[Bucket, np.ndarray]]):
    """The batches of all epochs: ``plan[i]`` is the bucket and the records, int64 (B,), −1 where a slot is empty.

    Attributes:
      batch_size: B.
      steps_per_epoch: batches of an epoch.
      epochs: passes over the data.
      rows: bucket -> records whose length falls into it.
      batches: bucket -> batches of it in an epoch. A bucket may have rows and no batches: all of them moved up.
    """

    def __init__(self, sizes: Sizes, *, lengths: Sequence[int], batch_size: int, epochs: int, seed: int) -> None:
        """Group the records.

        Args:
          sizes: of the usable records, none longer than the last of `lengths`.
          lengths: T of the buckets, ascending.
          batch_size: B.
          epochs: passes over the data.
          seed: of the order, not negative.
        """
        self.batch_size, self.epochs, self._seed = batch_size, epochs, seed
        self._groups = _group(sizes, np.asarray(lengths))
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)  # batches decoded ahead may be of the next epoch
        self.rows = {bucket: len(members) for group in self._groups for bucket, members in group}
        first = [bucket for bucket, _ in self._order(0)]
        self.batches = {bucket: first.count(bucket) for bucket in self.rows}
        self.steps_per_epoch = len(first)
        self._real = int(sizes.length.sum())

    def __len__(self) -> int:
        """Batches of all epochs."""
        return self.steps_per_epoch * self.epochs

    def __getitem__(self, i: int) -> tuple[Bucket, np.ndarray]:
        """The i-th batch of the run."""
        if not 0 <= i < len(self):
            raise IndexError(f"batch {i} of {len(self)}")
        return self._order(i // self.steps_per_epoch)[i % self.steps_per_epoch]

    @property
    def buckets(self) -> list[Bucket]:
        """The shapes that occur."""
        return [bucket for bucket, count in self.batches.items() if count]

    @property
    def padding(self) -> float:
        """Share of decoder positions that are padding or belong to empty slots."""
        positions = sum(count * bucket.length for bucket, count in self.batches.items()) * self.batch_size
        return 1 - self._real / positions if positions else 0.0

    def _shuffled(self, epoch: int) -> list[tuple[Bucket, np.ndarray]]:
        rng = np.random.default_rng((self._seed, epoch))
        size, batches = self.batch_size, []
        for group in self._groups:
            left = np.empty(0, np.int64)
            for bucket, members in group:
                left = np.concatenate([left, rng.permutation(members)])
                whole = len(left) // size * size
                batches += [(bucket, rows) for rows in left[:whole].reshape(-1, size)]
                left = left[whole:]
            if len(left):
                batches.append((bucket, np.pad(left, (0, size - len(left)), constant_values=-1)))
        return [batches[i] for i in rng.permutation(len(batches))]


def _group(sizes: Sizes, lengths: np.ndarray) -> list[list[tuple[Bucket, np.ndarray]]]:
    """For each number of pictures: its buckets, ascending in length, and the records that belong to each."""
    groups = []
    for images in np.unique(sizes.images):
        here = np.flatnonzero(sizes.images == images)
        place = np.searchsorted(lengths, sizes.length[here])
        group = []
        for k in np.unique(place):
            reach = here[place <= k]  # records of shorter buckets may move up
            fused, targets = (_round_up(int(a[reach].max())) for a in (sizes.fused, sizes.targets))
            bucket = Bucket(int(images), int(lengths[k]), max(1, fused), targets)
            group.append((bucket, sizes.record[here[place == k]]))
        groups.append(group)
    return groups


def _round_up(count: int) -> int:
    return -(-count // _STEP) * _STEP
