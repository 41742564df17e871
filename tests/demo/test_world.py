import dataclasses
import math
from collections import Counter

import numpy as np
import oracle
import pytest

from lmm_jax.demo import clip_questions, questions
from lmm_jax.demo.asking import Question, ask_each, ask_several, guess_rate, lines
from lmm_jax.demo.captions import describe, describe_clip
from lmm_jax.demo.clip_questions import ClipView
from lmm_jax.demo.clips import DIRECTIONS, RATE, REVERSIBLE, SECONDS, frames, make_clip
from lmm_jax.demo.dataset import sampled
from lmm_jax.demo.options import SceneView
from lmm_jax.demo.world import COLOURS, MARGIN, SHAPES, SIDE, SIZES, Thing, draw, make_scene

TIMES = sampled((np.arange(SECONDS * RATE) / RATE).tolist())
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def rng(*seed):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(rng(1, i)) for i in range(1200)]


@pytest.fixture(scope="module")
def clips():
    return [make_clip(rng(2, i)) for i in range(1200)]


@pytest.fixture(scope="module")
def asked(scenes, clips):
    """All questions of three passes, with what they are about."""
    pictures = [
        (q, s) for k in range(3) for i, s in enumerate(scenes) for q in ask_each(SceneView(s), questions.FORMS, rng(3, k, i))
    ]
    moving = [
        (q, c)
        for k in range(3)
        for i, c in enumerate(clips)
        for q in ask_each(ClipView(c), clip_questions.FORMS, rng(4, k, i))
    ]
    return pictures, moving


def colour_of(rgb):
    return min(COLOURS, key=lambda c: math.dist(COLOURS[c], rgb))


def test_scenes_follow_from_the_generator(scenes):
    assert make_scene(rng(1, 7)) == scenes[7] != scenes[8]
    assert make_clip(rng(2, 7)) == make_clip(rng(2, 7)) != make_clip(rng(2, 8))
    numbers = np.bincount([len(s.things) for s in scenes])
    assert len(numbers) == 6 and numbers[0] == 0 and numbers[1:].min() > 160
    assert {len(make_scene(rng(5, i), (2, 3)).things) for i in range(50)} == {2, 3}
    assert {len(make_clip(rng(5, i), (1, 2)).things) for i in range(50)} == {1, 2}


def test_every_attribute_is_as_frequent(scenes):
    things = [t for s in scenes for t in s.things]
    for name, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
        shares = [sum(getattr(t, name) == v for t in things) / len(things) for v in values]
        assert min(shares) > 0.85 / len(values)


def test_things_lie_apart_and_inside(scenes):
    for scene in scenes:
        for i, t in enumerate(scene.things):
            assert min(t.x, t.y, SIDE - t.x, SIDE - t.y) >= t.extent + MARGIN
            assert all(math.dist((t.x, t.y), (u.x, u.y)) >= t.extent + u.extent + MARGIN for u in scene.things[:i])


def test_pictures_show_the_things(scenes):
    for scene in scenes[:100]:
        image = draw(scene.background, scene.things)
        assert image.size == (SIDE, SIDE) and image.getpixel((0, 0)) == scene.background and min(scene.background) > 215
        for t in scene.things:
            assert image.getpixel((round(t.x), round(t.y))) == t.rgb
            assert colour_of(t.rgb) == t.colour
            assert math.dist(t.rgb, scene.background) > 120


@pytest.mark.parametrize("radius", SIZES.values())
def test_shapes_look_equally_big_and_different(radius):
    masks = []
    for shape in SHAPES:
        thing = Thing(shape, "red", "small", 64, 64, radius, (0, 0, 0))
        small = draw((255, 255, 255), [thing]).resize((64, 64))  # as the model sees it
        masks.append(1 - np.asarray(small.convert("L")) / 255.0)
        rows, columns = np.nonzero(np.asarray(draw((255, 255, 255), [thing]).convert("L")) < 250)
        assert max(np.hypot(rows - 63.5, columns - 63.5)) <= thing.extent + 1
    areas = [m.sum() for m in masks]
    assert max(areas) < 1.25 * min(areas)
    for i, a in enumerate(masks):
        assert all(np.abs(a - b).sum() > 0.15 * min(areas) for b in masks[:i])


def test_answers_about_pictures_are_what_one_sees(asked):
    assert {q.template for q, _ in asked[0]} == {t for f in questions.FORMS for t in lines(f.wordings)}
    for q, scene in asked[0]:
        assert oracle.answer(q, scene.things) == q.answer, q


def test_answers_about_clips_are_what_one_sees_in_eight_frames(asked):
    assert {q.template for q, _ in asked[1]} == {t for f in clip_questions.FORMS for t in lines(f.wordings)}
    for q, clip in asked[1]:
        seen = [oracle.Seen(states) for states in zip(*map(clip.at, TIMES))]
        assert oracle.clip_answer(q, seen) == q.answer, q


def test_positions_and_sides_are_clear(asked):
    for q, scene in asked[0]:
        words = oracle.slots(q)
        a, b = (oracle.the(scene.things, words[k]) if k in words else None for k in "ab")
        if q.type == "relation" and b:
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= 16
        if q.answer in questions.options.REGIONS:
            assert min(abs(a.x - 64), abs(a.y - 64)) >= 16


@pytest.mark.parametrize("which", (0, 1))
def test_answers_cannot_be_guessed(asked, which):
    found = [q for q, _ in asked[which]]
    half = len(found) // 3 * 2  # of other scenes' questions one pass more, so that the player knows most texts
    for key in ("text", "template"):
        for seen, other in ((found[:half], found[half:]), (found[-half:], found[:-half])):
            rates = guess_rate(seen, other, key)
            assert rates["all"] <= 0.5, rates
            assert max(rates.values()) <= 0.56, rates
    assert len(rates) == len((questions.TYPES, clip_questions.TYPES)[which]) + 1


def test_yes_and_no_are_balanced(asked):
    for which in (0, 1):
        answers = [q.answer for q, _ in asked[which] if q.answer in ("yes", "no")]
        assert abs(answers.count("yes") / len(answers) - 0.5) < 0.03


def test_guess_rate_counts():
    def made(type_, text, answer):
        return Question(type_, text, answer, text, ())

    seen = [made("a", "x", "1"), made("a", "x", "1"), made("a", "x", "2"), made("b", "y", "3")]
    new = [made("a", "x", "1"), made("a", "x", "2"), made("b", "z", "3")]
    assert guess_rate(seen, new) == {"a": 0.5, "b": 1.0, "all": pytest.approx(2 / 3)}


def backwards(clip):
    """The clip run backwards."""
    things, events = list(clip.things), []
    for e in reversed(clip.events):
        kind = {"appear": "disappear", "disappear": "appear"}.get(e.kind, e.kind)
        after = e.after and things[e.thing]
        things[e.thing] = e.after or things[e.thing]
        times = TIMES[0] + TIMES[-1] - e.end, TIMES[0] + TIMES[-1] - e.start
        events.append(
            dataclasses.replace(
                e, kind=kind, start=times[0], end=times[1], after=after, direction=OPPOSITE.get(e.direction, "")
            )
        )
    return dataclasses.replace(clip, things=tuple(things), events=tuple(events))


def test_order_cannot_be_told_from_frames_in_disorder(asked):
    """Run backwards a clip has the same frames; then the same question has another answer."""
    found = [(q, c) for q, c in asked[1] if q.type == "order"]
    assert len(found) > 400
    for q, clip in found:
        seen = [oracle.Seen(states) for states in zip(*map(clip.at, TIMES))]
        reverse = [oracle.Seen(states) for states in zip(*map(backwards(clip).at, TIMES))]
        assert oracle.clip_answer(q, reverse) != oracle.clip_answer(q, seen) == q.answer
    directions = [e.direction for _, c in asked[1] for e in c.events if e.kind == "move"]
    assert all(0.2 < directions.count(d) / len(directions) < 0.3 for d in DIRECTIONS)


def test_events_come_one_after_the_other_and_are_seen(clips):
    for clip in clips:
        assert 1 <= len(clip.events) <= 3 and len({e.thing for e in clip.events}) == len(clip.events)
        assert all(e.end + 1.0 <= f.start + 1e-9 for e, f in zip(clip.events, clip.events[1:]))
        seen = [oracle.Seen(states) for states in zip(*map(clip.at, TIMES))]
        times = [seen[e.thing].time for e in clip.events]
        assert None not in times and all(a < b for a, b in zip(times, times[1:]))
        for e in clip.events:
            states = [clip.at(t)[e.thing] for t in TIMES]
            assert e.kind != "move" or len({(s.x, s.y) for s in states}) >= 3  # also on the way
        assert all(seen[e.thing].verbs for e in clip.events)
        assert sum(bool(s.verbs) for s in seen) == len(clip.events)


def test_moving_things_touch_nothing(clips):
    for clip in clips[:300]:
        for time in np.arange(SECONDS * RATE) / RATE:
            there = [t for t in clip.at(time) if t]
            for i, t in enumerate(there):
                assert min(t.x, t.y, SIDE - t.x, SIDE - t.y) >= t.extent + MARGIN - 1e-9
                assert all(math.dist((t.x, t.y), (u.x, u.y)) > t.extent + u.extent + 1 for u in there[:i])


def test_clips_are_drawn_as_told(clips):
    for clip in clips[:20]:
        images = frames(clip)
        assert len(images) == SECONDS * RATE
        for time, image in zip(np.arange(len(images)) / RATE, images):
            assert all(image.getpixel((round(t.x), round(t.y))) == t.rgb for t in clip.at(time) if t)


def test_conversations_repeat_nothing(scenes, clips):
    for view, forms in ((SceneView(scenes[i]), questions.FORMS) for i in range(200)):
        asked = ask_several(view, forms, 6, rng(6), {})
        assert len(asked) == 6 and len({q.text for q in asked}) == len({q.subject for q in asked}) == 6
    for clip in clips[:200]:
        asked = ask_several(ClipView(clip), clip_questions.FORMS, 3, rng(6), {})
        assert 1 <= len(asked) <= 3 and len({q.text for q in asked}) == len(asked)


def test_chosen_types_are_asked_more_often(scenes):
    def asked(times):
        each = (ask_several(SceneView(scenes[i]), questions.FORMS, 5, rng(i), times) for i in range(300))
        return Counter(q.type for of in each for q in of)

    alike, more = asked({}), asked({"relation": 4})
    assert more["relation"] > 1.5 * alike["relation"] and more.total() == alike.total() == 1500


def test_every_clip_allows_a_question_and_many_allow_one_about_order(clips):
    types = [{q.type for q in ask_each(ClipView(c), clip_questions.FORMS, rng(7))} for c in clips]
    assert all(types) and sum("order" in t for t in types) > 0.35 * len(clips)
    assert sum(all(e.kind in REVERSIBLE for e in c.events) for c in clips) > len(clips) / 2


def test_descriptions_name_what_is_there(scenes, clips):
    for i, scene in enumerate(scenes[:300]):
        request, text = describe(scene, rng(8, i))
        if request == "Describe the picture.":
            parts = text.removesuffix(".").split(", ")
            assert sorted(p.split(" at the ")[0].split(" ", 1)[1] for p in parts) == sorted(
                f"{t.size} {t.name}" for t in scene.things
            )
            for part in parts:  # corners are told from the place itself
                words = part.split(" at the ")[1].split()
                kind = [t for t in scene.things if f"{t.size} {t.name}" in part]
                if len(kind) == 1 and len(words) == 2:
                    assert oracle.region(kind[0]) == " ".join(words)
    for i, clip in enumerate(clips[:300]):
        request, text = describe_clip(clip, rng(8, i))
        assert all(t.name in text for t in clip.things)
        if "List" not in request and "Which" not in request:
            assert [text.index(f"{clip.things[e.thing].name} {e.verb}") for e in clip.events] == sorted(
                text.index(f"{clip.things[e.thing].name} {e.verb}") for e in clip.events
            )
