"""What the official client asks and gets."""

import json
import socket

import openai
import pytest
from serve.conftest import data_url, head, until, user

import lmm_jax
from lmm_jax.inference.assistant import Conversation, Message, Question

COLOUR = "What colour is the circle?"
MOVES = "Which way does the circle move?"


@pytest.fixture(scope="module")
def alone(media):
    """Answers of the same model without a server."""
    model = lmm_jax.load()
    picture, clip = str(media / "shapes.png"), str(media / "moving.mp4")
    first = model.extend(Conversation(), Question(COLOUR, [picture]))
    (answer,) = model.answers([first])
    second = model.extend(
        Conversation((*first.messages, Message("assistant", answer.text)), first.media), Question("And the square?")
    )
    (then,) = model.answers([second])
    return {
        "picture": answer,
        "turns": then,
        "video": model.answers([model.extend(Conversation(), Question(MOVES, video=clip))])[0],
        "two": model.answers([model.extend(Conversation(), Question("What is the same?", [picture, picture]))])[0],
        "text": model.answers([model.extend(Conversation(), Question("What is a circle?"))], max_new_tokens=32)[0],
        "drawn": model.answers([first], temperature=1.5, seed=7, max_new_tokens=16)[0],
    }


@pytest.fixture
def ask(server):
    client = server.openai()

    def ask(*messages, **settings):
        return client.chat.completions.create(model="demo", messages=list(messages), **settings)

    yield ask
    client.close()


def content(completion):
    return completion.choices[0].message.content


def test_answers_are_those_of_the_model_alone(ask, alone, picture, video):
    done = ask(user(COLOUR, picture))
    assert content(done) == alone["picture"].text and done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens == len(alone["picture"].token_ids)
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.model == "demo" and done.object == "chat.completion" and done.id.startswith("chatcmpl-")
    assert content(ask(user(MOVES, video))) == alone["video"].text
    assert content(ask(user(video, MOVES))) == alone["video"].text
    assert content(ask(user("What is the same?", picture, picture))) == alone["two"].text
    text = ask({"role": "user", "content": "What is a circle?"}, max_tokens=32)
    assert content(text) == alone["text"].text
    drawn = ask(user(COLOUR, picture), temperature=1.5, seed=7, max_completion_tokens=16)
    assert content(drawn) == alone["drawn"].text
    answer = done.choices[0].message.model_dump()  # as people's code gives it back
    assert content(ask(user(COLOUR, picture), answer, user("And the square?"))) == alone["turns"].text


def test_a_stream_is_the_answer_in_pieces(ask, alone, picture):
    settings = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(user(COLOUR, picture), temperature=1.5, seed=7, max_tokens=16, **settings))
    told = [c for c in chunks if c.choices]
    assert told[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in told) == alone["drawn"].text
    assert [c.choices[0].finish_reason for c in told][-1] in ("stop", "length")
    assert len({c.id for c in chunks}) == 1 and len(chunks) > 3
    assert chunks[-1].usage.completion_tokens == len(alone["drawn"].token_ids)


def test_several_answers_differ_by_their_seeds(ask, picture):
    settings = {"temperature": 2.0, "max_tokens": 48}
    three = ask(user("Describe the picture.", picture), n=3, seed=7, **settings)
    alone = [ask(user("Describe the picture.", picture), seed=7 + k, **settings) for k in range(3)]
    assert [c.message.content for c in three.choices] == [content(a) for a in alone]
    assert len({content(a) for a in alone}) > 1
    assert three.usage.completion_tokens == sum(a.usage.completion_tokens for a in alone)
    pieces = {}
    for chunk in ask(user("Describe the picture.", picture), n=3, seed=7, stream=True, **settings):
        choice = chunk.choices[0]
        pieces[choice.index] = pieces.get(choice.index, "") + (choice.delta.content or "")
    assert [pieces[k] for k in range(3)] == [content(a) for a in alone]
    unlike = {content(ask(user("Describe the picture.", picture), **settings)) for _ in range(4)}
    assert len(unlike) > 1, "without a seed every answer is another"


def test_stops_lengths_and_system_messages(ask, picture):
    whole = ask(user("Describe the picture.", picture), temperature=1.5, seed=3, max_tokens=24)
    text = content(whole)
    cut = text[len(text) // 2 : len(text) // 2 + 3]
    for stream in (False, True):
        done = ask(
            user("Describe the picture.", picture), temperature=1.5, seed=3, max_tokens=24, stop=["@@", cut], stream=stream
        )
        got = "".join(c.choices[0].delta.content or "" for c in done if c.choices) if stream else content(done)
        assert got == text[: text.index(cut)].strip()
    short = ask(user("Describe the picture.", picture), temperature=1.5, seed=3, max_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
    system = {"role": "system", "content": "Be brief."}
    one, two = ask(system, user(COLOUR, picture)), ask(user("Be brief.\n" + COLOUR, picture))
    assert content(one) == content(two) and one.usage == two.usage


def test_uploads_are_asked_about_until_they_are_deleted(server, ask, alone, media):
    client = server.openai()
    clip = client.files.create(file=media / "moving.mp4", purpose="user_data")
    picture = client.files.create(file=(media / "shapes.png").open("rb"), purpose="vision")
    assert clip.filename == "moving.mp4" and clip.bytes == (media / "moving.mp4").stat().st_size
    assert {f.id for f in client.files.list()} >= {clip.id, picture.id}
    for part in (
        {"type": "video_url", "video_url": {"file_id": clip.id}},
        {"type": "video_url", "video_url": {"url": clip.id}},
        {"type": "input_video", "input_video": {"file_id": clip.id}},
    ):
        assert content(ask(user(MOVES, part))) == alone["video"].text
    shown = {"type": "image_url", "image_url": {"file_id": picture.id}}
    assert content(ask(user(COLOUR, shown))) == alone["picture"].text
    data = data_url(media / "moving.mp4", "video/mp4").partition(",")[2]
    part = {"type": "input_video", "input_video": {"data": data, "format": "mp4", "start": 0, "end": 3}}
    fewer = ask(user(MOVES, part))
    assert fewer.usage.prompt_tokens < ask(user(MOVES, shown, part)).usage.prompt_tokens
    whole, four, one, same = (
        ask(user(MOVES, {"type": "video_url", "video_url": {"file_id": clip.id, **how}}), extra_body=body).usage.prompt_tokens
        for how, body in (
            ({}, {}),
            ({"frames": 4}, {}),
            ({"frames": 4, "fps": 0.125}, {}),
            ({}, {"media_io_kwargs": {"video": {"num_frames": 4}}}),
        )
    )
    assert whole == four + 4 == one + 7 and same == four
    for file in (clip, picture):
        assert client.files.retrieve(file.id).id == file.id
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError, match="no file"):
            client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError, match="no file"):
        ask(user(MOVES, {"type": "video_url", "video_url": {"file_id": clip.id}}))


@pytest.mark.parametrize(
    "body, word",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}], "n": 0}, "n:"),
        ({"messages": [{"role": "user", "content": "x"}], "n": 9}, "at most 8"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 5000}, "at most 4096"),
        ({"messages": [{"role": "user", "content": "x"}], "temperature": -1}, "temperature"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
        ({"messages": [{"role": "user", "content": "x"}], "logprobs": True}, "logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "unheard_of": 1}, "unheard_of"),
        ({"messages": [user("x")], "media_io_kwargs": {"video": {"num_frames": 0}}}, "num_frames"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "end with an answer"),
        ({"messages": [{"role": "user", "content": "<image> what?"}]}, "placeholder"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "context"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"messages": [user({"type": "image_url", "image_url": {"url": "data:image/png;base64,????"}})]}, "base64"),
        ({"messages": [user({"type": "image_url", "image_url": {"url": "data:image/png,x"}})]}, "data URL"),
        ({"messages": [user({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}})]}, "not a picture"),
        ({"messages": [user({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}})]}, "the video"),
        ({"messages": [user({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}})]}, "fetches nothing"),
        ({"messages": [user({"type": "image_url", "image_url": {"url": "/etc/passwd"}})]}, "fetches nothing"),
        ({"messages": [user({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})]}, "fetches nothing"),
    ],
)
def test_what_cannot_be_answered_is_told(server, body, word):
    got = server.post(body)
    error = got.json()["error"]
    assert got.status_code == 400 and word in error["message"], error
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert "/tmp" not in error["message"] and "Traceback" not in error["message"]


def test_other_wrong_requests(server):
    with server.http() as client:
        assert client.post("/v1/chat/completions", content=b"{").status_code == 400
        assert client.post("/v1/chat/completions", content=b"[" * 100_000).status_code == 400
        assert client.post("/v1/chat/completions", content=b"\xff\xfe").status_code == 400
        assert client.get("/v1/chat/completions").json()["error"]["type"] == "not_found_error"
        assert client.post("/v1/completions").json()["error"]["type"] == "not_found_error"
        assert client.get("/nowhere").json()["error"]["type"] == "not_found_error"
        assert client.get("/v1/files/..%2f..%2fetc%2fpasswd").status_code == 404
        assert client.post("/v1/files", files={"file": ("x.png", b"")}).status_code == 400
        assert client.post("/v1/files", data={"purpose": "vision"}).status_code == 400
    assert server.post({"model": "gpt-5", "messages": [{"role": "user", "content": "x"}]}).status_code == 404


def test_models_health_metrics_and_schema(server):
    client = server.openai()
    (model,) = client.models.list().data
    assert model.id == "demo" and client.models.retrieve("demo").owned_by == "lmm-jax"
    with server.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        server.post({"messages": [{"role": "user", "content": "What is red?"}], "max_tokens": 2})
        text = http.get("/metrics").text
        assert 'lmm_requests_total{path="/v1/chat/completions",status="200"}' in text and "lmm_generated_tokens_total" in text
        schema = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/files", "/v1/models", "/health", "/metrics"} <= set(schema["paths"])


def test_a_client_that_leaves_frees_its_place(server, picture):
    """Mid-stream, and while it waits for a whole answer; how soon is measured by benchmarks/serve_load.py."""
    before = server.service.metrics.cancelled._value.get()
    for stream in (True, False):
        body = {"messages": [user("Describe it.", picture)], "ignore_eos": True, "max_tokens": 4096, "stream": stream}
        content = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head(len(content)) + content)
            if stream:
                while b'"content":"' not in client.recv(65536).replace(b'"content":""', b""):
                    pass
            until(lambda: server.service.live.running)
        until(server.is_idle)
    assert server.service.metrics.cancelled._value.get() == before + 2
