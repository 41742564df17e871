"""Video benchmarks with options: MVBench, MLVU, EgoSchema (evaluation spec 5.3 to 5.5).

Figures are those of all rows together, where the published scripts print one for each chunk. MVBench and MLVU are read
strictly, as the published figures are; the lenient reading, by which a reply of "N/A" chooses A, stands beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmm_jax.errors import UserError
from lmm_jax.evaluation.benchmark import Answered, Benchmark, Record, Row, Run, Score, one_line, read_json
from lmm_jax.evaluation.parsing import first_capital, strict_letter
from lmm_jax.evaluation.reading import (
    LOADER_TOKENS,
    SCRIPT_TOKENS,
    check_fields,
    check_new,
    mean_percent,
    read_object,
    write_json,
)
from lmm_jax.evaluation.wording import Wording, own

LLAVA_MINI = "LLaVA-Mini"  # the paper's tables do not say which (evaluation spec section 6)

_SUFFIX = "\nAnswer with one letter."
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NO_LETTER = "@"  # what the published scripts write where the right answer is not among the options
_EGOSCHEMA_OPTIONS = 5
_MOST_FRAMES = 1000  # of MVBench and MLVU (evaluation spec section 2)


@dataclasses.dataclass(frozen=True)
class Task:
    """A part of MVBench or MLVU: its name, its file and videos below the benchmark's folder, LLaVA-Mini's accuracy."""

    name: str
    file: str
    videos: str
    published: float


@dataclasses.dataclass(frozen=True)
class ChoiceRecord(Record):
    """A question with options; how many there are, and the letter of the right one, "" if it is not among them."""

    options: int = 0
    letter: str = ""


MVBENCH_TASKS = (  # in the published order (evaluation spec appendix D); start and end of "bound" tasks are not used
    Task("Action Sequence", "json/action_sequence.json", "video/star/Charades_v1_480", 44.5),
    Task("Action Prediction", "json/action_prediction.json", "video/star/Charades_v1_480", 44.5),
    Task("Action Antonym", "json/action_antonym.json", "video/ssv2_video", 76.0),
    Task("Fine-grained Action", "json/fine_grained_action.json", "video/Moments_in_Time_Raw/videos", 37.0),
    Task("Unexpected Action", "json/unexpected_action.json", "video/FunQA_test/test", 58.5),
    Task("Object Existence", "json/object_existence.json", "video/clevrer/video_validation", 50.0),
    Task("Object Interaction", "json/object_interaction.json", "video/star/Charades_v1_480", 50.0),
    Task("Object Shuffle", "json/object_shuffle.json", "video/perception/videos", 29.5),
    Task("Moving Direction", "json/moving_direction.json", "video/clevrer/video_validation", 31.0),
    Task("Action Localization", "json/action_localization.json", "video/sta/sta_video", 32.5),
    Task("Scene Transition", "json/scene_transition.json", "video/scene_qa/video", 85.5),
    Task("Action Count", "json/action_count.json", "video/perception/videos", 35.0),
    Task("Moving Count", "json/moving_count.json", "video/clevrer/video_validation", 40.0),
    Task("Moving Attribute", "json/moving_attribute.json", "video/clevrer/video_validation", 48.0),
    Task("State Change", "json/state_change.json", "video/perception/videos", 41.0),
    Task("Fine-grained Pose", "json/fine_grained_pose.json", "video/nturgbd", 29.5),
    Task("Character Order", "json/character_order.json", "video/perception/videos", 52.0),
    Task("Egocentric Navigation", "json/egocentric_navigation.json", "video/vlnqa", 31.0),
    Task("Episodic Reasoning", "json/episodic_reasoning.json", "video/tvqa/frames_fps3_hq", 38.0),  # folders of frames
    Task("Counterfactual Inference", "json/counterfactual_inference.json", "video/clevrer/video_validation", 36.0),
)
MLVU_TASKS = (
    Task("count", "json/4_count.json", "video/4_count", 18.4),
    Task("ego", "json/3_ego.json", "video/3_ego", 37.5),
    Task("needle", "json/2_needle.json", "video/2_needle", 44.5),
    Task("order", "json/5_order.json", "video/5_order", 24.3),
    Task("plotQA", "json/1_plotQA.json", "video/1_plotQA", 49.0),
    Task("anomaly_reco", "json/6_anomaly_reco.json", "video/6_anomaly_reco", 50.0),
    Task("topic_reasoning", "json/7_topic_reasoning.json", "video/7_topic_reasoning", 76.0),
)


def entries(file: Path, kinds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A JSON file that holds a list of objects with these fields.

    Raises:
      UserError: it is missing or holds something else.
    """
    found = read_json(file)
    if not isinstance(found, list):
        raise UserError(f"{file} holds no JSON list: the file is not the one that was published")
    for number, entry in enumerate(found, 1):
        check_fields(entry, kinds, f"entry {number} of {file}")
    return found


# ---- MVBench and MLVU


def _task_records(folder: Path, tasks: Sequence[Task]) -> list[Record]:
    found = []
    for task in tasks:
        for entry in entries(folder / task.file, {"video": str, "question": str, "candidates": list}):
            found.append(_task_record(len(found), folder, task, entry))
    return found


def _task_record(key: int, folder: Path, task: Task, entry: Mapping[str, Any]) -> Record:
    candidates, answer = entry["candidates"], entry.get("answer")
    if not 1 <= len(candidates) <= len(_LETTERS):
        raise UserError(f"{folder / task.file} has a question with {len(candidates)} options: expected 1 to {len(_LETTERS)}")
    options = [f"({letter}) {candidate}" for letter, candidate in zip(_LETTERS, candidates)]
    question = "\n".join([f"Question: {entry['question']}", "Options:", *options]).rstrip()
    right = [letter for letter, candidate in zip(_LETTERS, candidates) if candidate == answer]
    letter = right[-1] if right else ""
    video = str(folder / task.videos / entry["video"])
    row = {"gt": f"({letter or _NO_LETTER}) {answer}", "question": question, "question_type": task.name, "video": video}
    options = {"options": len(candidates), "letter": letter}
    return ChoiceRecord(key, question + _SUFFIX, video=video, most_frames=_MOST_FRAMES, row=row, **options)


def _task_row(record: Record, reply: str) -> Row:
    """`ans` and `acc` are the lenient reading, as in the published rows."""
    letter = first_capital(reply, record.options)
    return {"pred": reply} | record.row | {"ans": letter, "acc": int(letter == record.letter)}


def _task_identity(row: Row) -> Hashable:
    """Paths of others end alike."""
    return row.get("question"), row.get("question_type"), row.get("gt"), Path(str(row.get("video"))).name


def _task_score(run: Run, tasks: Sequence[Task]) -> Score:
    strict, lenient = defaultdict(list), defaultdict(list)
    right: list[float | None] = []
    notes: list[str] = []
    for a in run.answers:
        task, letter = a.record.row["question_type"], a.record.letter
        readings = strict_letter(a.reply), first_capital(a.reply, a.record.options)
        right.append(float(not a.fault and letter != "" and readings[0] == letter))
        strict[task].append(right[-1])
        lenient[task].append(float(not a.fault and readings[1] == letter))
    if strange := [str(a.record.key) for a in run.answers if not a.record.letter]:
        notes.append(f"the right answer is not among the options of records {', '.join(strange)}: counted as wrong")
    figures = {"accuracy": 0.0, "accuracy by first capital": 0.0}
    for name, hits in zip(list(figures), (strict, lenient)):
        accuracies = {task.name: mean_percent(hits[task.name], f"{name} of {task.name}", notes) for task in tasks}
        figures[name] = statistics.fmean(accuracies.values())
        figures |= {f"{name} / {task}": accuracy for task, accuracy in accuracies.items()}
    expected = [one_line(a.record.row["gt"]) if a.record.letter else None for a in run.answers]
    return Score(figures["accuracy"], figures, right, notes, expected)


def _task_benchmark(name: str, title: str, tasks: Sequence[Task], size: int | None = None) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        folder=title,
        records=functools.partial(_task_records, tasks=tasks),
        max_new_tokens=SCRIPT_TOKENS,
        headline="mean accuracy of tasks, %",
        answer_row=_task_row,
        reply_of=lambda row: row["pred"],
        identity=_task_identity,
        score=functools.partial(_task_score, tasks=tasks),
        published={LLAVA_MINI: round(statistics.fmean(task.published for task in tasks), 1)},
        published_figures={LLAVA_MINI: {f"accuracy / {task.name}": task.published for task in tasks}},
        size=size,
    )


# ---- EgoSchema


def _egoschema_records(folder: Path, wording: Wording) -> list[Record]:
    """From ``mc.json``; without it from the official release, ``questions.json`` and ``subset_answers.json``."""
    names = [f"option {i}" for i in range(_EGOSCHEMA_OPTIONS)]
    kinds = dict.fromkeys(["q_uid", "question", *names], str)
    file = folder / "mc.json"
    if not file.exists() and (folder / "questions.json").exists():
        file = folder / "questions.json"
        answers = read_object(folder / "subset_answers.json")
        found = [e | ({"answer": answers[e["q_uid"]]} if e["q_uid"] in answers else {}) for e in entries(file, kinds)]
    else:
        found = entries(file, kinds)
    records, seen = [], set()
    for key, entry in enumerate(found):
        check_new(entry["q_uid"], seen, f"entry {key + 1} of {file}")
        if "answer" in entry and entry["answer"] not in range(_EGOSCHEMA_OPTIONS):
            raise UserError(f"entry {key + 1} of {file} has the answer {entry['answer']!r:.20}: expected a number from 0 to 4")
        options = "\n".join(f"{letter}: {entry[name]}" for letter, name in zip(_LETTERS, names))
        text = wording.text("egoschema", "instruction", question=entry["question"], options=options)
        video = str(folder / "videos" / entry["q_uid"])
        records.append(Record(key, text, video=video, row=entry | {"prompt": text}))
    return records


def _egoschema_choice(reply: str) -> int:
    """The option that a reply names, from 0; -1 for none."""
    return _LETTERS.find(first_capital(reply, _EGOSCHEMA_OPTIONS, _NO_LETTER))


def _egoschema_row(record: Record, reply: str) -> Row:
    choice = _egoschema_choice(reply)
    known = {"acc": int(choice == record.row["answer"])} if "answer" in record.row else {}
    return record.row | {"output": reply, "pred": choice} | known


def _egoschema_hit(a: Answered) -> float | None:
    return float(not a.fault and _egoschema_choice(a.reply) == a.record.row["answer"]) if "answer" in a.record.row else None


def _egoschema_expected(a: Answered) -> str | None:
    if "answer" not in a.record.row:
        return None
    number = int(a.record.row["answer"])
    return one_line(f"{_LETTERS[number]}: {a.record.row[f'option {number}']}")


def _egoschema_score(run: Run) -> Score:
    """Over the questions whose answer is known: all of ``mc.json``, 500 of the full set."""
    right, notes = [_egoschema_hit(a) for a in run.answers], []
    if unknown := right.count(None):
        notes.append(f"the answers to {unknown} questions are known to a server only: they are not counted")
    accuracy = mean_percent([hit for hit in right if hit is not None], "accuracy", notes)
    return Score(accuracy, {"accuracy": accuracy}, right, notes, list(map(_egoschema_expected, run.answers)))


def _egoschema_export(run: Run, out: Path) -> list[Path]:
    """For the organisers' server; -1 where there is no answer, or none with a letter."""
    choices = {a.record.row["q_uid"]: -1 if a.fault else _egoschema_choice(a.reply) for a in run.answers}
    return write_json(out / "egoschema.json", choices)


# ---- the table


def benchmarks(wording: Wording) -> tuple[Benchmark, ...]:
    """The benchmarks; EgoSchema's questions are put in these words."""
    egoschema = Benchmark(
        name="egoschema",
        title="EgoSchema",
        folder="egoschema",
        records=functools.partial(_egoschema_records, wording=wording),
        max_new_tokens=LOADER_TOKENS,
        headline="accuracy, %",
        answer_row=_egoschema_row,
        reply_of=lambda row: row["output"],
        identity=lambda row: row.get("q_uid"),
        score=_egoschema_score,
        export=_egoschema_export,
        published={LLAVA_MINI: 51.2},
    )
    mvbench = _task_benchmark("mvbench", "MVBench", MVBENCH_TASKS, size=4_000)
    return mvbench, _task_benchmark("mlvu", "MLVU", MLVU_TASKS), egoschema


BENCHMARKS = benchmarks(own())
