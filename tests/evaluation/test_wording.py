"""What judges are told: our own words, and those of a file."""

import json

import pytest
from evaluation.judging import write

from lmm_jax.errors import UserError
from lmm_jax.evaluation import judged, video, video_qa
from lmm_jax.evaluation.wording import SECTIONS, load, own


def whole():
    """A wording with made-up texts that have all placeholders."""
    return {"name": "made up"} | {
        section: {part: f"{section} {part} " + " ".join(f"{{{name}}}" for name in names) for part, names in parts.items()}
        for section, parts in SECTIONS.items()
    }


@pytest.fixture
def loaded(tmp_path):
    def make(value):
        write(tmp_path / "words.json", value)
        return load(tmp_path / "words.json")

    return make


def test_ours_has_every_text():
    assert set(own().texts) == set(SECTIONS)
    assert own().name == "lmm-jax" and len(own().digest) == 16
    for section, parts in SECTIONS.items():
        assert all(own().text(section, part).strip() for part in parts)


@pytest.mark.parametrize("section", [s for s in SECTIONS if s.startswith("videochatgpt") or s == "video_qa"])
def test_ours_asks_for_a_dictionary(section):
    (system, user) = own().messages(section, **{name: f"<{name}>" for name in SECTIONS[section]["user"]})
    assert (system["role"], user["role"]) == ("system", "user")
    assert '{"score": 3}' in user["content"] or '{"pred": "no", "score": 2}' in user["content"]
    for name in SECTIONS[section]["user"]:
        assert f"<{name}>" in user["content"] and f"{{{name}}}" not in user["content"]


def test_ours_keeps_the_frame_of_published_questions():
    """The ends that the fixtures show: evaluation spec, appendices B and E."""
    for section in ("msvd_msrvtt", "activitynet_qa"):
        assert own().text(section, "instruction", question="Who?").endswith("with one complete sentence:\nWho?")
    text = own().text("egoschema", "instruction", question="Why?", options="A: x\nB: y")
    assert text.endswith("\nWhy?\nChoices:\nA: x\nB: y\n\nAnswer with one letter.")


def test_a_file_of_ones_own(loaded):
    words = loaded(whole() | {"mm_vet": {"examples": ["two", "lines"]}})
    assert words.name == "made up"
    assert words.text("mm_vet", "examples") == "two\nlines"
    (system, user) = words.messages("video_qa", question="Q", answer="A", pred="P")
    assert (system["content"].strip(), user["content"]) == ("video_qa system", "video_qa user Q A P")


def test_what_is_filled_in_is_not_looked_at_again(loaded):
    words = loaded(whole())
    user = words.messages("video_qa", question="{answer} {pred}", answer="{question}", pred="{0} {} {x}")[1]
    assert user["content"] == "video_qa user {answer} {pred} {question} {0} {} {x}"


def test_braces_of_published_texts_mean_themselves(loaded):
    text = "{question}{answer}{pred} like {'score': 4.8} or {name} {{x}}"
    words = loaded({"name": "x", "video_qa": {"system": "{question}", "user": text}})
    (system, user) = words.messages("video_qa", question="Q", answer="A", pred="P")
    assert user["content"] == "QAP like {'score': 4.8} or {name} {{x}}"
    assert system["content"] == "{question}"


def test_the_digest_is_that_of_the_texts(loaded):
    first, renamed = loaded(whole()), loaded(whole() | {"name": "other"})
    assert first.digest == renamed.digest != own().digest
    assert loaded(whole() | {"mm_vet": {"examples": "other"}}).digest != first.digest
    assert loaded(json.loads(json.dumps(dict(reversed(whole().items()))))).digest == first.digest


def _without(part):
    section = dict(whole()["llava_bench"])
    del section[part]
    return section


@pytest.mark.parametrize(
    "value, sentence",
    [
        ([], "is no wording"),
        ("text", "is no wording"),
        ({}, "is no wording"),
        ({"name": ""}, "is no wording"),
        ({"name": 3}, "is no wording"),
        (whole() | {"mmvet": {}}, "unknown keys mmvet.*expected.*mm_vet"),
        (whole() | {"llava_bench": _without("rule_conv")}, "llava_bench.*lacks rule_conv"),
        (whole() | {"mm_vet": {"examples": "x", "example": "y"}}, "mm_vet.*unknown keys example"),
        (whole() | {"mm_vet": "text"}, "mm_vet.*holds 'text'"),
        (whole() | {"mm_vet": {"examples": 3}}, "examples of mm_vet.*is 3"),
        (whole() | {"mm_vet": {"examples": []}}, "examples of mm_vet"),
        (whole() | {"mm_vet": {"examples": ["a", 1]}}, "examples of mm_vet"),
        (whole() | {"video_qa": {"system": "s", "user": "{question} {answer}"}}, "user of video_qa.*lacks {pred}"),
        (whole() | {"egoschema": {"instruction": "{question}"}}, "lacks {options}"),
    ],
)
def test_files_that_are_none(loaded, value, sentence):
    with pytest.raises(UserError, match=sentence):
        loaded(value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no"):
        load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load(tmp_path / "bad.json")


def test_a_section_that_is_left_out_is_not_replaced_by_ours(loaded, tmp_path):
    words = loaded({"name": "only the judge", "mm_vet": {"examples": "x"}})
    write(tmp_path / "mc.json", [{"q_uid": "u", "question": "?", "answer": 0} | {f"option {i}": "o" for i in range(5)}])
    (egoschema,) = [b for b in video.benchmarks(words) if b.name == "egoschema"]
    with pytest.raises(UserError, match="'only the judge' has no 'egoschema'"):
        egoschema.records(tmp_path)


def test_benchmarks_of_another_wording_are_the_same_otherwise(loaded):
    words = loaded(whole())
    for room in (judged, video, video_qa):
        theirs = room.benchmarks(words)
        assert [(b.name, b.published, b.headline) for b in theirs] == [
            (b.name, b.published, b.headline) for b in room.BENCHMARKS
        ]
