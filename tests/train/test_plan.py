"""Which rows are in which batch: complete, in few shapes, and the same for whoever asks."""

import dataclasses

import numpy as np
import pytest

from train.plan import Bucket, Plan, Sizes

LENGTHS = (64, 128, 256)


def sizes(count=500, seed=0, kinds=(0, 1, 8)):
    """Records of several kinds; the numbers of records are not consecutive, as some of a mixture are unusable."""
    rng = np.random.default_rng(seed)
    length = rng.integers(10, 257, count)
    images = rng.choice(kinds, count)
    targets = rng.integers(1, length)
    return Sizes(np.arange(count) * 2 + 3, images, length, np.where(images > 0, length - targets, 0), targets)


def plan(of, batch_size=16, epochs=2, seed=0):
    return Plan(of, lengths=LENGTHS, batch_size=batch_size, epochs=epochs, seed=seed)


def everything(of):
    return [(bucket, rows.tolist()) for bucket, rows in of]


@pytest.mark.parametrize("count, batch_size", [(500, 16), (500, 1), (37, 64), (16, 16), (1, 4)])
def test_every_record_comes_once_in_every_epoch(count, batch_size):
    of = sizes(count)
    got = plan(of, batch_size, epochs=3)
    assert len(got) == 3 * got.steps_per_epoch
    for epoch in range(3):
        batches = [got[i] for i in range(epoch * got.steps_per_epoch, (epoch + 1) * got.steps_per_epoch)]
        rows = np.concatenate([rows for _, rows in batches])
        assert {(r.shape, r.dtype.name) for _, r in batches} == {((batch_size,), "int64")}
        assert sorted(rows[rows >= 0]) == of.record.tolist()
        assert all(r[0] >= 0 for _, r in batches)  # no batch is empty


def test_rows_fit_their_bucket():
    of = sizes()
    for bucket, rows in plan(of):
        at = np.searchsorted(of.record, rows[rows >= 0])
        assert set(of.images[at]) == {bucket.images}
        assert bucket.length in LENGTHS and of.length[at].max() <= bucket.length
        assert of.fused[at].max() <= bucket.fused and of.targets[at].max() <= bucket.targets


def test_shapes_are_few_and_the_same_in_every_epoch():
    of, epochs = sizes(), 20
    got = plan(of, epochs=epochs)
    shapes = [
        sorted(bucket for bucket, _ in everything(got)[e * got.steps_per_epoch :][: got.steps_per_epoch])
        for e in range(epochs)
    ]
    assert all(s == shapes[0] for s in shapes)
    assert set(shapes[0]) == set(got.buckets) and len(got.buckets) <= 3 * len(LENGTHS)
    assert {b: shapes[0].count(b) for b in got.buckets} == {b: n for b, n in got.batches.items() if n}
    assert len({(b.images, b.length) for b in got.buckets}) == len(got.buckets)


def test_what_is_left_of_a_bucket_moves_up_and_only_the_last_has_empty_slots():
    length = np.array([50] * 5 + [100] * 2 + [200] * 2)
    fused = np.array([40] * 5 + [20] * 4)  # of the short ones: they count where they may move up to
    of = Sizes(np.arange(9), np.ones(9, int), length, fused, np.full(9, 5))
    got = plan(of, batch_size=4, epochs=1)
    by_length = {bucket.length: rows.tolist() for bucket, rows in got}
    assert set(by_length[64]) < set(range(5)) and -1 not in by_length[64]
    assert got.batches == {Bucket(1, 64, 48, 16): 1, Bucket(1, 128, 48, 16): 0, Bucket(1, 256, 48, 16): 2}
    assert [got.rows[bucket] for bucket in sorted(got.rows)] == [5, 2, 2]
    last = [rows.tolist() for bucket, rows in got if bucket.length == 256 and -1 in rows]
    assert len(last) == 1 and last[0][1:] == [-1, -1, -1]
    assert got.padding == pytest.approx(1 - (5 * 50 + 2 * 100 + 2 * 200) / (4 * (64 + 256 + 256)))


def test_a_kind_with_few_records_has_one_batch():
    of = sizes(200, kinds=(1,))
    few = dataclasses.replace(of, images=np.where(np.arange(200) < 2, 3, 1))
    (rows,) = [rows for bucket, rows in plan(few, epochs=1) if bucket.images == 3]
    assert sorted(rows)[-2:] == [3, 5] and (rows < 0).sum() == 14


def test_order_follows_seed_and_epoch():
    of = sizes()
    first = everything(plan(of, seed=5))
    assert first == everything(plan(of, seed=5)) and first != everything(plan(of, seed=6))
    half = len(first) // 2
    assert first[:half] != first[half:]
    assert sorted(b for b, _ in first[:half]) == sorted(b for b, _ in first[half:])
    shapes = [b.length for b, _ in first[:half]]
    assert shapes != sorted(shapes)  # the buckets are mixed
    got = plan(of, seed=5)
    assert [got[i][1].tolist() for i in reversed(range(len(got)))] == [rows for _, rows in reversed(first)]


def test_more_epochs_do_not_change_the_first_ones():
    of = sizes()
    assert everything(plan(of, epochs=4))[: len(plan(of))] == everything(plan(of))


def test_outside_of_the_plan():
    got = plan(sizes())
    for i in (-1, len(got)):
        with pytest.raises(IndexError):
            got[i]


def test_a_real_mixture_pads_little():
    rng = np.random.default_rng(0)
    count = 50_000
    length = np.clip(rng.lognormal(5.2, 0.8, count).astype(int), 40, 4096)
    of = Sizes(np.arange(count), rng.choice([0, 1], count), length, length // 2, length // 2)
    lengths = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
    got = Plan(of, lengths=lengths, batch_size=256, epochs=1, seed=0)
    assert got.padding < 0.3 and len(got.buckets) <= 20
