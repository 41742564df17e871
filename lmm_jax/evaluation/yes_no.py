"""Image benchmarks with yes and no for answers: POPE and MME (evaluation spec sections 4.6 and 4.7).

What is right is looked up by picture and question. The published script pairs POPE's answers with labels by place, so that one
missing answer shifts all that follow; here it is wrong, and nothing else changes.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from pathlib import Path

from lmm_jax.errors import UserError
from lmm_jax.evaluation.benchmark import Benchmark, Record, Run, Score, read_lines, read_text
from lmm_jax.evaluation.parsing import mme_answer, pope_says_yes
from lmm_jax.evaluation.reading import (
    LOADER_TOKENS,
    SHORT,
    answer_row,
    check_fields,
    id_and_prompt,
    llava_records,
    look_up,
    mean_percent,
    note_unasked,
    published,
    ratio,
)

_POPE = ("adversarial", "random", "popular")
_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_YES_OR_NO = "Please answer yes or no."


# ---- POPE


def _pope_score(run: Run) -> Score:
    """A question without an answer is a false yes or a false no, whichever is wrong."""
    questions = read_lines(run.folder / "llava_pope_test.jsonl")  # categories are not in answers files
    labels: dict[str, dict[tuple[str, str], bool]] = {}
    counts: dict[str, Counter] = defaultdict(Counter)
    asked: dict[str, set[tuple[str, str]]] = defaultdict(set)
    right, expected, notes = [], [], []
    for a in run.answers:
        check_fields(questions[a.record.key], {"category": str, "image": str}, f"record {a.record.key + 1} of POPE")
        category, image = questions[a.record.key]["category"], questions[a.record.key]["image"]
        if category not in labels:
            labels[category] = _pope_labels(_pope_file(run.folder, category))
        key = (image, a.record.text.removesuffix(SHORT))
        label = look_up(labels[category], key, _pope_file(run.folder, category))
        yes = pope_says_yes(a.reply)
        hit = not a.fault and yes == label
        asked[category].add(key)
        counts[category]["TP" if hit and label else "TN" if hit else "FN" if label else "FP"] += 1
        counts[category]["yes"] += not a.fault and yes
        right.append(float(hit))
        expected.append("yes" if label else "no")
    figures: dict[str, float] = {}
    for category, count in counts.items():
        note_unasked(labels[category], asked[category], _pope_file(run.folder, category), notes)
        figures |= _pope_figures(category, count, notes)
    if absent := [category for category in _POPE if category not in counts]:
        notes.append(f"there are no questions of {', '.join(absent)}")
    headline = ratio(math.fsum(figures[f"F1 / {category}"] for category in counts), len(counts), "mean F1", notes)
    return Score(headline, {"mean F1": headline} | figures, right, notes, expected)


def _pope_file(folder: Path, category: str) -> Path:
    return folder / "coco" / f"coco_pope_{category}.json"


def _pope_labels(file: Path) -> dict[tuple[str, str], bool]:
    """(Picture, question) -> whether yes is right."""
    labels: dict[tuple[str, str], bool] = {}
    for number, entry in enumerate(read_lines(file), 1):
        check_fields(entry, {"image": str, "text": str, "label": str}, f"line {number} of {file}")
        if entry["label"] not in ("yes", "no"):
            raise UserError(f"line {number} of {file} has the label {entry['label']!r:.40}: expected yes or no")
        label = entry["label"] == "yes"
        if labels.setdefault((entry["image"], entry["text"]), label) != label:
            raise UserError(f"{file} answers {entry['text']!r} about {entry['image']} with both yes and no")
    return labels


def _pope_figures(category: str, count: Counter, notes: list[str]) -> dict[str, float]:
    """Percentages; the share of yes is of what was said, so that answers that are not there are in neither."""
    tp, fp, tn, fn = (count[name] for name in ("TP", "FP", "TN", "FN"))
    total = tp + fp + tn + fn
    precision = ratio(tp, tp + fp, f"precision of {category}", notes)
    recall = ratio(tp, tp + fn, f"recall of {category}", notes)
    shares = {
        "accuracy": (tp + tn) / total,
        "precision": precision,
        "recall": recall,
        "F1": ratio(2 * precision * recall, precision + recall, f"F1 of {category}", notes),
        "yes": count["yes"] / total,
    }
    figures = {f"{name} / {category}": 100 * share for name, share in shares.items()}
    return figures | {f"{name} / {category}": n for name, n in zip(("TP", "FP", "TN", "FN"), (tp, fp, tn, fn))}


# ---- MME


def _mme_records(folder: Path) -> list[Record]:
    return llava_records(folder / "llava_mme.jsonl", folder / "MME_Benchmark_release_version", identity=())


def _mme_truth(folder: Path, task: str) -> dict[tuple[str, str], str]:
    """(File name, question) -> Yes or No, of one task."""
    place = folder / "MME_Benchmark_release_version" / task
    if (place / "questions_answers_YN").is_dir():
        place = place / "questions_answers_YN"
    truth = {}
    for file in sorted(place.glob("*.txt")):
        for number, line in enumerate(read_text(file).strip().split("\n"), 1):
            question, _, answer = line.strip().partition("\t")
            if answer not in ("Yes", "No"):
                raise UserError(f"line {number} of {file} is {line!r:.80}: expected a question, a tab, and Yes or No")
            truth[file.name, question] = answer
    return truth


def _mme_lookup(run: Run, notes: list[str]) -> list[tuple[str, str, str, str]]:
    """For each answer its task, and the name of the file, the question and the right answer as MME has them."""
    truths: dict[str, dict[tuple[str, str], str]] = {}
    found = []
    for a in run.answers:
        image, question = str(a.record.row["question_id"]), a.record.text.removesuffix(SHORT).strip()
        task, name = image.split("/")[0], Path(image).stem + ".txt"
        if task not in _PERCEPTION + _COGNITION:
            raise UserError(f"{image!r} is of no task of MME's: the question file is not the one of eval.zip")
        if task not in truths:
            truths[task] = _mme_truth(run.folder, task)
        one, two = (f"{question}{space}{_YES_OR_NO}" for space in (" ", "  "))
        question = two if (name, two) in truths[task] else one
        answer = look_up(truths[task], (name, question), run.folder / "MME_Benchmark_release_version" / task)
        found.append((task, name, question, answer))
    for task, truth in truths.items():
        note_unasked(truth, [(n, q) for t, n, q, _ in found if t == task], Path(task), notes)
    return found


def _mme_score(run: Run) -> Score:
    """Two questions belong together by their picture; what is neither yes nor no is wrong."""
    notes: list[str] = []
    pairs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    right, expected = [], []
    for a, (task, name, _, answer) in zip(run.answers, _mme_lookup(run, notes)):
        expected.append(answer)
        right.append(float(not a.fault and mme_answer(a.reply) == answer.lower()))
        pairs[task][name].append(right[-1])
    figures = {}
    for task in _PERCEPTION + _COGNITION:
        if odd := [name for name, hits in pairs[task].items() if len(hits) != 2]:
            raise UserError(f"{task}/{odd[0]} has {len(pairs[task][odd[0]])} questions in llava_mme.jsonl: expected 2")
        figures[f"acc / {task}"] = mean_percent(
            [hit for hits in pairs[task].values() for hit in hits], f"acc of {task}", notes
        )
        figures[f"acc+ / {task}"] = mean_percent([min(hits) for hits in pairs[task].values()], f"acc+ of {task}", notes)
        figures[f"score / {task}"] = figures[f"acc / {task}"] + figures[f"acc+ / {task}"]
    sums = {
        name: math.fsum(figures[f"score / {task}"] for task in tasks)
        for name, tasks in (("perception", _PERCEPTION), ("cognition", _COGNITION))
    }
    if others := sum(not a.fault and mme_answer(a.reply) == "other" for a in run.answers):
        notes.append(f"{others} replies begin with neither yes nor no and count as wrong")
    return Score(sums["perception"], sums | figures, right, notes, expected)


def _mme_export(run: Run, out: Path) -> list[Path]:
    """One file per task for MME's own ``eval_tool``. Tabs and line ends in replies, which would break it, become spaces."""
    lines: dict[str, list[str]] = defaultdict(list)
    for a, (task, *fields) in zip(run.answers, _mme_lookup(run, [])):
        reply = "" if a.fault else re.sub(r"[\t\r\n]", " ", a.reply)
        lines[task].append("\t".join([*fields, reply]) + "\n")
    files = []
    for task, rows in lines.items():
        files.append(out / f"{task}.txt")
        files[-1].write_text("".join(rows), "utf-8", errors="replace")
    return files


# ---- the table

POPE = Benchmark(
    name="pope",
    title="POPE",
    folder="pope",
    records=lambda folder: llava_records(folder / "llava_pope_test.jsonl", folder / "val2014"),
    max_new_tokens=LOADER_TOKENS,
    headline="mean F1 of three subsets, %",
    answer_row=answer_row,
    score=_pope_score,
    published=published(85.9, 84.4, 85.3, 85.3),
    size=8_910,
)
MME = Benchmark(
    name="mme",
    title="MME",
    folder="MME",
    records=_mme_records,
    max_new_tokens=LOADER_TOKENS,
    headline="perception, points of 2000",
    answer_row=answer_row,
    identity=id_and_prompt,
    score=_mme_score,
    export=_mme_export,
    published=published(1510.7, 1466.0, 1476.8, 1522.7),
    size=2_374,
)
BENCHMARKS = (POPE, MME)
