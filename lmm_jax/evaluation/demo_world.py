"""The demo world as a benchmark: drawn when it is first asked for, with answers that are known, so all runs offline."""

from __future__ import annotations

import collections
import functools
from pathlib import Path

from lmm_jax.demo.dataset import write_test_set
from lmm_jax.evaluation.benchmark import Benchmark, Record, Row, Run, Score, one_line, read_lines

SEED = 20261120  # of scenes that no training set has
SIZES = {"demo": (2000, 500), "demo_small": (200, 50)}  # pictures, clips; the small one is the beginning of the other


def _records(folder: Path, images: int, clips: int) -> list[Record]:
    if not (folder / "questions.jsonl").exists():  # the list comes last, when all pictures are there
        write_test_set(folder, images=images, clips=clips, seed=SEED)
    return [
        Record(
            key,
            row["question"],
            images=(str(folder / row["image"]),) if "image" in row else (),
            video=str(folder / row["video"]) if "video" in row else "",
            row={name: row[name] for name in ("id", "type", "question", "answer")},
        )
        for key, row in enumerate(read_lines(folder / "questions.jsonl"))
    ]


def _answer_row(record: Record, reply: str) -> Row:
    return {"question_id": f"{record.row['id']} {record.row['type']}", **record.row, "text": reply}


def _score(run: Run) -> Score:
    """An answer counts where it is exactly right."""
    right = [float(not a.fault and a.reply.strip() == a.record.row["answer"]) for a in run.answers]
    parts = collections.defaultdict(list)
    for a, r in zip(run.answers, right):
        kind = "clips" if a.record.video else "pictures"
        for name in (kind, f"{kind} / {a.record.row['type']}"):
            parts[name].append(r)
    figures = {name: 100 * sum(of) / len(of) for name, of in sorted(parts.items())}
    expected = [one_line(a.record.row["answer"]) for a in run.answers]
    return Score(100 * sum(right) / max(len(right), 1), figures, right, expected=expected)


def _benchmark(name: str) -> Benchmark:
    images, clips = SIZES[name]
    return Benchmark(
        name=name,
        title=f"demo world ({images:,} pictures, {clips} clips)",
        folder=name,
        records=functools.partial(_records, images=images, clips=clips),
        max_new_tokens=16,
        headline="accuracy, %",
        answer_row=_answer_row,
        score=_score,
    )


BENCHMARKS = tuple(_benchmark(name) for name in SIZES)
