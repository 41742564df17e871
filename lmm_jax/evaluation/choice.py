"""Image benchmarks with letters of options for answers: ScienceQA, MMBench, MMBench-CN, SEED (evaluation spec section 4).

What is right is looked up by id, and a question without an answer is wrong.
"""

from __future__ import annotations

import base64
import csv
import functools
import itertools
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmm_jax.errors import UserError
from lmm_jax.evaluation.benchmark import Answered, Benchmark, Record, Run, Score, one_line, read_json
from lmm_jax.evaluation.parsing import exact_letter, scienceqa_letter
from lmm_jax.evaluation.reading import (
    LETTER,
    LOADER_TOKENS,
    SCRIPT_TOKENS,
    answer_row,
    check_fields,
    check_new,
    llava_records,
    look_up,
    mean_percent,
    note_unasked,
    published,
    read_object,
    write_json,
)

LETTER_CN = "\n请直接回答选项字母。"

_ROTATION = 1_000_000  # rows of MMBench whose index is the same but for multiples of it ask the same
_LETTERS = "ABCD"
_MMBENCH_COLUMNS = ("index", "question", "hint", *_LETTERS, "answer", "image", "split")
_MMBENCH_UPLOAD = ("index", "question", *_LETTERS, "prediction", "answer", "split")
# what pandas reads as an empty cell
_PANDAS_EMPTY = {"#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
_PANDAS_EMPTY |= {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}


def _option(letter: str, text: Any) -> str:
    """An option as questions show it."""
    return one_line(f"{letter}. {text}")


# ---- ScienceQA


def _scienceqa_records(folder: Path) -> list[Record]:
    """All questions of the test split; those without a picture are asked without one."""
    file = folder / "llava_test_CQM-A.json"
    entries = read_json(file)
    if not isinstance(entries, list):
        raise UserError(f"{file} holds no list of questions: the file is not the one of eval.zip")
    records, seen = [], set()
    for key, entry in enumerate(entries):
        where = f"record {key + 1} of {file}"
        check_fields(entry, {"id": str, "conversations": list, "image": (str, type(None))}, where)
        check_new(entry["id"], seen, where)
        check_fields(next(iter(entry["conversations"]), None), {"value": str}, f"the question of {where}")
        text = entry["conversations"][0]["value"].replace("<image>", "").strip() + LETTER
        image = entry.get("image")
        images = (str(folder / "images" / "test" / image),) if image else ()
        row = {"question_id": entry["id"], "prompt": f"<image>\n{text}" if image else text}
        records.append(Record(key, text, images=images, row=row))
    return records


def _scienceqa_problems(run: Run) -> dict[str, dict[str, Any]]:
    """The problems of the test split, in its order."""
    file = run.folder / "pid_splits.json"
    names = read_object(file).get("test")
    if not isinstance(names, list):
        raise UserError(f"{file} has no list named test: the file is not the one that was published")
    file = run.folder / "problems.json"
    everything = read_object(file)
    problems = {name: look_up(everything, name, file) for name in map(str, names)}
    kinds = {"choices": list, "answer": int, "hint": str, "image": (str, type(None)), "subject": str, "grade": str}
    for name, problem in problems.items():
        check_fields(problem, kinds, f"problem {name} of {file}")
        if not 0 <= problem["answer"] < len(problem["choices"]):
            raise UserError(
                f"problem {name} of {file} has {problem['answer']} for an answer to {len(problem['choices'])} choices"
            )
    return problems


def _scienceqa_choice(a: Answered, problem: Mapping[str, Any]) -> int:
    """The number of the option that was named, from 0; -1 where none was, or none that is there."""
    letter = "" if a.fault else scienceqa_letter(a.reply)
    return "ABCDE"[: len(problem["choices"])].find(letter) if letter else -1


def _scienceqa_results(run: Run) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Problems by name, and what was chosen; -1 also where nothing was asked."""
    problems = _scienceqa_problems(run)
    chosen = dict.fromkeys(problems, -1)
    for a in run.answers:
        name = a.record.row["question_id"]
        chosen[name] = _scienceqa_choice(a, look_up(problems, name, run.folder / "pid_splits.json"))
    return problems, chosen


def _scienceqa_parts(problem: Mapping[str, Any]) -> list[str]:
    """The columns of the official table in which a problem counts."""
    subjects = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
    context = [name for name, there in (("TXT", problem["hint"]), ("IMG", problem["image"])) if there] or ["NO"]
    grades = "G1-6" if problem["grade"] in {f"grade{n}" for n in range(1, 7)} else "G7-12"
    return [subjects.get(problem["subject"], problem["subject"]), *context, grades]


def _scienceqa_score(run: Run) -> Score:
    """The headline is of questions with a picture.

    Which these are is in the problems; the published script takes it from answers files, and so leaves out a picture's
    question that has no answer, which here is wrong.
    """
    problems, chosen = _scienceqa_results(run)
    notes: list[str] = []
    hits = {name: float(chosen[name] == problem["answer"]) for name, problem in problems.items()}
    names = [a.record.row["question_id"] for a in run.answers]
    if unasked := len(problems) - len(set(names)):
        notes.append(f"{unasked} questions of the test split are not in the question file and count as wrong")
    if unread := sum(not a.fault and chosen[name] < 0 for a, name in zip(run.answers, names)):
        notes.append(f"{unread} replies name no option, or none that is there, and count as wrong")
    tables: dict[str, list[float]] = {part: [] for part in ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")}
    for name, problem in problems.items():
        for part in _scienceqa_parts(problem):
            tables.setdefault(part, []).append(hits[name])
    figures = {f"part / {part}": mean_percent(values, part, notes) for part, values in tables.items()}
    overall = {"with a picture": figures["part / IMG"], "all": mean_percent(hits.values(), "all", notes)}
    right = [hits[name] if problems[name]["image"] else None for name in names]
    answers = {name: (problem["answer"], problem["choices"][problem["answer"]]) for name, problem in problems.items()}
    expected = [_option(chr(ord("A") + number), text) for number, text in map(answers.get, names)]
    return Score(overall["with a picture"], overall | figures, right, notes, expected)


def _scienceqa_export(run: Run, out: Path) -> list[Path]:
    """What LLaVA's scorer writes and the official table is made from: problem -> number of the option, or -1."""
    problems, chosen = _scienceqa_results(run)
    correct = sum(chosen[name] == problem["answer"] for name, problem in problems.items())
    summary = {"acc": correct / len(problems) * 100 if problems else 0.0, "correct": correct, "count": len(problems)}
    outputs = {a.record.row["question_id"]: a.reply for a in run.answers if not a.fault}
    return write_json(out / "scienceqa_results.json", summary | {"results": chosen, "outputs": outputs})


# ---- MMBench


def _mmbench_table(file: Path, as_published: bool) -> list[dict[str, str]]:
    """Rows of cells; an empty one is "".

    Args:
      file: tab-separated, with a head.
      as_published: whether cells are taken for empty that pandas takes for empty.

    Raises:
      UserError: it is missing or malformed, or has an index twice.
    """
    csv.field_size_limit(2**31 - 1)  # a cell holds a picture
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines, dialect="excel-tab"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({error}): give the table that was published") from error
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        where = f"row {number} of {file}"
        check_fields(row, dict.fromkeys(_MMBENCH_COLUMNS, str), where)
        if None in row or not row["index"].isdecimal():
            raise UserError(
                f"{where} has more cells than the head, or no number for an index: it is {list(row.values())!r:.80}"
            )
        check_new(row["index"], seen, where)
        if as_published:
            row.update((name, "") for name, cell in row.items() if cell in _PANDAS_EMPTY)
    return rows


def _mmbench_records(folder: Path, file: str, suffix: str, as_published: bool) -> list[Record]:
    """One record for each row; options end at the first that is empty."""
    nothing = ("", "nan", "none")
    empty = nothing if as_published else ("",)
    records = []
    for key, row in enumerate(_mmbench_table(folder / file, as_published)):
        options = list(itertools.takewhile(lambda option: option.lower() not in empty, (row[x] for x in _LETTERS)))
        hint = [row["hint"]] if row["hint"].lower() not in nothing else []
        prompt = "\n".join([*hint, row["question"], *(f"{x}. {option}" for x, option in zip(_LETTERS, options))])
        try:
            image = base64.b64decode(row["image"])
        except ValueError as error:
            raise UserError(
                f"the image of row {key + 1} of {folder / file} is no base64 ({error}): get the file again"
            ) from error
        fields = {"question_id": int(row["index"]), "round_id": 0, "prompt": prompt}
        fields |= {"options": options, "option_char": list(_LETTERS[: len(options)])}
        records.append(Record(key, prompt + suffix, images=(image,), row=fields))
    return records


def _mmbench_score(run: Run, file: str) -> Score:
    """A question is right if all its rotations are (evaluation spec section 3.6).

    The server lets an LLM read replies that are more than a letter; here these are wrong.
    """
    path = run.folder / file
    gold = {int(row["index"]): (row["answer"], row.get(row["answer"], "")) for row in _mmbench_table(path, as_published=False)}
    right, expected, notes, questions = [], [], [], defaultdict(list)
    for a in run.answers:
        index = a.record.row["question_id"]
        answer, text = look_up(gold, index, path)
        if not exact_letter(answer):
            raise UserError(f"{path} has {answer!r:.40} for the answer of row {index}: take the dev table, which has letters")
        right.append(float(not a.fault and a.reply == answer))
        expected.append(_option(answer, text))
        questions[index % _ROTATION].append(right[-1])
    if wordy := sum(not a.fault and not exact_letter(a.reply) for a in run.answers):
        notes.append(f"{wordy} replies are not just a letter and count as wrong, though the server may read them otherwise")
    note_unasked(gold, [a.record.row["question_id"] for a in run.answers], path, notes)
    circular = mean_percent([min(hits) for hits in questions.values()], "circular accuracy", notes)
    figures = {"circular": circular, "rows": mean_percent(right, "accuracy of rows", notes)}
    return Score(circular, figures, right, notes, expected)


def _mmbench_export(run: Run, out: Path, file: str, as_published: bool) -> list[Path]:
    """The table that the server takes, as Excel; every text in it is text, be it like a formula or not."""
    try:
        import openpyxl
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE as UNWRITABLE
    except ImportError as error:
        raise UserError("MMBench is handed in as an Excel file, which needs openpyxl: pip install openpyxl") from error
    replies = {a.record.row["question_id"]: a.reply for a in run.answers if not a.fault}
    book = openpyxl.Workbook()
    book.active.append(_MMBENCH_UPLOAD)
    for number, row in enumerate(_mmbench_table(run.folder / file, as_published), 2):
        values = row | {"prediction": replies.get(int(row["index"]), "")}
        book.active.cell(number, 1, int(row["index"]))
        for column, name in enumerate(_MMBENCH_UPLOAD[1:], 2):
            if values[name]:
                text = UNWRITABLE.sub("", values[name]).encode(errors="replace").decode()
                book.active.cell(number, column, text).data_type = "s"
    path = out / Path(file).with_suffix(".xlsx").name
    book.save(path)
    return [path]


def _mmbench(
    name: str,
    title: str,
    file: str,
    figures: Mapping[str, float],
    size: int | None,
    chinese: bool = False,
    as_published: bool = False,
) -> Benchmark:
    suffix = LETTER_CN if chinese else LETTER
    return Benchmark(
        name=name,
        title=title,
        folder="mmbench_cn" if chinese else "mmbench",
        records=functools.partial(_mmbench_records, file=file, suffix=suffix, as_published=as_published),
        max_new_tokens=SCRIPT_TOKENS,
        headline="circular accuracy, %",
        answer_row=answer_row,
        score=functools.partial(_mmbench_score, file=file),
        export=functools.partial(_mmbench_export, file=file, as_published=as_published),
        published=figures,
        size=size,
    )


# ---- SEED


def _seed_questions(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[int, str]]:
    """Questions by id in the order of the file, and the names of their types."""
    file = folder / "SEED-Bench.json"
    content = read_object(file)
    check_fields(content, {"question_type": dict, "questions": list}, str(file))
    questions, seen = {}, set()
    check_fields(content["question_type"], dict.fromkeys(content["question_type"], int), f"question_type of {file}")
    types = {number: name for name, number in content["question_type"].items()}
    for number, entry in enumerate(content["questions"], 1):
        where = f"question {number} of {file}"
        kinds = {"question_id": (int, str), "answer": str, "data_type": str, "question_type_id": int}
        check_fields(entry, kinds, where)
        check_new(str(entry["question_id"]), seen, where)
        if not exact_letter(entry["answer"]) or entry["question_type_id"] not in types:
            raise UserError(f"{where} has no letter for an answer, or a type that is none: the file is not the published one")
        questions[str(entry["question_id"])] = entry
    return questions, types


def _seed_score(run: Run) -> Score:
    """Replies that are the letter and nothing else, over pictures and frames of videos alike."""
    questions, types = _seed_questions(run.folder)
    file = run.folder / "SEED-Bench.json"
    tables: dict[str, list[float]] = {"image": [], "video": []} | {f"type / {types[n]}": [] for n in sorted(types)}
    right, expected, notes = [], [], []
    for a in run.answers:
        question = look_up(questions, str(a.record.row["question_id"]), file)
        right.append(float(not a.fault and a.reply == question["answer"]))
        expected.append(_option(question["answer"], question.get(f"choice_{question['answer'].lower()}", "")))
        tables["video" if question["data_type"] == "video" else "image"].append(right[-1])
        tables[f"type / {types[question['question_type_id']]}"].append(right[-1])
    note_unasked(questions, [str(a.record.row["question_id"]) for a in run.answers], file, notes)
    if wordy := sum(not a.fault and not exact_letter(a.reply) for a in run.answers):
        notes.append(f"{wordy} replies are not just a letter and count as wrong")
    total = mean_percent(right, "total", notes)
    figures = {name: mean_percent(hits, name, notes) for name, hits in tables.items() if hits or "/" not in name}
    return Score(total, {"total": total} | figures, right, notes, expected)


def _seed_export(run: Run, out: Path) -> list[Path]:
    """Every question in the order of ``SEED-Bench.json``; "" where there is no answer, where the published script aborts."""
    questions, _ = _seed_questions(run.folder)
    replies = {str(a.record.row["question_id"]): a.reply for a in run.answers if not a.fault}
    file = out / "seed_upload.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for name in questions:
            lines.write(json.dumps({"question_id": name, "prediction": replies.get(name, "")}) + "\n")
    return [file]


# ---- the table

SCIENCEQA = Benchmark(
    name="scienceqa",
    title="ScienceQA-IMG",
    folder="scienceqa",
    records=_scienceqa_records,
    max_new_tokens=SCRIPT_TOKENS,
    headline="accuracy, %",
    answer_row=answer_row,
    score=_scienceqa_score,
    export=_scienceqa_export,
    published=published(66.8, 70.4, 69.7, 83.1),
    size=4_241,
)
_DEV = ("mmbench_dev_20230712.tsv", published(64.3, 65.6, 67.5, 71.6), 4_377)
MMBENCH = _mmbench("mmbench", "MMBench", *_DEV)
# as the published scripts read it: an option whose text is None or NA is empty, and ends the options (section 7, T12)
MMBENCH_AS_PUBLISHED = _mmbench("mmbench_as_published", "MMBench, cells as published", *_DEV, as_published=True)
MMBENCH_CN = _mmbench("mmbench_cn", "MMBench-CN", "mmbench_dev_cn_20231003.tsv", published(58.3), None, chinese=True)
SEED = Benchmark(
    name="seed",
    title="SEED-Bench",
    folder="seed_bench",
    records=lambda folder: llava_records(folder / "llava-seed-bench.jsonl", folder),
    max_new_tokens=LOADER_TOKENS,
    headline="accuracy, %",
    answer_row=answer_row,
    score=_seed_score,
    export=_seed_export,
    published=published(58.6, 58.5, 60.2, 63.0),
    size=19_242,
)
BENCHMARKS = (SCIENCEQA, MMBENCH, MMBENCH_AS_PUBLISHED, MMBENCH_CN, SEED)
