"""Files of conversations: layouts, mixtures, sampling, and what is wrong with a file or a record."""

import json
import tracemalloc

import numpy as np
import pytest

from lmm_jax.data.frames import video_file
from lmm_jax.errors import UserError
from train.config import DataConfig, SourceConfig
from train.records import UnusableError, choose, load_sources, parse, read_mixture

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}


def source(path, content, **settings):
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    (loaded,) = load_sources(DataConfig(sources=(SourceConfig(str(path), **settings),)))
    return loaded


def numbered(path, count, **settings):
    return source(path, [{"id": i, "conversations": [HUMAN, GPT], "image": f"{i}.png"} for i in range(count)], **settings)


def conversation(record):
    return [message.content for message in record.messages]


# Layouts


def test_the_published_caption_and_instruction_records(tmp_path):
    caption = {"id": "004539375", "image": "00453/004539375.jpg", "conversations": [HUMAN, GPT]}
    end = {"id": "002", "image": "a.jpg", "conversations": [HUMAN | {"value": "Describe it.\n<image>"}, GPT]}
    text = {"id": 7, "model": "", "conversations": [HUMAN | {"value": "Hi"}, GPT, HUMAN | {"value": "Bye"}, GPT]}
    twice = {"id": 7, "image": "coco/train2017/7.jpg", "conversations": [HUMAN, GPT]}
    loaded = source(tmp_path / "mix.json", [caption, end, text, twice], media=str(tmp_path / "pictures"))
    records = [loaded.record(i) for i in range(4)]
    assert [r.id for r in records] == ["004539375", "002", "7", "7"]
    assert [r.media for r in records] == [
        (str(tmp_path / "pictures/00453/004539375.jpg"),),
        (str(tmp_path / "pictures/a.jpg"),),
        (),
        (str(tmp_path / "pictures/coco/train2017/7.jpg"),),
    ]
    assert not any(r.is_video for r in records)
    assert conversation(records[1]) == ["<image>\nDescribe it.", "A cat."]
    assert conversation(records[2]) == ["Hi", "A cat.", "Bye", "A cat."]


def test_video_chatgpt_before_and_after_its_own_conversion(tmp_path):
    raw = {"q": "What happens?", "a": "A dive.", "video_id": "v_k_ZXmr8pmrs"}
    turns = [HUMAN | {"value": "What happens?\n<video>"}, {"from": "gpt", "value": "A dive."}]
    converted = {"id": "v_k_ZXmr8pmrs", "video": "v_k_ZXmr8pmrs.pkl", "conversations": turns}
    loaded = source(tmp_path / "VideoInstruct_Dataset.json", [raw, converted], media=str(tmp_path))
    (tmp_path / "v_k_ZXmr8pmrs.mkv").touch()
    for i in range(2):
        record = loaded.record(i)
        assert record.is_video and record.id == "v_k_ZXmr8pmrs"
        assert conversation(record) == ["<image>\nWhat happens?", "A dive."]
        assert video_file(record.media[0]) == str(tmp_path / "v_k_ZXmr8pmrs.mkv")


def test_a_video_with_a_suffix_is_never_taken_for_another(tmp_path):
    (tmp_path / "a.mkv").touch()
    assert video_file(str(tmp_path / "a.mp4")) == str(tmp_path / "a.mp4")
    assert video_file(str(tmp_path / "b")) == str(tmp_path / "b")


def test_several_pictures(tmp_path):
    turns = [HUMAN | {"value": "<image> and <image>: same?"}, GPT]
    record = source(tmp_path / "a.json", [{"image": ["x.png", "/abs/y.png"], "conversations": turns}]).record(0)
    assert record.media == (str(tmp_path / "x.png"), "/abs/y.png") and record.id == ""


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lists_and_lines_hold_the_same_records(mark, tmp_path):
    rows = [{"id": '日本 \U0001f642 ] } , \\ " é'}, {"id": [1, {"a": "]"}]}, {}, "text", 5, None]
    as_list = source(tmp_path / "a.json", mark + json.dumps(rows, ensure_ascii=False, indent=2).encode())
    lines = b"\n\n  \r\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows)
    as_lines = source(tmp_path / "a.jsonl", mark + lines)
    for loaded in (as_list, as_lines):
        assert [json.loads(loaded.raw(i)) for i in range(len(loaded))] == rows
    assert len(source(tmp_path / "b.json", b" [ ] ")) == len(source(tmp_path / "b.jsonl", b"\n")) == 0


def test_records_take_no_more_memory_than_their_file(tmp_path):
    file = tmp_path / "a.json"
    record = {"id": "x", "image": "y.png", "conversations": [{"from": "human", "value": "w"}, {"from": "gpt", "value": "w"}]}
    size = file.write_text(json.dumps([record] * 20_000))
    tracemalloc.start()
    (loaded,) = load_sources(DataConfig(sources=(SourceConfig(str(file)),)))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(loaded) == 20_000
    assert kept < 1.5 * size and peak < 3 * size  # as Python objects it would be some ten times its size


# Files that cannot be used


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b"{}", "is not a list of JSON records: expected '\\[' .* at line 1, column 1"),
        ("a.json", b"", "expected '\\['"),
        ("a.json", b'[{"id": 1},\n {"id": }]', "at line 2, column 9"),
        ("a.json", b'[{"id": 1}\n {"id": 2}]', "expected ',' or '\\]' at line 2, column 2"),
        ("a.json", b'[{"id": 1}', "expected ',' or '\\]'"),
        ("a.json", b"[1,\n2]\n3", "something follows the end at line 3, column 1"),
        ("a.jsonl", b'{"id": 1}\n{"id": 2\n{"id": 3}', "at line 2, column 9"),
        ("a.jsonl", b'{"id": 1}\n\n  {"id": 2} 3', "something follows the end at line 3, column 13"),
        ("a.jsonl", b'{"id":\n 1}', "at line 1"),
        ("a.json", b'[{"id": ' + b"1" * 5000 + b"}]", "4300 digits"),
        ("a.json", b"[" * 100_000, "recursion"),
    ],
)
def test_a_broken_file_is_named_with_the_line(name, content, message, tmp_path):
    with pytest.raises(UserError, match=f"{name} .*{message}"):
        source(tmp_path / name, content)


def test_a_missing_file_and_no_file(tmp_path):
    with pytest.raises(UserError, match="none.json cannot be read"):
        load_sources(DataConfig(sources=(SourceConfig(str(tmp_path / "none.json")),)))
    with pytest.raises(UserError, match="no training data"):
        load_sources(DataConfig())


# Records that cannot be used


@pytest.mark.parametrize(
    "record, reason",
    [
        ([1], "malformed record"),
        ({"image": "a.png"}, "malformed record"),
        ({"conversations": "no"}, "malformed record"),
        ({"image": 5, "conversations": [HUMAN, GPT]}, "malformed record"),
        ({"image": [], "conversations": [HUMAN, GPT]}, "malformed record"),
        ({"conversations": []}, "empty conversation"),
        ({"conversations": [GPT]}, "malformed turns"),
        ({"conversations": [{"from": "system", "value": "x"}, GPT]}, "malformed turns"),
        ({"conversations": [{"from": "human", "value": None}, GPT]}, "malformed turns"),
        ({"q": "What?", "video_id": "v"}, "malformed turns"),
        ({"q": None, "a": "x", "video_id": "v"}, "malformed record"),
        ({"q": " ", "a": "x", "video_id": "v"}, "malformed record"),
        ({"image": "a.png", "conversations": [HUMAN]}, "the last turn has no answer"),
        ({"image": "a.png", "conversations": [HUMAN, GPT, HUMAN]}, "the last turn has no answer"),
        ({"image": "a.png", "conversations": [HUMAN, GPT, GPT]}, "turns do not alternate"),
        ({"conversations": [HUMAN, GPT]}, "placeholder without a medium"),
        ({"image": None, "conversations": [HUMAN, GPT]}, "placeholder without a medium"),
        ({"video": "a.mp4", "conversations": [HUMAN | {"value": "x"}, GPT]}, "medium without a placeholder"),
        ({"image": ["a", "b"], "conversations": [HUMAN, GPT]}, "placeholders and media differ in number"),
        ({"image": "a", "video": "b", "conversations": [HUMAN, GPT]}, "both pictures and video"),
    ],
)
def test_a_faulty_record_has_a_reason(record, reason, tmp_path):
    loaded = source(tmp_path / "a.json", [{}, record])
    with pytest.raises(UnusableError) as error:
        loaded.record(1)
    assert error.value.reason == reason
    skipped = loaded.skipped(1, error.value)
    assert (skipped.file, skipped.record, skipped.reason) == (str(tmp_path / "a.json"), 1, reason)


def test_bytes_that_are_no_utf_8_spoil_their_record_only(tmp_path):
    loaded = source(tmp_path / "a.jsonl", b'{"id": "\xff"}\n{"id": "ok", "conversations": []}')
    with pytest.raises(UnusableError, match="malformed record"):
        loaded.record(0)
    assert loaded.skipped(1, UnusableError("x")).id == "ok"


def test_a_placeholder_in_an_answer_is_text():
    turns = [HUMAN, {"from": "gpt", "value": "Write <image>."}]
    assert len(parse(json.dumps({"image": "a", "conversations": turns}).encode(), "").media) == 1


# Sampling and mixtures


@pytest.mark.parametrize(
    "sampling, chosen",
    [
        ("all", range(7)),
        ("first:3", range(3)),
        ("first:1000", range(7)),
        ("first:0", range(0)),
        ("end:2", range(5, 7)),
        ("end:0", range(0)),
        ("end:10%", range(6, 7)),
        ("first:50%", range(4)),
        ("first:100%", range(7)),
        ("end:28.5%", range(5, 7)),
    ],
)
def test_sampling(sampling, chosen, tmp_path):
    loaded = numbered(tmp_path / "a.json", 7, sampling=sampling)
    assert [loaded.record(i).id for i in range(len(loaded))] == [str(i) for i in chosen] and loaded.total == 7


def test_random_sampling_follows_the_seed_and_the_place_in_the_mixture(tmp_path):
    numbered(tmp_path / "a.json", 100)
    two = (
        SourceConfig(str(tmp_path / "a.json"), sampling="random:9"),
        SourceConfig(str(tmp_path / "a.json"), sampling="random:20%"),
    )
    draws = [[s.numbers.tolist() for s in load_sources(DataConfig(sources=two, seed=seed))] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] and draws[0] != draws[2]
    assert [len(set(d)) for d in draws[0]] == [9, 20] and all(d == sorted(d) for d in draws[0])
    same = load_sources(DataConfig(sources=(two[0], two[0])))
    assert same[0].numbers.tolist() != same[1].numbers.tolist()


@pytest.mark.parametrize(
    "sampling", ["", "some", "first", "first:", "last:3", "first:-3", "random:3.5", "first:5%%", "first: 5"]
)
def test_a_sampling_that_is_not_understood(sampling):
    with pytest.raises(UserError, match="write all, first:1000"):
        choose(sampling, 10, np.random.default_rng(0))


def test_a_mixture_is_relative_to_its_folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    numbered(tmp_path / "a.json", 3)
    (tmp_path / "sub" / "b.jsonl").write_text(json.dumps({"id": "b", "image": "p.png", "conversations": [HUMAN, GPT]}))
    (tmp_path / "sub" / "mix.yaml").write_text(
        "- file: ../a.json\n  media: pictures\n  sampling: first:2\n- file: b.jsonl\n- {file: b.jsonl, media: /elsewhere}\n"
    )
    monkeypatch.chdir(tmp_path / "sub")
    extra = SourceConfig("../a.json", sampling="end:1")
    loaded = load_sources(DataConfig(mixture=str(tmp_path / "sub" / "mix.yaml"), sources=(extra,)))
    folder = tmp_path / "sub"
    assert [s.config.media for s in loaded] == [str(folder / "pictures"), str(folder), "/elsewhere", ".."]
    assert [s.numbers.tolist() for s in loaded] == [[0, 1], [0], [0], [2]]
    assert loaded[1].record(0).media == (str(folder / "p.png"),)


@pytest.mark.parametrize(
    "content, message",
    [
        ("file: a.json", "expected a list of sources"),
        ("[]", "expected a list of sources"),
        ("- a.json", "source 1 of the mixture"),
        ("- {file: a.json}\n- {media: x}", "source 2 of the mixture"),
        ("- {file: a.json, sample: all}", "source 1 of the mixture"),
        ("- {file: a.json, sampling: 5}", "source 1 of the mixture"),
        ("- {file: [", "is not YAML"),
    ],
)
def test_a_mixture_that_is_none(content, message, tmp_path):
    (tmp_path / "mix.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        read_mixture(tmp_path / "mix.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_mixture(tmp_path / "none.yaml")
