"""Image benchmarks with answers of a word or two: VQAv2, GQA, VizWiz, TextVQA (evaluation spec sections 4.1 to 4.5).

What is right is looked up by id or by picture and question, never by place. A question without an answer is wrong, where the
published scripts abort (GQA, VizWiz) or leave it out (TextVQA).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmm_jax.errors import UserError
from lmm_jax.evaluation.benchmark import Benchmark, Record, Row, Run, Score, one_line
from lmm_jax.evaluation.parsing import REFERENCES, normalise, vqa_accuracy
from lmm_jax.evaluation.reading import (
    LOADER_TOKENS,
    answer_row,
    check_fields,
    id_and_prompt,
    llava_records,
    look_up,
    mean_percent,
    note_unasked,
    published,
    ratio,
    read_object,
    write_json,
)

_OCR = "Reference OCR token:"


# ---- VQAv2 and VizWiz: servers


def _vqav2_records(folder: Path) -> list[Record]:
    return llava_records(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", folder / "test2015")


def _vqav2_export(run: Run, out: Path) -> list[Path]:
    """Every question of test2015 in its order; "" where there is no answer, as the server wants it."""
    replies = {a.record.row["question_id"]: normalise(a.reply) for a in run.answers if not a.fault}
    file = run.folder / "llava_vqav2_mscoco_test2015.jsonl"
    ids = [record.row["question_id"] for record in llava_records(file, run.folder)]
    if unknown := replies.keys() - set(ids):
        raise UserError(f"{file} does not hold question {min(unknown, key=str)}, which was answered: take both of eval.zip")
    return write_json(out / "vqav2_upload.json", [{"question_id": i, "answer": replies.get(i, "")} for i in ids])


def _vizwiz_export(run: Run, out: Path) -> list[Path]:
    """Every picture in the order of the question file; "" where there is no answer, where the published script aborts."""
    images = (Path(str(a.record.images[0])).name for a in run.answers)
    answers = ("" if a.fault else normalise(a.reply) for a in run.answers)
    return write_json(out / "vizwiz_upload.json", [{"image": i, "answer": a} for i, a in zip(images, answers)])


# ---- GQA


def _gqa_prediction(reply: str) -> str:
    return reply.rstrip(".").lower()


def _gqa_export(run: Run, out: Path) -> list[Path]:
    """The predictions that GQA's own ``eval.py`` reads."""
    predictions = [
        {"questionId": a.record.row["question_id"], "prediction": "" if a.fault else _gqa_prediction(a.reply)}
        for a in run.answers
    ]
    return write_json(out / "testdev_balanced_predictions.json", predictions)


def _gqa_tables(question: Row) -> dict[str, str | int]:
    """Table -> row, for each table in which a question counts."""
    structural = question["types"]["structural"]
    steps = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    asked = ("exist", "query: name", "choose name")  # what is asked for in the end is no step
    return {
        "kind": "open" if structural == "query" else "binary",
        "structural type": structural,
        "semantic type": question["types"]["semantic"],
        "reasoning steps": sum(not any(name in step for name in asked) for step in steps),
        "words": len(question["question"].split()),
    }


def _check_gqa(question: Any, where: str) -> None:
    kinds = {"question": str, "answer": str, "isBalanced": bool, "types": dict, "groups": dict, "semantic": list}
    check_fields(question, kinds, where)
    check_fields(question["types"], {"structural": str, "semantic": str}, where)
    check_fields(question["groups"], {"global": (str, type(None))}, where)
    for step in question["semantic"]:
        check_fields(step, {"operation": str, "argument": str}, where)


def _distance(gold: Mapping[str, Counter], predicted: Mapping[str, Counter], notes: list[str]) -> float:
    """How far answers are spread otherwise than the right ones: GQA's chi-square, a mean over groups of questions."""
    sizes = {group: counts.total() for group, counts in gold.items()}
    squares = {g: sum((predicted[g][a] - n) ** 2 / n for a, n in counts.items()) for g, counts in gold.items()}
    weighted = sum(size * squares[group] for group, size in sizes.items())
    return ratio(weighted, sum(sizes.values()), "distribution", notes) / 100


def _gqa_score(run: Run) -> Score:
    """Equal strings, over balanced questions. Validity and plausibility need a file that testdev does not have."""
    file = run.folder / "data" / "testdev_balanced_questions.json"
    questions, notes = read_object(file), []
    for name, question in questions.items():
        _check_gqa(question, f"question {name} of {file}")
    right: list[float | None] = []
    expected: list[str | None] = []
    tables: dict[tuple[str, str | int], list[float]] = defaultdict(list)
    gold, predicted = defaultdict(Counter), defaultdict(Counter)
    for a in run.answers:
        question, prediction = look_up(questions, a.record.row["question_id"], file), _gqa_prediction(a.reply)
        hit = float(not a.fault and prediction == question["answer"])
        right.append(hit if question["isBalanced"] else None)
        expected.append(one_line(question["answer"]))
        if question["isBalanced"]:
            for place in _gqa_tables(question).items():
                tables[place].append(hit)
            if (group := question["groups"]["global"]) is not None:
                gold[group][question["answer"]] += 1
                predicted[group][prediction] += not a.fault
    balanced = [name for name, question in questions.items() if question["isBalanced"]]
    note_unasked(balanced, [a.record.row["question_id"] for a in run.answers], file, notes)
    figures = {"accuracy": mean_percent([hit for hit in right if hit is not None], "accuracy", notes)}
    for kind in ("binary", "open"):
        figures[kind] = mean_percent(tables.pop(("kind", kind), []), f"accuracy of {kind} questions", notes)
    figures["distribution"] = _distance(gold, predicted, notes)
    for table, entry in sorted(tables):
        figures[f"{table} / {entry}"] = mean_percent(tables[table, entry], entry, notes)
        figures[f"questions by {table} / {entry}"] = len(tables[table, entry])
    return Score(figures["accuracy"], figures, right, notes, expected)


# ---- TextVQA


def _textvqa_records(folder: Path) -> list[Record]:
    file = folder / "llava_textvqa_val_v051_ocr.jsonl"
    return llava_records(file, folder / "train_images", ("question_id", "text"))


def _textvqa_question(record: Record) -> str:
    """The question in a prompt, which may come with a line of what was read in the picture, in lower case."""
    lines = record.row["prompt"].split("\n")
    if len(lines) == 2:
        return lines[0].lower()
    if len(lines) == 3 and lines[0].startswith(_OCR):
        return lines[1].lower()
    if len(lines) == 3 and lines[1].startswith(_OCR):
        return lines[0].lower()
    raise UserError(f"record {record.key + 1} of TextVQA asks {record.row['prompt']!r:.120}: expected two or three lines")


def _textvqa_expected(answers: list[str]) -> str:
    """What people said, each once, the most frequent first."""
    return " / ".join(answer for answer, _ in Counter(map(one_line, answers)).most_common() if answer)


def _textvqa_score(run: Run) -> Score:
    file = run.folder / "TextVQA_0.5.1_val.json"
    data, notes = read_object(file).get("data"), []
    if not isinstance(data, list):
        raise UserError(f"{file} has no list of data: the file is not the one that was published")
    references: dict[tuple[str, str], list[str]] = {}
    for number, entry in enumerate(data, 1):
        where = f"entry {number} of {file}"
        check_fields(entry, {"image_id": str, "question": str, "answers": list}, where)
        if len(entry["answers"]) != REFERENCES or not all(isinstance(answer, str) for answer in entry["answers"]):
            raise UserError(f"{where} has {entry['answers']!r:.80} for answers: expected {REFERENCES} texts")
        references[entry["image_id"], entry["question"].lower()] = entry["answers"]
    right, expected, keys = [], [], [(a.record.row["question_id"], _textvqa_question(a.record)) for a in run.answers]
    for a, key in zip(run.answers, keys):
        answers = look_up(references, key, file)
        right.append(0.0 if a.fault else vqa_accuracy(a.reply, answers))
        expected.append(_textvqa_expected(answers))
    if repeated := len(data) - len(references):
        notes.append(f"{repeated} entries of {file.name} repeat a question about a picture; the last one counts, as published")
    note_unasked(references, keys, file, notes)
    accuracy = mean_percent(right, "accuracy", notes)
    return Score(accuracy, {"accuracy": accuracy}, right, notes, expected)


# ---- the table

VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2",
    folder="vqav2",
    records=_vqav2_records,
    max_new_tokens=LOADER_TOKENS,
    headline="accuracy on test-dev, %",
    answer_row=answer_row,
    export=_vqav2_export,
    published=published(78.5, 77.6, 78.9, 79.0),
    size=107_394,
)
GQA = Benchmark(
    name="gqa",
    title="GQA",
    folder="gqa",
    records=lambda folder: llava_records(folder / "llava_gqa_testdev_balanced.jsonl", folder / "data" / "images"),
    max_new_tokens=LOADER_TOKENS,
    headline="accuracy, %",
    answer_row=answer_row,
    score=_gqa_score,
    export=_gqa_export,
    published=published(62.0, 60.9, 61.8, 61.3),
    size=12_578,
)
VIZWIZ = Benchmark(
    name="vizwiz",
    title="VizWiz",
    folder="vizwiz",
    records=lambda folder: llava_records(folder / "llava_test.jsonl", folder / "test"),
    max_new_tokens=LOADER_TOKENS,
    headline="accuracy on test, %",
    answer_row=answer_row,
    export=_vizwiz_export,
    published=published(50.0, 56.2, 58.5, 57.4),
    size=8_000,
)
TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA",
    folder="textvqa",
    records=_textvqa_records,
    max_new_tokens=LOADER_TOKENS,
    headline="accuracy, %",
    answer_row=answer_row,
    identity=id_and_prompt,
    score=_textvqa_score,
    published=published(58.2, 57.0, 59.1, 58.5),
    size=5_000,
)
BENCHMARKS = (VQAV2, GQA, VIZWIZ, TEXTVQA)
