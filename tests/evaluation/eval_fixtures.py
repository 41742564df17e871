"""Fixtures laid out as a benchmark's folder, and answers files joined to records."""

import json
import shutil
from pathlib import Path

from lmm_jax.evaluation.benchmark import Answered, Run

GOLDEN = Path(__file__).parent.parent / "golden" / "evaluation"


def golden(name):
    """A JSON fixture."""
    return json.loads((GOLDEN / name).read_text())


def lines(file):
    """A fixture of JSON lines."""
    return [json.loads(line) for line in (GOLDEN / file).read_text().splitlines()]


def layout(folder, fixture, names):
    """Copies files of a fixture, source -> target, or whole folders; all may be written to."""
    for source, target in names.items():
        for file in sorted((GOLDEN / fixture).glob(f"{source}/**/*")) or [GOLDEN / fixture / source]:
            if file.is_file():
                place = folder / target / file.relative_to(GOLDEN / fixture / source)
                place = place if file != GOLDEN / fixture / source else folder / target
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
    return folder


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_of(benchmark, folder, rows):
    """A run in which each record has the reply of its row, or none."""
    left, answers = list(rows), []
    for record in benchmark.records(folder):
        row = next((row for row in left if benchmark.same_record(record, row)), None)
        if row is None:
            answers.append(Answered(record, "", "missing"))
        else:
            left.remove(row)
            answers.append(Answered(record, benchmark.reply_of(row)))
    assert not left, f"rows without a record: {left}"
    return Run(folder, answers)


def without(run, *keys, fault="missing"):
    """The run with some answers gone; replies stay, to show that nothing looks at them."""
    answers = [Answered(a.record, a.reply, fault) if a.record.key in keys else a for a in run.answers]
    return Run(run.folder, answers)


def published_rows(run, benchmark):
    """What the run's answers file holds."""
    return [benchmark.answer_row(a.record, a.reply) for a in run.answers]


def stripped(rows):
    """Rows of others without what tells one run from another."""
    return [{name: value for name, value in row.items() if name not in ("answer_id", "model_id")} for row in rows]


def user_texts(prompts):
    """What the user says in full prompts."""
    return [prompt.partition("USER: ")[2].removesuffix(" ASSISTANT:") for prompt in prompts]


def asked(records):
    """What the user says, with a placeholder for the picture."""
    return ["<image>\n" * len(record.images) + record.text for record in records]
