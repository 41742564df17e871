import pytest
from eval_fixtures import MME_RELEASE, belongs, golden, lay_out, lines, published_rows, run_of, stripped, without, write_lines

from lmm_jax.errors import UserError
from lmm_jax.evaluation.benchmark import Answered, Run
from lmm_jax.evaluation.reading import SHORT
from lmm_jax.evaluation.yes_no import BENCHMARKS, MME, POPE

CATEGORIES = ("adversarial", "random", "popular")
TASKS = golden("protocol_constants.json")["mme_tasks"]


@pytest.fixture
def pope(tmp_path):
    return run_of(POPE, lay_out(tmp_path, "pope"), lines("pope/answers.jsonl"))


@pytest.fixture
def mme(tmp_path):
    return run_of(MME, lay_out(tmp_path, "mme"), lines("mme/answers.jsonl"))


@pytest.mark.parametrize("name", ["pope", "mme"])
def test_rows_are_the_published_ones(request, name):
    run, benchmark = request.getfixturevalue(name), {"pope": POPE, "mme": MME}[name]
    assert published_rows(run, benchmark) == stripped(lines(f"{name}/answers.jsonl"))
    assert benchmark.max_new_tokens == 128
    assert [a.record.key for a in run.answers] == list(range(len(run.answers)))


def test_pictures_lie_where_eval_zip_has_them(pope, mme):
    assert pope.answers[0].record.images == (str(pope.folder / "val2014" / "COCO_val2014_000000000000.jpg"),)
    assert mme.answers[4].record.images == (str(mme.folder / MME_RELEASE / "artwork" / "images" / "0001.jpg"),)
    assert [b.published["LLaVA-Mini Vicuna-7B"] for b in BENCHMARKS] == [84.4, 1466.0]


# ---- POPE


def pope_expected(figures, category):
    """Figures as the fixture names them."""
    shares = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "F1", "Yes ratio": "yes"}
    found = {name: figures[f"{ours} / {category}"] for name, ours in shares.items()}
    counts = {name: figures[f"{name} / {category}"] for name in ("TP", "FP", "TN", "FN")}
    return {"samples": sum(counts.values())} | counts | found


def test_pope(pope):
    score, expected = POPE.score(pope), golden("pope/expected.json")
    mean = expected.pop(next(name for name in expected if name.startswith("mean_of_the_three_F1")))
    assert set(expected) == set(CATEGORIES)
    for category, figures in expected.items():
        percent = {name: 100 * value if isinstance(value, float) else value for name, value in figures.items()}
        assert pope_expected(score.figures, category) == percent
    assert score.headline == score.figures["mean F1"] == pytest.approx(100 * mean, abs=1e-12)
    assert not score.notes
    assert sum(score.right) == sum(figures["TP"] + figures["TN"] for figures in expected.values())


def test_pope_without_answers_shifts_nothing(pope):
    """A missing no is a false yes, a missing yes a false no; the rest stays as it was."""
    before, after = POPE.score(pope), POPE.score(without(pope, 0, 2))
    assert after.right == [0, before.right[1], 0, *before.right[3:]] and before.right[0] == before.right[2] == 1
    for name, change in {"TP": -1, "FP": 1, "TN": -1, "FN": 1}.items():
        assert after.figures[f"{name} / adversarial"] == before.figures[f"{name} / adversarial"] + change
    assert after.figures["yes / adversarial"] == 20  # nobody said the false yes
    for category in ("random", "popular"):
        assert pope_expected(after.figures, category) == pope_expected(before.figures, category)


def test_popes_labels_are_found_whatever_their_order(pope):
    before = POPE.score(pope)
    for category in CATEGORIES:
        file = pope.folder / "coco" / f"coco_pope_{category}.json"
        rows = lines(f"pope/coco/{file.name}")
        write_lines(file, [row | {"question_id": -number} for number, row in enumerate(reversed(rows))])
    assert POPE.score(pope) == before
    assert POPE.score(Run(pope.folder, pope.answers[::-1])).headline == before.headline


def test_pope_of_one_answer(pope):
    score = POPE.score(Run(pope.folder, pope.answers[:1]))
    assert score.headline == 0 and score.right == [1]
    assert [note.split(" divides")[0] for note in score.notes[1:4]] == [
        "precision of adversarial",
        "recall of adversarial",
        "F1 of adversarial",
    ]
    assert score.notes[0].startswith("4 questions of coco_pope_adversarial.json")
    assert score.notes[4] == "there are no questions of random, popular"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": "Is there an ape in the image?"}, "holds no answer to .*knife.* do not belong together"),
        ({"label": "maybe"}, "line 1 of .* has the label 'maybe'"),
        ({"label": None}, "line 1 of .* has no usable label"),
        ({"text": "Is there a fork in the image?", "image": "COCO_val2014_000000000001.jpg"}, "with both yes and no"),
    ],
)
def test_malformed_labels(pope, change, message):
    file = pope.folder / "coco" / "coco_pope_adversarial.json"
    rows = lines(f"pope/coco/{file.name}")
    write_lines(file, [rows[0] | change, *rows[1:]])
    with pytest.raises(UserError, match=message):
        POPE.score(pope)


def test_missing_labels(pope):
    (pope.folder / "coco" / "coco_pope_random.json").unlink()
    with pytest.raises(UserError, match="there is no .*coco_pope_random.json"):
        POPE.score(pope)


def test_a_question_of_pope_without_category(pope):
    rows = [{k: v for k, v in row.items() if k != "category"} for row in lines("pope/llava_pope_test.jsonl")]
    write_lines(pope.folder / "llava_pope_test.jsonl", rows)
    with pytest.raises(UserError, match="record 1 of POPE has no usable category"):
        POPE.score(pope)


# ---- MME


def test_mme(mme, tmp_path):
    score, expected = MME.score(mme), golden("mme/expected.json")
    assert {task: score.figures[f"score / {task}"] for task in expected["tasks"]} == expected["tasks"]
    assert score.headline == score.figures["perception"] == expected["Perception"]
    assert score.figures["cognition"] == expected["Cognition"]
    assert {part.lower(): tasks for part, tasks in TASKS.items()}.keys() <= score.figures.keys()
    # Two, Y, n, 225, Religious, "  yes" and I think yes
    assert score.notes == ["7 replies begin with neither yes nor no and count as wrong"]
    out = tmp_path / "out"
    out.mkdir()
    files = MME.export(mme, out)
    assert sorted(file.stem for file in files) == sorted(TASKS["Perception"] + TASKS["Cognition"])
    for task, text in expected["converted_files"].items():
        assert (out / f"{task}.txt").read_text() == text


def test_mme_without_an_answer(mme, tmp_path):
    score = MME.score(without(mme, 2, fault="broken picture"))  # of code_reasoning, which had 75 and 50
    assert [score.figures[f"{name} / code_reasoning"] for name in ("acc", "acc+", "score")] == [50, 0, 50]
    assert score.right[2] == 0
    MME.export(without(mme, 2), tmp_path)
    assert (tmp_path / "code_reasoning.txt").read_text().splitlines()[2].endswith("\tYes\t")


def test_mmes_pairs_are_found_whatever_their_order(mme):
    score = MME.score(mme)
    backwards = MME.score(Run(mme.folder, [*mme.answers[::2], *mme.answers[1::2]][::-1]))
    assert backwards.figures == score.figures


def test_mmes_table_is_whole_whatever_a_reply_holds(mme, tmp_path):
    replies = [Answered(a.record, "Yes\tor\nno\r!") for a in mme.answers]
    for file in MME.export(Run(mme.folder, replies), tmp_path):
        assert [line.split("\t")[3:] for line in file.read_text().splitlines()] == [["Yes or no !"]] * 4


def test_mme_tells_questions_about_a_picture_apart(mme):
    records, rows = [a.record for a in mme.answers[:2]], published_rows(mme, MME)[:2]
    assert [[belongs(MME, record, row) for row in rows] for record in records] == [[True, False], [False, True]]


def test_mme_says_what_is_not_asked(mme):
    score = MME.score(Run(mme.folder, [a for a in mme.answers if "count/" in a.record.row["question_id"]][:2]))
    assert score.figures["score / count"] == 50 and score.headline == 50
    assert score.notes[0] == "2 questions of count are not in the question file and are not counted"
    assert "acc+ of existence divides by zero and is given as 0" in score.notes


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question_id": "unheard/1.png"}, "'unheard/1.png' is of no task"),
        ({"question_id": ""}, "'' is of no task"),
        ({"question_id": 7}, "'7' is of no task"),
        ({"text": f"Is it?{SHORT}"}, "holds no answer to .*Is it.*do not belong together"),
    ],
)
def test_questions_that_mme_does_not_know(mme, row, message):
    rows = lines("mme/llava_mme.jsonl")
    write_lines(mme.folder / "llava_mme.jsonl", [rows[0] | row, *rows[1:]])
    run = Run(mme.folder, [Answered(record, "Yes") for record in MME.records(mme.folder)])
    with pytest.raises(UserError, match=message):
        MME.score(run)


def test_half_a_pair(mme):
    with pytest.raises(UserError, match="code_reasoning/0001.txt has 1 questions .* expected 2"):
        MME.score(Run(mme.folder, mme.answers[1:]))


@pytest.mark.parametrize("text", ["no tab Yes\n", "Is it?\tperhaps\n", ""])
def test_malformed_truth_of_mme(mme, text):
    (mme.folder / MME_RELEASE / "count" / "0001.txt").write_text(text)
    with pytest.raises(UserError, match="line 1 of .*0001.txt is .* expected a question, a tab, and Yes or No"):
        MME.score(mme)


def test_missing_questions(tmp_path):
    for benchmark in BENCHMARKS:
        with pytest.raises(UserError, match="there is no .*jsonl"):
            benchmark.records(tmp_path)
