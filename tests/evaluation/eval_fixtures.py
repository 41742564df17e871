"""Fixtures laid out as a benchmark's folder, and answers files joined to records."""

import json
import shutil
from pathlib import Path

from lmm_jax.cli import main
from lmm_jax.evaluation.benchmark import Answered, Run

GOLDEN = Path(__file__).parent.parent / "golden" / "evaluation"
VQAV2_FILES = ("llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test2015.jsonl")
MME_RELEASE = "MME_Benchmark_release_version"


def golden(name):
    """A JSON fixture."""
    return json.loads((GOLDEN / name).read_text())


def lines(file):
    """A fixture of JSON lines."""
    return [json.loads(line) for line in (GOLDEN / file).read_text().splitlines()]


def edit(file, change):
    """Rewrites a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


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


def question(row, image):
    """The question of which a row of an answers file is the answer."""
    return {"question_id": row["question_id"], "image": image, "text": row["prompt"], "category": "default"}


def scienceqa_entry(name, problem):
    """A record of the question file."""
    context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCDE", problem["choices"]))
    value = f"{'<image>' if problem['image'] else ''}\n{context}{problem['question']}{options}"
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "ABCDE"[problem["answer"]]}]
    return {"id": name, "conversations": turns} | ({"image": f"{name}/image.png"} if problem["image"] else {})


LAYOUTS = {  # fixture -> its folder below the data root, as eval.zip names it, and which files lie where there
    "vqav2": ("vqav2", {name: name for name in VQAV2_FILES}),
    "gqa": ("gqa", {"testdev_balanced_questions.json": "data/testdev_balanced_questions.json"}),
    "vizwiz": ("vizwiz", {"llava_test.jsonl": "llava_test.jsonl"}),
    "textvqa": ("textvqa", {"TextVQA_0.5.1_val.json": "TextVQA_0.5.1_val.json"}),
    "pope": ("pope", {"llava_pope_test.jsonl": "llava_pope_test.jsonl", "coco": "coco"}),
    "mme": ("MME", {"llava_mme.jsonl": "llava_mme.jsonl", MME_RELEASE: MME_RELEASE}),
    "scienceqa": ("scienceqa", {name: name for name in ("problems.json", "pid_splits.json")}),
    "mmbench": ("mmbench", {"mmbench.tsv": "mmbench_dev_20230712.tsv"}),
    "mmbench_cn": ("mmbench_cn", {"mmbench.tsv": "mmbench_dev_cn_20231003.tsv"}),
    "seed": ("seed_bench", {"SEED-Bench.json": "SEED-Bench.json"}),
}
VIDEO = {"mvbench": "MVBench", "mlvu": "MLVU", "egoschema": "egoschema"}  # fixtures that are laid out as published


def lay_out(root, name):
    """A fixture as a benchmark's folder below the data root; questions that it has only in its answers are made of these."""
    folder = layout(root / LAYOUTS[name][0], name, LAYOUTS[name][1])
    if name == "gqa":
        write_lines(folder / "llava_gqa_testdev_balanced.jsonl", [question(r, "n1.jpg") for r in lines("gqa/answers.jsonl")])
    elif name == "textvqa":
        questions = [question(row, f"{row['question_id']}.jpg") for row in lines("textvqa/answers.jsonl")]
        write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", questions)
    elif name == "scienceqa":
        entries = [scienceqa_entry(*item) for item in golden("scienceqa/problems.json").items()]
        (folder / "llava_test_CQM-A.json").write_text(json.dumps(entries))
    elif name == "seed":
        rows = lines("seed/answers.jsonl")
        ids = [*((row["question_id"], row["prompt"]) for row in rows), (109, rows[0]["prompt"])]
        questions = [{"question_id": i, "image": f"SEED-Bench-image/{i}", "text": text} for i, text in ids]
        write_lines(folder / "llava-seed-bench.jsonl", questions)
    return folder


class Place:
    """A data root with fixtures, a run folder, and the command line over both."""

    def __init__(self, tmp_path, capsys):
        self.root, self.run, self._capsys = tmp_path / "data", tmp_path / "run", capsys

    def lay(self, fixture):
        """A fixture's folder in the data root."""
        if fixture in LAYOUTS:
            return lay_out(self.root, fixture)
        return shutil.copytree(GOLDEN / fixture, self.root / VIDEO.get(fixture, fixture))

    def call(self, *words):
        """(status, stdout, stderr)"""
        status = main(["eval", *map(str, words)])
        return (status, *self._capsys.readouterr())

    def refused(self, *words):
        """The one sentence on stderr."""
        status, out, err = self.call(*words)
        assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (status, out, err)
        return err

    def part(self, part, name, *more, answers=None, out=None):
        given = ["--answers", answers] if answers else []
        return self.call(part, name, "--data", self.root, "--out", out or self.run, *given, *more)

    def score(self, name, answers, *more, out=None):
        """What scores.json holds."""
        status, _, err = self.part("score", name, *more, answers=answers, out=out)
        assert status == 0, err
        return json.loads(((out or self.run) / name / "scores.json").read_text())

    def export(self, name, answers, *more):
        """The files that are written, of which stdout tells."""
        status, out, err = self.part("export", name, *more, answers=answers)
        assert status == 0, err
        return sorted((self.run / name / "export").iterdir()), out


def answers_of(fixture):
    names = {"vqav2": "merge.jsonl", "mvbench": "expected_answers.jsonl", "mlvu": "expected_answers.jsonl"}
    return GOLDEN / fixture / names.get(fixture, "expected_answers.jsonl" if fixture == "egoschema" else "answers.jsonl")


def belongs(benchmark, record, row):
    """Whether a line of an answers file is of a record, as far as ids tell."""
    return benchmark.identity_of(record) == benchmark.identity(row)


def run_of(benchmark, folder, rows):
    """A run in which each record has the reply of its row, or none."""
    left, answers = list(rows), []
    for record in benchmark.records(folder):
        row = next((row for row in left if belongs(benchmark, record, row)), None)
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
