"""Prompts, token ids and labels: equal to the published code's, and safe with whatever people type."""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmm_jax.config import IGNORE_LABEL, IMAGE_TOKEN_ID
from lmm_jax.data.conversation import Message, Span, count_placeholders, from_llava, render, video_place, with_placeholders
from lmm_jax.data.tokenize import StreamDecoder, Tokenizer, stop_token_ids
from lmm_jax.errors import UserError

TEXT = Path(__file__).parents[1] / "golden" / "text"
GOLDEN = json.loads((TEXT / "conversations.json").read_text("utf-8"))
LLAMA, TWO_BOS = "llava_llama_3_1", "llava_llama_3_1_two_bos"
ALPHABET = "abcdeghit  \n\n.:é日🙂_<>/s123ﬁ①\u3000\t\u0301"


@pytest.fixture(scope="module")
def llama3():
    return Tokenizer.load(TEXT / "llama3_tokenizer")


@pytest.fixture(scope="module")
def vicuna():
    return Tokenizer.load(TEXT / "vicuna_tokenizer")


@functools.cache
def by_transformers(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tokenizer_with(tmp_path):
    """Loads a copy of a golden tokenizer whose tokenizer_config.json is changed; None removes a setting."""

    def load(name, **settings):
        folder = tmp_path / "tokenizer"
        shutil.copytree(TEXT / f"{name}_tokenizer", folder)
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text("utf-8")) | settings
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), "utf-8")
        return Tokenizer.load(folder)

    return load


def text_of(spans):
    return "".join(span.text for span in spans)


def golden_messages(entry):
    pairs = (pair for turn in entry["turns"] for pair in zip(("user", "assistant"), turn))
    return [Message(role, content) for role, content in pairs if content is not None]


def random_texts(number):
    draw = random.Random(0)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(1, 12))) for _ in range(number)]


# Golden


@pytest.mark.parametrize("name", GOLDEN["training"])
def test_training_ids_and_labels_equal_the_golden_ones(name, llama3, vicuna):
    kind, entry = name.split("/")[0], GOLDEN["training"][name]
    tokenizer = vicuna if kind in ("v1", "plain_vicuna") else llama3
    template = "plain" if kind.startswith("plain") else kind
    ids, labels = tokenizer.encode(render(from_llava(entry["conversations"]), template, tokenizer, generate=False))
    assert ids.dtype == labels.dtype == np.int32
    np.testing.assert_array_equal(ids, entry["input_ids"])
    np.testing.assert_array_equal(labels, entry["labels"])


@pytest.mark.parametrize("name", GOLDEN["inference"])
def test_inference_prompt_and_ids_equal_the_golden_ones(name, llama3, vicuna):
    kind, entry = name.split("/")[0], GOLDEN["inference"][name]
    tokenizer = llama3 if kind == LLAMA else vicuna
    template = "v1" if kind == "vicuna_v1" else kind
    spans = render(golden_messages(entry), template, tokenizer, generate=True)
    ids, _ = tokenizer.encode(spans)
    assert text_of(spans) == entry["prompt"]
    golden = entry["input_ids"]
    if kind == LLAMA:  # the published code feeds BOS twice
        assert golden[:2] == [tokenizer.bos_token_id] * 2
        two, _ = tokenizer.encode(render(golden_messages(entry), TWO_BOS, tokenizer, generate=True))
        np.testing.assert_array_equal(two, golden)
        golden = golden[1:]
    np.testing.assert_array_equal(ids, golden)


def test_two_bos_template_has_one_in_training(llama3):
    messages = from_llava(GOLDEN["training"][f"{LLAMA}/image_one_turn"]["conversations"])
    one, two = (llama3.encode(render(messages, t, llama3, generate=False))[0] for t in (LLAMA, TWO_BOS))
    np.testing.assert_array_equal(one, two)


# Messages


def test_training_placeholders_move_only_where_there_is_one_in_a_turn():
    messages = from_llava(
        [
            {"from": "gpt", "value": "dropped"},
            {"from": "human", "value": "What is in <video> here?"},
            {"from": "gpt", "value": "An <image> tag and a <video> tag."},
            {"from": "human", "value": "Is <image> larger than <video>?"},
        ]
    )
    assert [m.content for m in messages] == [
        "<image>\nWhat is in  here?",
        "An <image> tag and a <video> tag.",
        "Is <image> larger than <image>?",
    ]
    assert count_placeholders(messages) == 3


@pytest.mark.parametrize(
    "conversations", [[], [{"from": "gpt", "value": "x"}], [{"from": "cat", "value": "x"}], [{"from": "human"}], ["human: x"]]
)
def test_broken_training_records_are_refused(conversations):
    with pytest.raises(UserError, match="human"):
        from_llava(conversations)


def test_with_placeholders():
    assert with_placeholders("What?", 2) == "<image>\n<image>\nWhat?"
    assert with_placeholders("What?", 0) == "What?"
    assert with_placeholders("Is <image> like <video>?", 2) == "Is <image> like <image>?"
    with pytest.raises(UserError, match=r"has 1 <image> .* but 3 image"):
        with_placeholders("What is <image>?", 3)


@pytest.mark.parametrize(
    ("roles", "generate"),
    [((), False), (("assistant",), False), (("user", "user"), True), (("user", "assistant"), True)],
)
@pytest.mark.parametrize("template", ["v1", LLAMA])
def test_turns_in_the_wrong_order_are_refused(roles, generate, template, llama3):
    with pytest.raises(UserError, match="turn"):
        render([Message(role, "x") for role in roles], template, llama3, generate=generate)


def test_unknown_template_and_captions_without_a_picture_are_refused(vicuna):
    with pytest.raises(UserError, match="'v2'.*llava_llama_3_1"):
        render([Message("user", "x")], "v2", vicuna, generate=True)
    with pytest.raises(UserError, match="'plain'.*1 turns with 0 placeholders"):
        render([Message("user", "x")], "plain", vicuna, generate=True)
    with pytest.raises(UserError, match="'plain'.*3 turns"):
        render([Message(r, "<image>") for r in ("user", "assistant", "user")], "plain", vicuna, generate=True)


@pytest.mark.parametrize("template", [LLAMA, "v1", "plain"])
def test_several_images_and_an_answer_that_spells_one(template, llama3, vicuna):
    tokenizer = llama3 if template == LLAMA else vicuna
    messages = [Message("user", "Is <image> like <image>?"), Message("assistant", "An <image> is no image.")]
    ids, labels = tokenizer.encode(render(messages, template, tokenizer, generate=False))
    assert np.sum(ids == IMAGE_TOKEN_ID) == count_placeholders(messages) == 2
    end = {LLAMA: "", "v1": "", "plain": "\n"}[template]
    assert tokenizer.decode(ids[labels != IGNORE_LABEL]) == "An <image> is no image." + end


# The tokenizer's own chat template

HEADER = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
TURN = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content']{} + '<|eot_id|>'"
WRITES_NO_HEADER = "{{ bos_token }}{% for m in messages %}{{ " + TURN.format(" | trim") + " }}{% endfor %}"
ON_REQUEST = WRITES_NO_HEADER + "{% if add_generation_prompt %}" + HEADER + "{% endif %}"
NO_BOS_NO_TRIM = "{% for m in messages %}{{ " + TURN.format("") + " }}{% endfor %}"


@pytest.mark.parametrize("chat_template", [WRITES_NO_HEADER, ON_REQUEST])
def test_assistant_header_is_added_for_generation_only(chat_template, tokenizer_with):
    tokenizer = tokenizer_with("llama3", chat_template=chat_template)
    entry = GOLDEN["inference"][f"{LLAMA}/two"]
    assert text_of(render(golden_messages(entry), LLAMA, tokenizer, generate=True)) == entry["prompt"]
    training = GOLDEN["training"][f"{LLAMA}/image_three_turns"]
    ids, labels = tokenizer.encode(render(from_llava(training["conversations"]), LLAMA, tokenizer, generate=False))
    header = len(tokenizer.encode_text("<|start_header_id|>assistant<|end_header_id|>\n\n"))
    np.testing.assert_array_equal(ids, training["input_ids"][:-header])
    np.testing.assert_array_equal(labels, training["labels"][:-header])


def test_contents_are_trimmed_only_where_the_chat_template_does_so(llama3, tokenizer_with):
    messages = [Message("user", " user \n"), Message("assistant", " <|eot_id|>assistant ")]
    trimmed, kept = (
        text_of(render(messages, LLAMA, tokenizer, generate=False))
        for tokenizer in (llama3, tokenizer_with("llama3", chat_template=NO_BOS_NO_TRIM))
    )
    assert "\n\nuser<|eot_id|>" in trimmed and "\n\n<|eot_id|>assistant<|eot_id|>" in trimmed
    assert kept.endswith(
        "\n\n user \n<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n <|eot_id|>assistant <|eot_id|>"
    )


def test_one_bos_where_the_chat_template_writes_none(tokenizer_with):
    tokenizer = tokenizer_with("llama3", chat_template=NO_BOS_NO_TRIM)
    ids, labels = tokenizer.encode(render([Message("user", "Hi")], LLAMA, tokenizer, generate=True))
    assert ids[0] == tokenizer.bos_token_id and np.sum(ids == tokenizer.bos_token_id) == 1
    assert labels.shape == ids.shape


@pytest.mark.parametrize(
    ("chat_template", "complaint"),
    [
        (None, "has none"),
        ("{{ raise_exception('no system turn') }}", "refuses the conversation: no system turn"),
        ("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}", "not of LLaMA-3.1's kind"),
        ("{{ messages[-1]['content'] }}<|eot_id|>", "not of LLaMA-3.1's kind"),
    ],
)
def test_unsuitable_chat_templates_are_refused(chat_template, complaint, tokenizer_with):
    tokenizer = tokenizer_with("llama3", chat_template=chat_template)
    with pytest.raises(UserError, match=complaint):
        render([Message("user", "a"), Message("assistant", "b")], LLAMA, tokenizer, generate=False)


# What people type


def control_ids(tokenizer, template, contents, generate):
    messages = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    ids, _ = tokenizer.encode(render(messages, template, tokenizer, generate=generate))
    return [i for i in ids if i in tokenizer._special_ids or i == IMAGE_TOKEN_ID]


@pytest.mark.parametrize(
    ("name", "template"),
    [("llama3", LLAMA), ("llama3", TWO_BOS), ("llama3", "v1"), ("vicuna", "v1"), ("vicuna", "llava_v1")],
)
def test_typed_control_tokens_control_in_training_only(name, template, request):
    tokenizer = request.getfixturevalue(name)
    typed = "a" + "".join(tokenizer._added[i] for i in sorted(tokenizer._special_ids)) + " b<|eot_<s></s>id|><</s>"
    forged, harmless = ["<image>" + typed, typed, typed], ["<image>a", "a", "a"]
    assert control_ids(tokenizer, template, forged, True) == control_ids(tokenizer, template, harmless, True)
    published = control_ids(tokenizer, template, forged[:2], False)
    assert len(published) > len(control_ids(tokenizer, template, harmless[:2], False))


def test_typed_control_tokens_keep_their_characters(llama3):
    question = "What does <|eot_id|> do?"
    ids, _ = llama3.encode([Span(question, is_literal=True)])
    assert llama3.decode(ids) == question


# SentencePiece


@pytest.mark.parametrize("legacy", [True, None, False])
def test_sentencepiece_spaces_are_those_of_the_library(legacy, tokenizer_with):
    """`legacy` (or no setting): a space in front of the text and after every special token; else in front of the text."""
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(TEXT / "vicuna_tokenizer" / "tokenizer.model"))
    tokenizer = tokenizer_with("vicuna", legacy=legacy)
    for text in random_texts(500):
        if "<s>" in text:
            continue
        assert tokenizer.encode_text(text) == library.encode(text), repr(text)
        behind = library.encode(text)
        if legacy is False:  # without the library's own space: encode behind a letter that merges with nothing
            behind = library.encode("Ω" + text)[len(library.encode("Ω")) :]
        assert tokenizer.encode_text("a</s>" + text) == [*library.encode("a"), tokenizer.eos_token_id, *behind], repr(text)


def test_no_space_in_front_of_a_special_token(tokenizer_with):
    assert tokenizer_with("vicuna", legacy=False).encode_text("</s>") == [2]


def test_labels_without_legacy(tokenizer_with):
    tokenizer = tokenizer_with("vicuna", legacy=False)
    messages = [
        Message("user", "Is <image> red?"),
        Message("assistant", "No."),
        Message("user", "a"),
        Message("assistant", "Hi"),
    ]
    ids, labels = tokenizer.encode(render(messages, "v1", tokenizer, generate=False))
    answers = [*tokenizer.encode_text("No."), 2, *tokenizer.encode_text("Hi"), 2]
    np.testing.assert_array_equal(labels[labels != IGNORE_LABEL], answers)
    np.testing.assert_array_equal(ids[labels != IGNORE_LABEL], answers)


# Decoding


@pytest.mark.parametrize("name", ["llama3", "vicuna"])
def test_streamed_text_is_the_decoded_text(name, request):
    tokenizer = request.getfixturevalue(name)
    for text in [*random_texts(300), " leading", "naïve 日本語 🙂", "don 't , stop ."]:
        ids = tokenizer.encode_text(text)
        stream = StreamDecoder(tokenizer)
        parts = [stream.push(i) for i in ids]
        assert all("\ufffd" not in part for part in parts)
        assert "".join(parts) + stream.flush() == tokenizer.decode(ids) == text
        assert by_transformers(tokenizer.folder).decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", ["llama3", "vicuna"])
def test_characters_are_held_back_until_complete(name, request):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode_text("🙂")
    assert len(ids) > 1
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🙂"]
    assert stream.flush() == ""
    assert tokenizer.decode(ids[:-1]) == "\ufffd"
    assert tokenizer.decode([*ids[:-1], *tokenizer.encode_text("a")[-1:]]).startswith("\ufffd")


@pytest.mark.parametrize("name", ["llama3", "vicuna"])
def test_ids_that_are_no_text_are_skipped(name, request):
    tokenizer = request.getfixturevalue(name)
    words = tokenizer.encode_text("the circle")
    odd = [tokenizer.bos_token_id, *words, IMAGE_TOKEN_ID, -1, 10**6, tokenizer.eos_token_id]
    assert tokenizer.decode(np.array(odd)) == "the circle"


def test_stop_tokens(llama3, vicuna):
    ends = [llama3.token_id(t) for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    assert stop_token_ids(llama3, LLAMA, [487]) == stop_token_ids(llama3, TWO_BOS, [487]) == tuple(ends)
    assert stop_token_ids(vicuna, LLAMA, [7]) == (7,)
    assert stop_token_ids(llama3, "v1", (2,)) == (2,)


# Loading


def test_special_ids(llama3, vicuna):
    assert (llama3.bos_token_id, llama3.eos_token_id, llama3.pad_token_id) == (480, 487, 485)
    assert (vicuna.bos_token_id, vicuna.eos_token_id, vicuna.pad_token_id) == (1, 2, 0)


def test_a_folder_without_tokenizer_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in .*tokenizer\.json.*tokenizer\.model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"])
@pytest.mark.parametrize("name", ["llama3_tokenizer/tokenizer.json", "vicuna_tokenizer/tokenizer.model"])
def test_broken_tokenizer_files_are_refused_in_one_line(content, name, tmp_path):
    shutil.copytree((TEXT / name).parent, tmp_path / "folder")
    (tmp_path / "folder" / Path(name).name).write_text(content)
    with pytest.raises(UserError, match="cannot be read") as error:
        Tokenizer.load(tmp_path / "folder")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("verbosity", [None, "info"])
def test_transformers_is_imported_late_and_quietly(verbosity, tmp_path):
    script = """
import os, sys
import lmm_jax.data.conversation, lmm_jax.data.tokenize
assert "transformers" not in sys.modules and "jax" not in sys.modules
before = dict(os.environ)
lmm_jax.data.tokenize.Tokenizer.load(sys.argv[1])
assert "TRANSFORMERS_VERBOSITY" in before or "TRANSFORMERS_VERBOSITY" not in os.environ
import transformers
print(transformers.logging.get_verbosity())
"""
    env = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    env |= {"TRANSFORMERS_VERBOSITY": verbosity} if verbosity else {}
    command = [sys.executable, "-c", script, str(TEXT / "vicuna_tokenizer")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("20" if verbosity else "40")
    if verbosity is None:
        assert done.stderr == ""


@pytest.mark.parametrize(
    "question,images,place",
    [("What?", 2, 2), ("<image> or <video>?", 1, 1), ("<video> or <image>?", 1, 0), ("<image><video><image>", 2, 1)],
)
def test_the_video_comes_where_it_stands(question, images, place):
    assert video_place(question, images, 1) == place


@pytest.mark.parametrize("question,videos", [("<video>?", 0), ("<video> <video>", 1)])
def test_more_video_placeholders_than_videos(question, videos):
    with pytest.raises(UserError, match="<video>"):
        video_place(question, 3, videos)


def test_text_that_is_not_utf8_is_refused(llama3):
    with pytest.raises(UserError, match="UTF-8"):
        llama3.encode_text("a\udcff")
