"""Runs beside what was published: figures of parts, benchmarks that a server scores, data that is a part only."""

import json
import re
from html.parser import HTMLParser

import pytest
from eval_fixtures import Place, answers_of, write_lines

from lmm_jax.evaluation.registry import benchmarks

MODEL = "LLaVA-Mini (published)"


@pytest.fixture
def place(tmp_path, capsys):
    return Place(tmp_path, capsys)


class Tables(HTMLParser):
    """Tables of a page: rows of cells."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.inside = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1] += data


def tables(place, *runs):
    """(Title, heads of columns) -> {name: cells} of the tables on a page, the overview apart."""
    file = place.run.parent / "t.html"
    status, _, err = place.call("table", *(runs or [place.run]), "--html", file, "--data", place.root)
    assert status == 0, err
    found = Tables(file.read_text()).tables[1:]
    return {tuple(head): {name: cells for name, *cells in rows} for head, *rows in found}


def edit_scores(place, name, change):
    file = place.run / name / "scores.json"
    scores = json.loads(file.read_text())
    change(scores)
    file.write_text(json.dumps(scores))


# ---- figures of parts


@pytest.mark.parametrize("name, part, figure", [("mvbench", "Action Antonym", "76.0"), ("mlvu", "order", "24.3")])
def test_tasks_stand_beside_published_ones(place, name, part, figure):
    place.lay(name)
    score = place.score(name, answers_of(name), "--name", "mine")
    assert score["published_figures"] == {"LLaVA-Mini": dict(benchmarks()[name].published_figures["LLaVA-Mini"])}
    found = tables(place)
    assert found["accuracy", "mine", MODEL][part] == [f"{score['figures'][f'accuracy / {part}']:.1f}", figure]
    assert all(beside != "–" for _, beside in found["accuracy", "mine", MODEL].values()), "all tasks were published"
    assert set(found["accuracy by first capital", "mine"]) == set(found["accuracy", "mine", MODEL]), "none was published"


def test_mean_scores_of_video_qa(place):
    """Made by hand, as a judge would have to be asked."""
    msvd = benchmarks()["msvd_qa"]
    assert [benchmarks()[n].published_figures for n in ("msvd_qa", "msrvtt_qa", "activitynet_qa")] == [
        {"LLaVA-Mini": {"score": score}} for score in (4.0, 3.6, 3.5)
    ]
    scores = {"benchmark": "msvd_qa", "title": msvd.title, "headline_name": msvd.headline, "headline": 68.0, "notes": []}
    scores |= {"figures": {"accuracy": 68.0, "score": 3.987}, "counts": {"records": 0, "missing": 0, "faults": 0}}
    scores |= {"published": dict(msvd.published), "published_figures": msvd.published_figures, "settings": {}, "judge": None}
    write_lines(place.run / "settings.json", [{"model": "mine"}])
    write_lines(place.run / "msvd_qa" / "scores.json", [scores])
    write_lines(place.run / "msvd_qa" / "scored.jsonl", [])
    rows = tables(place)["", "mine", MODEL]
    assert rows == {
        "accuracy, %": ["68.0", "70.9"],
        "score": ["3.99", "4.0"],
        **{name: ["0", "–"] for name in ("records", "missing", "faults")},
    }
    edit_scores(place, "msvd_qa", lambda scores: scores["figures"].pop("score"))
    assert "score" not in tables(place)["", "mine", MODEL], "a figure that no run has is not shown"


def test_scores_of_before(place):
    place.lay("mvbench")
    place.score("mvbench", answers_of("mvbench"), "--name", "mine")
    edit_scores(place, "mvbench", lambda scores: [scores.pop(name) for name in ("published_figures", "size")])
    found = tables(place)
    assert ("accuracy", "mine") in found and not any(MODEL in head for head in found)
    for wrong in ([], {"LLaVA-Mini": 1}, {"LLaVA-Mini": {"accuracy": "x"}}):
        edit_scores(place, "mvbench", lambda scores, wrong=wrong: scores.update(published_figures=wrong))
        assert "scores.json is damaged" in place.refused("table", place.run)


def test_names_of_published_figures_are_known():
    """Only benchmarks whose figures these tests have looked at have any."""
    names = {"mvbench", "mlvu", "msvd_qa", "msrvtt_qa", "activitynet_qa"}
    assert {b.name for b in benchmarks().values() if b.published_figures} == names


# ---- a server


def answer_vqav2(place, run, replies):
    rows = [{"key": key, "reply": reply, "fault": fault} for key, (reply, fault) in enumerate(replies)]
    write_lines(run / "vqav2" / "part.1of1.jsonl", rows)
    write_lines(run / "settings.json", [{"model": run.name}])
    write_lines(run / "vqav2" / "settings.json", [{"max_new_tokens": 128}])
    return run


def test_what_a_server_scores_has_a_line(place, tmp_path):
    place.lay("textvqa")
    one = answer_vqav2(place, tmp_path / "one", [("red", ""), ("", "broken.jpg is broken")])
    place.score("textvqa", answers_of("textvqa"), "--name", "two", out=tmp_path / "two")
    status, out, err = place.call("table", one, tmp_path / "two")
    assert status == 0, err
    cells = next([c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| VQAv2"))
    assert cells == ["VQAv2", "accuracy on test-dev, %", "– ¹ ² ³", "–", "78.5", "77.6", "78.9", "79.0"]
    assert "- ¹ Its server scores it: hand in what lmm eval export vqav2 writes.\n" in out
    assert "- ² 2 records, the published data has 107394.\n- ³ Of 2 records: 1 with a fault; these count as wrong.\n" in out
    settings = tables(place, one, tmp_path / "two")["", "one"]  # which come after its figures
    assert settings == {"model": ["one"], "max_new_tokens": ["128"]}
    assert "has answers but no scores" not in out


def test_a_run_of_nothing_else_has_a_table(place, tmp_path):
    one = answer_vqav2(place, tmp_path / "one", [("red", "")])
    status, out, err = place.call("table", one)
    assert status == 0 and "| VQAv2 " in out, err
    (one / "vqav2" / "part.1of1.jsonl").write_text("{\n")
    assert "is not an answer" in place.refused("table", one)


# ---- a part of the data


def test_a_part_of_the_data_is_said_to_be_one(place, tmp_path):
    place.lay("textvqa")
    for name in ("one", "two"):
        status, out, _ = place.part("score", "textvqa", answers=answers_of("textvqa"), out=tmp_path / name)
        assert status == 0 and "  note: 12 records, the published data has 5000\n" in out
    status, out, _ = place.call("table", tmp_path / "one", tmp_path / "two")
    row = next(line for line in out.splitlines() if line.startswith("| TextVQA"))
    assert len(re.findall(r"\d ¹", row)) == 2 and "- ¹ 12 records, the published data has 5000.\n" in out


def test_the_whole_data_needs_no_word(place):
    place.lay("textvqa")
    place.score("textvqa", answers_of("textvqa"))
    edit_scores(place, "textvqa", lambda scores: scores.update(size=12))
    status, out, _ = place.call("table", place.run)
    assert status == 0 and "published data" not in out and "¹" not in out


def test_it_is_said_before_a_model_is_loaded(place):
    place.lay("textvqa")
    status, out, err = place.part("answer", "textvqa", "--model", "nowhere")
    assert (status, out) == (2, "")
    note, error = err.splitlines()
    assert note == "note: TextVQA: 12 records, the published data has 5000"
    assert error.startswith("error: 10 pictures or videos are not there")


# ---- handing in


def test_what_is_handed_in_empty_is_told(place, tmp_path):
    place.lay("vizwiz")
    rows = [json.loads(line) for line in answers_of("vizwiz").read_text().splitlines()]
    write_lines(tmp_path / "a.jsonl", [rows[0] | {"fault": "broken", "text": "x"}, *rows[2:]])
    status, out, err = place.part("export", "vizwiz", "--allow-missing", answers=tmp_path / "a.jsonl")
    said = f"{len(rows)} records, 1 missing, 1 with a fault"
    assert status == 0 and err == f"note: VizWiz: {said}: these are handed in as empty\n"
    handed = json.loads((place.run / "vizwiz" / "export" / "vizwiz_upload.json").read_text())
    assert sum(entry["answer"] == "" for entry in handed) == 2
    status, _, err = place.part("export", "vizwiz", answers=answers_of("vizwiz"), out=tmp_path / "whole")
    assert (status, err) == (0, "")
