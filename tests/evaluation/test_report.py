"""Tables and pages of results: what they say, what they admit, and that nobody's reply gets out of its place."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from lmm_jax.errors import UserError
from lmm_jax.evaluation import registry
from lmm_jax.evaluation.report import markdown, table
from lmm_jax.evaluation.report_html import choose, html, write
from lmm_jax.evaluation.results import read_runs

JUDGE = {"model": "judge-1", "served": ["judge-1-may"], "wording": {"name": "shipped", "digest": "0123"}}
VOID = {"meta", "img"}
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "section", "div", "article", "p", "img", "a", "ol", "ul"}
TAGS |= {"li", "table", "thead", "tbody", "tr", "th", "td", "small", "sup", "em", "bdi", "span", "details", "summary"}
ATTRIBUTES = {"lang", "charset", "name", "content", "http-equiv", "class", "id", "scope", "colspan", "value", "dir", "open"}
ATTRIBUTES |= {"href", "src", "width", "height", "alt"}
ILLEGIBLE = re.compile("[\ud800-\udfff\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe]")
EVIL = [
    "<script>alert(1)</script>",
    "</div></section><img src=x onerror=alert(1)>",
    "\"' onmouseover=alert(1) x='",
    "&lt;b&gt; &amp; <!-- ]]> <style>*{display:none}</style>",
    "bell \x07 nul \x00 escape \x1b[31m delete \x7f c1 \x85 end\r\nline\rreturn",
    "half \ud800 of a pair \udc80 and \ufffe",
    "\u202egnp.exe\u202c \u2066 never closed",
    "line\u2028separator \x0b",
    "שלום עולם، مرحبا",
    "",
]


def record(key, reply="red", right=1.0, fault="", question=None, **more):
    return {"key": key, "question": question or f"Question {key}?", "reply": reply, "fault": fault, "right": right} | more


def scores(records, **more):
    faults = [r["fault"] for r in records if r["fault"]]
    counts = {"records": len(records), "missing": faults.count("missing"), "faults": len(faults) - faults.count("missing")}
    plain = {"benchmark": "textvqa", "title": "TextVQA", "headline_name": "accuracy, %", "headline": 57.149, "figures": {}}
    plain |= {"notes": [], "counts": counts, "published": {"LLaVA": 58.2, "Mini": 57.0}, "judge": None}
    return plain | {"settings": {"max_new_tokens": 128}} | more


@pytest.fixture
def run(tmp_path):
    """Makes a run folder, or adds a benchmark to it."""

    def make(name="a", records=(), model=None, **more):
        records = list(records) or [record(0), record(1, "blue", 0.0)]
        made = scores(records, **more)
        place = tmp_path / name / made["benchmark"]
        place.mkdir(parents=True)
        (tmp_path / name / "settings.json").write_text(json.dumps({"model": model or f"model-{name}"}))
        (place / "scores.json").write_text(json.dumps(made))
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        (place / "scored.jsonl").write_text(lines, "utf-8", errors="backslashreplace")
        return tmp_path / name

    return make


class Page(HTMLParser):
    """Elements of a page, checked to be closed in their order and to be harmless."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.sources, self.links, self.ids = [], [], [], [], []
        assert not ILLEGIBLE.search(text)
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag in TAGS and set(attrs) <= ATTRIBUTES
        self.sources += [attrs["src"]] if "src" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag not in VOID:
            self.texts.append([tag, attrs.get("class") or "", ""])
            self.open.append(self.texts[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_comment(self, data):
        raise AssertionError(data)

    def handle_data(self, data):
        assert "url(" not in data and "@import" not in data
        if self.open:
            self.open[-1][2] += data

    def of(self, kind):
        return [text for _, classes, text in self.texts if kind in classes.split()]


def page(runs, *args, **more):
    made = Page(html(runs, ["textvqa"], *args, **more))
    assert set(made.links) <= {f"#{name}" for name in made.ids}
    assert all(source.startswith("data:image/jpeg;base64,") for source in made.sources)
    return made


def cells(text):
    """Rows of a table in Markdown, without the rule."""
    rows = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.split("\n") if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    return [rows[0], *rows[2:]]


def test_markdown_holds_runs_and_published_figures(run):
    a = run("a", published={"LLaVA": 58.2})
    run("a", benchmark="mme", title="MME", headline_name="points of 2000", headline=1466, published={"Mini": 1510.66})
    run("a", benchmark="zz", title="Own", headline_name="score, 0 to 5", headline=2.968, published={})
    b = run("b", headline=60.0, published={"LLaVA": 58.2})
    rows = cells(markdown(read_runs([a, b]), ["mme", "unknown", "textvqa"]))
    assert rows == [
        ["Benchmark", "Figure", "model-a", "model-b", "Mini (published)", "LLaVA (published)"],
        ["MME", "points of 2000", "1466.0", "–", "1510.7", "–"],
        ["TextVQA", "accuracy, %", "57.1", "60.0", "–", "58.2"],
        ["Own", "score, 0 to 5", "2.97", "–", "–", "–"],
    ]


def test_the_mean_of_video_chatgpts_aspects(run):
    published = {b.name: b.published for b in registry.benchmarks().values() if b.name.startswith("videochatgpt_")}
    assert len(published) == 5
    for place, name in enumerate(published):
        a = run("a", benchmark=name, headline=place, published=published[name])
    told = "Video-ChatGPT, mean of the five aspects: model-a 2.00, LLaVA-Mini (published) 2.94."
    assert told in markdown(read_runs([a]), []) and told in html(read_runs([a]), [])
    b = run("b", benchmark=name, headline=1, published=published[name])  # one of five
    assert told in markdown(read_runs([a, b]), []) and "aspects" not in markdown(read_runs([b]), [])


def test_small_percentages_have_one_digit_and_nothing_is_not_zero(run):
    runs = read_runs([run("a", headline=3.14), run("b", headline=float("nan")), run("c", headline=None)])
    assert cells(markdown(runs, []))[1][2:] == ["3.1", "–", "–", "58.2", "57.0"]


def test_missing_and_broken_answers_are_marked(run):
    whole = run("a", [record(0), record(1), record(2), record(3)])
    broken = run("b", [record(0), record(1, "", 0, "missing"), record(2, "", 0, "no such file"), record(3, "", 0, "missing")])
    text = markdown(read_runs([whole, broken]), [])
    assert cells(text)[1][2:4] == ["57.1", "57.1 ¹"]
    assert "- ¹ Of 4 records: 2 never answered and 1 with a fault; these count as wrong.\n" in text
    listed = page(read_runs([whole, broken])).of("notes")
    assert page(read_runs([whole])).of("notes") == []
    made = html(read_runs([whole, broken]), [])
    assert listed and "Records without an answer that counts (3)" in made
    assert "<li>model-b, record 2: no such file</li>" in made and "<li>model-b, record 3: missing</li>" in made


def test_one_judge_is_named_once(run):
    made = table(read_runs([run("a", judge=JUDGE), run("b", judge=JUDGE)]), [])
    assert made.footnotes == [
        "Judged by judge-1 (served as judge-1-may), wording shipped, digest 0123.",
        "Published figures are by their authors' judges, which are not those of the runs.",
    ]
    assert [cell.marks for cell in made.lines[0].runs] == [[1], [1]] and not made.lines[0].title.marks
    assert [cell.marks for cell in made.lines[0].published] == [[2], [2]]


@pytest.mark.parametrize(
    "other, named",
    [
        (JUDGE | {"model": "judge-2", "served": ["judge-2"]}, "Judged by judge-2, wording shipped, digest 0123."),
        (JUDGE | {"served": ["judge-1-june"]}, "Judged by judge-1 (served as judge-1-june), wording shipped, digest 0123."),
        (
            JUDGE | {"wording": {"name": "published", "digest": "4567"}},
            "Judged by judge-1 (served as judge-1-may), wording published, digest 4567.",
        ),
        (JUDGE | {"served": [], "wording": None}, "Judged by judge-1."),
        (None, None),
    ],
)
def test_different_judges_are_told_apart(run, other, named):
    made = table(read_runs([run("a", judge=JUDGE), run("b", judge=other)]), [])
    marks = [[made.footnotes[m - 1] for m in cell.marks] for cell in made.lines[0].runs]
    assert marks == [["Judged by judge-1 (served as judge-1-may), wording shipped, digest 0123."], [named] if named else []]
    warning = "The runs were judged differently; figures by different judges or wordings cannot be compared."
    assert [made.footnotes[m - 1] for m in made.lines[0].title.marks] == [warning]


def test_settings_records_and_questions_that_differ_are_told(run):
    limits = [{"max_new_tokens": n, "model": f"m{n}", "template": "v1", "versions": {"jax": n}} for n in (128, 1024)]
    a = run("a", settings=limits[0])
    same = run("same", settings=limits[0] | {"model": "x", "versions": {}})
    b = run("b", [record(0), record(1, question="Other?"), record(2)], settings=limits[1], headline_name="F1, %")
    assert not table(read_runs([a, same]), []).footnotes
    assert table(read_runs([a, b]), []).footnotes == [
        "The figures are not the same thing: accuracy, % (model-a), F1, % (model-b).",
        "The runs have different numbers of records: 2 (model-a), 3 (model-b).",
        "The runs were asked different questions: their data are not the same.",
        "Answered with different settings; max_new_tokens: 128 (model-a), 1024 (model-b).",
    ]
    assert ("tr", "differs") in {(tag, kind) for tag, kind, _ in page(read_runs([a, b])).texts}


def test_notes_of_scorers_and_answers_without_scores_stand_below(run):
    a, b = run("a", notes=["3 replies could not be read"]), run("b")
    (b / "pope").mkdir()
    (b / "pope" / "part.1of1.jsonl").write_text("")
    (b / "pictures").mkdir()
    text = markdown(read_runs([a, b]), [])
    assert text.endswith(
        "\n\n- model-b has answers but no scores for pope.\n- TextVQA, model-a: 3 replies could not be read\n"
    )


def test_runs_of_one_model_are_told_apart(run):
    a, b, c = run("a", model="same"), run("b", model="same"), run("c")
    assert [r.name for r in read_runs([a, b, c])] == [f"same ({a})", f"same ({b})", "model-c"]


def test_markdown_keeps_its_table_whatever_the_names(run):
    evil = "a|b\n| c | <script>alert(1)</script> `x` *y* _z_ snake_case [l](u) \ud800\u202e"
    text = markdown(read_runs([run("a", model=evil, title=evil, notes=[evil], published={evil: 1.0})]), [])
    assert len(cells(text)) == 2
    assert "<script" not in text.replace("\\<", "")
    assert "snake_case" in text and r"\_z\_" in text and r"\[l\](u)" in text
    text.encode("utf-8")


@pytest.mark.parametrize("reply", EVIL, ids=repr)
def test_untrusted_text_stays_text(run, reply):
    records = [record(0, reply, expected=reply), record(1, reply, 0.0, question=reply or None, expected=reply)]
    folder = run("a", [*records, record(2, "", 0, reply or "missing", expected=None)])
    made = page(read_runs([folder]), lambda benchmark, key: [reply.encode("utf-8", "replace")])
    shown = ILLEGIBLE.sub("\ufffd", reply.replace("\r\n", "\n"))
    assert made.of("text").count(shown) == 3 or reply == ""
    assert [text for tag, _, text in made.texts if tag == "bdi"].count(shown) == (2 if reply else 0)
    again = run("b", model=reply or "m", title=reply, headline_name=reply, notes=[reply], figures={f"{reply} / {reply}": 1.0})
    page(read_runs([again]))


def test_an_empty_reply_is_seen(run):
    assert "<em>nothing</em>" in html(read_runs([run("a", [record(0, "")])]), [])


def test_long_replies_are_cut_and_say_so(run):
    text = html(read_runs([run("a", [record(0, "x" * 1_000_000)])]), [])
    assert len(text) < 30_000 and "x" * 3000 + " … (997,000 more characters)" in text


def test_examples_are_chosen_by_disagreement_then_key(run):
    rights = {0: (1, 1), 1: (0, 0), 2: (0.3, 0.6), 3: (1, None), 4: (0, 0.4), 5: (1, 0), 6: (0.9, 1), 7: (None, None)}
    both = [[record(k, right=v[i]) for k, v in sorted(rights.items(), reverse=bool(i))] for i in (0, 1)]
    both[0] += [record(8, "", 0, "missing"), record(9, "", 0, "missing")]
    both[1] += [record(8, right=1.0), record(9, right=0.0)]
    results = [r.results["textvqa"] for r in read_runs([run("a", both[0]), run("b", both[1])])]
    assert choose(results, 10) == ([2, 5, 1, 4, 9], [0, 3, 6, 8])
    assert choose(results, 3) == ([2, 5, 1], [0, 3, 6])
    assert choose(results[:1], 10) == ([1, 2, 4], [0, 3, 5, 6])


def test_replies_stand_side_by_side_with_their_verdicts(run):
    a = run("a", [record(0, "red", 1.0), record(1, "blue", 0.3)])
    b = run("b", [record(0, "rot", 0.0), record(1, "", None)])
    made = page(read_runs([a, b]))
    replies = [(kind, text) for _, kind, text in made.texts if kind.startswith("reply ") or kind == "text"]
    assert [kind for kind, _ in replies[0::2]] == ["reply right", "reply wrong", "reply wrong", "reply uncounted"]
    assert [text for _, text in replies[1::2]] == ["red", "rot", "blue", ""]
    assert [text for tag, _, text in made.texts if tag == "span"] == ["✓ right", "✗ wrong", "30 % right", "does not count"]


def test_figures_are_grouped_and_the_headline_stands_once(run):
    figures = {"accuracy": 57.149, "binary": 71.25, "type / colour": 80.0, "type / a / b": 9.5, "n / colour": 12, "kl": 0.0123}
    made = page(read_runs([run("a", figures=figures), run("b", figures={"type / colour": 75.0}, headline=60.0)]))
    made = [text for tag, _, text in made.texts if tag in ("th", "td")]
    rows = made[made.index("accuracy, %") :]
    assert rows[:3] == ["accuracy, %", "57.1", "60.0"]
    rows = list(zip(rows[0::3], rows[1::3], rows[2::3]))
    assert ("type", "model-a", "model-b") in rows and ("n", "model-a", "model-b") in rows
    assert {("colour", "80.0", "75.0"), ("a / b", "9.5", "–"), ("colour", "12", "–"), ("kl", "0.012", "–")} <= set(rows)
    one = html(read_runs([run("c", figures={"accuracy": 57.149})]), [])
    assert one.count("57.1<") == 2 and ">accuracy<" not in one


def encoded(size, colour=(200, 30, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def test_pictures_are_small_and_inside(run, tmp_path):
    (tmp_path / "picture.png").write_bytes(encoded((900, 600)))
    given = {("textvqa", 0): [tmp_path / "picture.png"], ("textvqa", 1): [encoded((30, 20))]}
    made = page(read_runs([run("a")]), lambda benchmark, key: given[benchmark, key])
    pictures = [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))) for s in made.sources]
    assert [(p.format, p.size) for p in pictures] == [("JPEG", (30, 20)), ("JPEG", (240, 160))]  # wrong ones come first
    red, green, _ = pictures[0].getpixel((9, 9))
    assert red > 180 and green < 60


def test_frames_of_a_clip_are_chosen_evenly(run):
    clip = [encoded((8, 8), (25 * i,) * 3) for i in range(9)]
    made = page(read_runs([run("a", [record(0)])]), lambda *_: clip)
    greys = [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))).getpixel((4, 4))[2] for s in made.sources]
    assert [round(grey / 25) for grey in greys] == [0, 2, 4, 6]
    assert made.of("note") == ["4 of 9 pictures"]


@pytest.mark.parametrize(
    "given, said",
    [
        (lambda *_: [b"nonsense <b>"], "not a picture"),
        (lambda *_: [encoded((500, 500))[:100]], "broken"),
        (lambda *_: ["/there/is/no <file>"], "no <file>"),
        (lambda *_: [b""], "empty"),
        (lambda *_: [None], "NoneType"),
        (lambda *_: {}[0], "0"),
        (lambda *_: 1 / 0, "division by zero"),
        (lambda *_: (_ for _ in [encoded((9, 9)), 1 / 0]), "division by zero"),
    ],
)
def test_pictures_that_cannot_be_had_become_notes(run, given, said):
    made = page(read_runs([run("a")]), given)
    assert not made.sources and len(made.of("note")) == 2
    assert all(note.startswith("No picture: ") and said in note for note in made.of("note"))


def test_examples_can_be_left_out_and_pages_are_always_the_same(run):
    runs = read_runs([run("a")])
    assert not page(runs, examples=0).of("reply") and len(page(runs, examples=1).of("reply")) == 2
    assert html(runs, []) == html(read_runs([run("b", model="model-a")]), [])


def test_both_files_are_written_whole(run, tmp_path):
    runs = read_runs([run("a", [record(0, "\ud800 ü")])])
    files = write(tmp_path / "new" / "out", runs, ["textvqa"])
    assert [f.name for f in files] == ["results.md", "results.html"] == sorted(p.name for p in files[0].parent.iterdir())[::-1]
    assert files[0].read_text("utf-8") == markdown(runs, ["textvqa"]) and files[1].read_text("utf-8") == html(
        runs, ["textvqa"]
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "out", runs, [])


def damaged(place, change):
    """Changes a file of JSON, or puts text in its place."""
    if callable(change):
        values = json.loads(place.read_text())
        change(values)
        change = json.dumps(values)
    place.write_text(change)


@pytest.mark.parametrize(
    "file, change, said",
    [
        ("settings.json", "[]", "does not name a model"),
        ("settings.json", "{}", "does not name a model"),
        ("settings.json", "{", "is not JSON"),
        ("textvqa/scores.json", "{", "is not JSON"),
        ("textvqa/scores.json", "[1]", "benchmark is null"),
        ("textvqa/scores.json", lambda s: s.update(benchmark="pope"), "it is of pope"),
        ("textvqa/scores.json", lambda s: s.pop("title"), "title is null"),
        ("textvqa/scores.json", lambda s: s.update(headline="57"), '"57" is no figure'),
        ("textvqa/scores.json", lambda s: s.update(headline=10**400), "damaged"),
        ("textvqa/scores.json", lambda s: s["figures"].update(x=[]), "no figure"),
        ("textvqa/scores.json", lambda s: s["counts"].pop("missing"), "missing is null"),
        ("textvqa/scores.json", lambda s: s["counts"].update(records=3), "of 3 records, scored.jsonl of 2"),
        ("textvqa/scores.json", lambda s: s.update(judge="gpt"), "model is null"),
        ("textvqa/scores.json", lambda s: s.update(judge={"model": "gpt"}), "served is null"),
        ("textvqa/scores.json", lambda s: s.update(judge=JUDGE | {"wording": "own"}), "name is null"),
        ("textvqa/scored.jsonl", "\n", "of 2 records, scored.jsonl of 0"),
        ("textvqa/scored.jsonl", json.dumps(record(0)) + '\n{"key": 1, "que', "line 2"),
        ("textvqa/scored.jsonl", (json.dumps(record(0)) + "\n") * 2, "line 2 .*a key comes twice"),
        ("textvqa/scored.jsonl", json.dumps(record(0, right=1.5)), "line 1 .*right is 1.5"),
        ("textvqa/scored.jsonl", json.dumps(record(0, reply=None)), "line 1 .*reply is null"),
        ("textvqa/scored.jsonl", json.dumps(record(0, expected=7)), "line 1 .*expected is 7"),
        ("textvqa/scored.jsonl", "7", "line 1 .*key is null"),
    ],
)
def test_damaged_runs_are_refused(run, file, change, said):
    folder = run("a")
    damaged(folder / file, change)
    with pytest.raises(UserError, match=said):
        read_runs([folder])


def test_folders_that_are_no_runs_are_refused(run, tmp_path):
    a = run("a")
    for folders, said in (
        ([], "no run was given"),
        ([tmp_path / "nowhere"], "is no run"),
        ([tmp_path], "is no run"),
        ([a, a / ".." / "a"], "given twice"),
    ):
        with pytest.raises(UserError, match=said):
            read_runs(folders)
    (a / "textvqa" / "scored.jsonl").unlink()
    with pytest.raises(UserError, match="there is no .*scored.jsonl: score the run again"):
        read_runs([a])
    (a / "textvqa" / "scores.json").unlink()
    with pytest.raises(UserError, match="nothing in .* has been scored"):
        read_runs([a])
