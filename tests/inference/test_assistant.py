"""Questions with real files: pictures, clips, prompts, conversations."""

import contextlib
import dataclasses
import functools
import io
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from support import GOLDEN, slow

import lmm_jax
from lmm_jax.data.conversation import Message, render
from lmm_jax.errors import UserError
from lmm_jax.inference.assistant import Conversation, Question, Video
from lmm_jax.inference.sampling import Sampling

NAMES = ("tall", "wide", "odd", "small", "frame", "exact", "grey", "rgba")


@pytest.fixture(scope="module")
def model(tiny):
    return functools.cache(lambda name="tiny": lmm_jax.load(tiny(name)))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Ten seconds at 5 frames per second, a square moving."""
    import av

    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 96, 64
        for i in range(50):
            frame = np.full((64, 96, 3), 230, np.uint8)
            frame[20:40, i : i + 20] = (200, 30, 5 * i)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def file(name):
    return GOLDEN / "preprocessing" / f"{name}.png"


def questions(count, clip):
    """Text only, one picture, several (with placeholders inside the text), a clip, in all lengths."""
    rng, out = np.random.default_rng(0), []
    for i in range(count):
        words = " ".join(["what", "colour", "is", "the", "circle", "and", "why"][: int(rng.integers(1, 8))] * (i % 5 + 1))
        one, two = file(NAMES[i % len(NAMES)]), file(NAMES[(3 * i + 1) % len(NAMES)])
        out.append(
            (
                Question(f"{words}?"),
                Question(f"{words}?", [one]),
                Question(f"Is <image> like <image>? {words}", [one, two]),
                Question(f"{words}?", video=Video(clip, end=1 + i % 9)),
            )[i % 4]
        )
    return out


@pytest.mark.parametrize("count", slow(16, 64))
def test_mixed_questions_equal_asking_alone(model, clip, count):
    asked, settings = questions(count, clip), {"max_new_tokens": 8, "temperature": 0.8, "seed": 5}
    together = model().ask_batch(asked, **settings)
    assert together == [model().ask(q.text, q.images, q.video, **settings) for q in asked]
    assert len(set(together)) > count // 3  # the questions do make a difference


def test_videos_are_read_again_where_memory_was_too_small(model, clip, monkeypatch):
    asked = [Question(f"What {'is ' * i}it?", video=Video(clip, end=2 + i)) for i in range(4)]
    expected = model().ask_batch(asked, max_new_tokens=8)
    programs = model().engine.programs
    decode = programs.decode

    def failing(params, state, *told):
        if len(state.done) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return decode(params, state, *told)

    monkeypatch.setattr(programs, "decode", failing)
    assert model().ask_batch(asked, max_new_tokens=8) == expected
    assert len(set(expected)) > 1  # the videos do make a difference


def test_a_video_that_can_be_read_only_once(model, clip):
    with contextlib.ExitStack() as stack:
        conversation = Conversation((Message("user", "<image>\nWhat?"),), (Video(clip),))
        request = model().request(conversation, None, Sampling(2), stack)
        assert len(model().engine.generate([request], ())[0]) == 2
        once = dataclasses.replace(request, media=[Once(request.media[0])])
        assert model().engine.generate([once], ()) == model().engine.generate([request], ())
        with pytest.raises(UserError, match="none of its 10 frames"):
            model().engine.generate([once], ())


class Once:
    def __init__(self, frames):
        self._length, self._frames = len(frames), iter(frames)

    def __len__(self):
        return self._length

    def __iter__(self):
        return self._frames


def test_batch_takes_plain_text_too(model):
    assert model().ask_batch(["Hello?"], max_new_tokens=4) == [model().ask("Hello?", max_new_tokens=4)]


@pytest.mark.parametrize("size", ["tiny", *slow("tiny-hd")])
def test_every_turn_of_a_chat_equals_the_whole_transcript_afresh(model, tiny, clip, size):
    settings = {"max_new_tokens": 6, "temperature": 0.7, "seed": 3}
    chat = model(size).chat()
    turns = [
        ("What is it?", ["tall"], None),
        ("And now?", [], None),
        ("These two?", ["odd", "wide"], None),
        ("Here?", [], clip),
    ]
    conversation = Conversation()
    for text, names, video in turns:
        pictures = [file(n) for n in names]
        answer = chat.ask(text, pictures, video, **settings)
        fresh = lmm_jax.load(tiny(size), prefix_cache_bytes=0)
        conversation = fresh.extend(conversation, Question(text, pictures, video))
        assert answer == fresh.answers([conversation], **settings)[0].text
        conversation = Conversation((*conversation.messages, Message("assistant", answer)), conversation.media)
    assert chat.conversation.messages == conversation.messages


def test_a_question_that_fails_leaves_the_chat_as_it_was(model):
    chat = model().chat()
    chat.ask("Hello?", max_new_tokens=2)
    before = chat.conversation
    with pytest.raises(UserError):
        chat.ask("What?", ["no/such/file.png"])
    with pytest.raises(UserError):
        chat.ask("What? " * 2000)
    assert chat.conversation is before


def test_streamed_pieces_are_the_answer(model):
    for seed in range(5):
        settings = {"max_new_tokens": 24, "temperature": 1.5, "seed": seed}
        pieces = list(model().stream("What?", [file("odd")], **settings))
        assert "".join(pieces).strip() == model().ask("What?", [file("odd")], **settings)
        assert len(pieces) > 3


def test_pictures_in_every_form(model):
    path, settings = file("odd"), {"max_new_tokens": 8}
    expected = model().ask("What?", [path], **settings)
    for picture in (str(path), path.read_bytes(), Image.open(path)):
        assert model().ask("What?", [picture], **settings) == expected
    assert model().ask("What?", str(path), **settings) == expected  # one picture need not be in a list


def test_exif_rotation_is_applied(model):
    upright = Image.open(file("wide")).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after turning by 90 degrees clockwise
    turned = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    both = [model().extend(Conversation(), Question("?", [p])).media[0] for p in (turned.getvalue(), upright)]
    np.testing.assert_array_equal(*both)


def test_a_part_of_a_video_is_the_video_cut_out(model, clip):
    def frames(video):
        import contextlib

        with contextlib.ExitStack() as stack:
            return list(model()._open(video, stack))

    whole, part = frames(Video(clip)), frames(Video(clip, start=4, end=8))
    assert len(whole) == 10 and len(part) == 4 and len(frames(Video(clip, fps=2.5))) == 25
    assert all(any(np.array_equal(p, w) for w in frames(Video(clip, fps=5))) for p in part)


def test_answer_says_why_it_ended(model):
    asked = [model().extend(Conversation(), Question("Hello?"))]
    (short,) = model().answers(asked, max_new_tokens=1)
    assert short.finish_reason == "length" and len(short.token_ids) == 1
    ended = next(
        a for seed in range(200) for a in model().answers(asked, max_new_tokens=256, temperature=3.0, seed=seed)
        if a.finish_reason == "stop"
    )  # fmt: skip
    assert ended.token_ids[-1] == 2 and 2 not in ended.token_ids[:-1] and "</s>" not in ended.text


def test_the_prompt_is_the_template(model, converted):
    loaded = lmm_jax.load(converted("image_c1"))
    one, two = ("llava_llama_3_1", "llava_llama_3_1_two_bos")
    rendered = [render([Message("user", "Hi")], t, loaded.tokenizer, generate=True) for t in (one, two)]
    lengths = [len(loaded.tokenizer.encode(spans)[0]) for spans in rendered]
    assert lengths[1] == lengths[0] + 1
    assert loaded.config.template == one
    assert isinstance(loaded.ask("Hi", template=two, max_new_tokens=2), str)
    with pytest.raises(UserError, match="template"):
        loaded.ask("Hi", template="no such")


@pytest.mark.parametrize("settings", [{"dtype": "int8"}, {"dtype": "foo"}, {"attention": "foo"}])
def test_settings_that_cannot_be(tiny, settings):
    with pytest.raises(UserError, match="choose one of"):
        lmm_jax.load(tiny("tiny"), **settings)


def test_a_video_stands_where_its_placeholder_does(model, clip):
    asked = model().extend(Conversation(), Question("<video> shows it, <image> too", [file("odd")], clip))
    assert isinstance(asked.media[0], Video) and isinstance(asked.media[1], np.ndarray)
    asked = model().extend(Conversation(), Question("What?", [file("odd")], clip))
    assert isinstance(asked.media[1], Video) and isinstance(asked.media[0], np.ndarray)


def test_one_question_is_not_a_batch(model):
    with pytest.raises(TypeError, match="list"):
        model().ask_batch("Hello?")
    assert model().ask("Hello?", images=None, max_new_tokens=2) == model().ask("Hello?", max_new_tokens=2)


def test_chat_with_an_unknown_template(model):
    with pytest.raises(UserError, match="template"):
        model().chat("no such")


def test_loss_and_logits_refuse_what_they_cannot_compute(model):
    context = model().config.decoder.max_position_embeddings
    with pytest.raises(UserError, match="context"):
        model().logits(np.ones((1, context + 1), int))
    with pytest.raises(UserError, match="no rows"):
        model().logits(np.ones((0, 5), int))
    for label in (-1, 512):
        with pytest.raises(UserError, match=f"label {label}"):
            model().loss(np.ones((1, 5), int), None, np.full((1, 5), label))
    with pytest.raises(UserError, match="nothing to predict"):
        model().loss(np.ones((1, 5), int), None, np.full((1, 5), -100))


def test_unknown_arguments_are_refused(model):
    with pytest.raises(TypeError, match="temprature"):
        model().ask("Hi", temprature=1.0)


@pytest.mark.parametrize(
    "ids,mask,pixels,labels",
    [
        ((2, 5), (2, 4), None, None),
        ((5,), None, None, None),
        ((1, 5), None, (1, 1, 3, 48, 56), None),
        ((1, 5), None, None, (1, 4)),
    ],
)
def test_arrays_that_do_not_fit(model, ids, mask, pixels, labels):
    mask, pixels, labels = (None if shape is None else np.ones(shape) for shape in (mask, pixels, labels))
    with pytest.raises(UserError, match="shape"):
        if labels is None:
            model().logits(np.ones(ids, int), mask, pixels)
        else:
            model().loss(np.ones(ids, int), mask, labels, pixels)


def test_model_without_tokenizer(tiny, tmp_path):
    import shutil

    folder = shutil.copytree(tiny("tiny"), tmp_path / "model")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    loaded = lmm_jax.load(folder)
    assert loaded.generate(np.ones((1, 4), int), max_new_tokens=3).shape == (1, 3)
    with pytest.raises(UserError, match="tokenizer"):
        loaded.ask("Hi")


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = "import sys, lmm_jax, lmm_jax.cli; print(sorted({'jax', 'flax', 'transformers', 'av', 'orbax'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert out.stdout.strip() == "[]"
