"""Answers files of others, joined to the records."""

import dataclasses
import json
import random

import pytest

from lmm_jax.errors import UserError
from lmm_jax.evaluation.benchmark import Benchmark, Record
from lmm_jax.evaluation.runs import from_file

PLAIN = Benchmark(
    name="plain",
    title="Plain",
    folder="plain",
    records=lambda folder: [],
    max_new_tokens=1,
    headline="accuracy, %",
    answer_row=lambda record, reply: record.row | {"text": reply},
)


def given(tmp_path, rows):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_many_answers_in_disorder_take_a_look_at_each(tmp_path):
    count, looks = 30_000, []
    records = [Record(key, "?", row={"question_id": key}) for key in range(count)]
    rows = [{"question_id": key, "text": f"reply {key}"} for key in range(count)]
    random.Random(0).shuffle(rows)
    counting = dataclasses.replace(PLAIN, identity=lambda row: looks.append(row) or row["question_id"])
    answers = from_file(counting, records, given(tmp_path, rows))
    assert [a.reply for a in answers] == [f"reply {key}" for key in range(count)]
    assert len(looks) == 2 * count  # of each record and of each line


def test_records_that_nothing_tells_apart_are_answered_in_order(tmp_path):
    records = [Record(key, "?", row={"question_id": key % 2}) for key in range(6)]
    rows = [{"question_id": i, "text": text} for i, text in ((1, "a"), (1, "b"), (0, "c"), (1, "d"), (0, "e"))]
    answers = from_file(PLAIN, records, given(tmp_path, rows))
    assert [a.reply for a in answers] == ["c", "a", "e", "b", "", "d"] and answers[4].fault == "missing"


@pytest.mark.parametrize("name", [2, "0", None, [0], {"a": 0}])
def test_an_id_that_is_of_no_record(tmp_path, name):
    with pytest.raises(UserError, match="answer 1 in .* is to no record of Plain"):
        from_file(PLAIN, [Record(0, "?", row={"question_id": 0})], given(tmp_path, [{"question_id": name, "text": "x"}]))
