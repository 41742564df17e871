"""The page: ask about pictures and clips in a browser."""

from __future__ import annotations

import contextlib
import hmac
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from PIL import Image

from lmm_jax.data.conversation import Message, with_placeholders
from lmm_jax.demo import examples
from lmm_jax.errors import UserError
from lmm_jax.inference.assistant import Conversation
from lmm_jax.inference.sampling import Sampling
from lmm_jax.serve.decoding import Clip
from lmm_jax.serve.errors import as_api_error
from lmm_jax.serve.service import NEW_TOKENS, Reply, Service, Wanted

_CSS = """
footer { display: none !important }
.gradio-container, .gradio-container main {
  max-width: 52rem !important; margin: 0 auto !important; padding: 0.5rem !important
}
.timing { font-size: 0.75rem; opacity: 0.7 }
#chat { height: calc(100dvh - 21rem) !important; min-height: 16rem }
"""
_STOPPED = '<span class="timing">stopped: this turn is forgotten</span>'

State = Conversation


def mount(app: FastAPI, service: Service, folder: Path, api_key: str | None) -> FastAPI:
    """The application with the page at `/`; who has no key is asked for one. Examples are drawn into `folder`."""
    limits = service.limits
    blocks = _blocks(service, folder)
    blocks.queue(max_size=limits.queue, default_concurrency_limit=limits.rows, api_open=False)

    def knows(_: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), api_key.encode())

    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        auth=None if api_key is None else knows,
        auth_message="Any name, and the server's API key as the password.",
        max_file_size=int(limits.file_mb * 1e6),
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        footer_links=[],
        css=_CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),  # none fetched
    )


def _blocks(service: Service, folder: Path) -> gr.Blocks:
    picture, clip = _examples(folder)
    with gr.Blocks(title="lmm-jax", analytics_enabled=False, fill_height=True, delete_cache=(60, 3600)) as blocks:
        gr.Markdown(f"### {service.name}\nAsk about pictures and clips: each picture is one token to the model.")
        state = gr.State(Conversation(), time_to_live=3600)
        chat = gr.Chatbot(
            elem_id="chat", show_label=False, buttons=["copy"], feedback_options=None, placeholder="Nothing was asked yet."
        )
        box = gr.MultimodalTextbox(
            elem_id="question",
            file_types=["image", "video"],
            file_count="multiple",
            sources=["upload"],
            placeholder="A question; paste or add pictures or a clip",
            show_label=False,
            autofocus=True,
            max_plain_text_length=100_000,
        )
        with gr.Row():
            stop = gr.Button("Stop", elem_id="stop", size="sm", min_width=80)
            new = gr.Button("New chat", elem_id="new", size="sm", min_width=80)
            where = gr.Button("Where it looks", elem_id="where", size="sm", min_width=80)
        looks = gr.Image(elem_id="map", label="What the last picture's token is made of", visible=False, interactive=False)
        gr.Examples(
            [
                [{"text": "What colour is the circle?", "files": [picture]}],
                [{"text": "What is left of the square?", "files": [picture]}],
                [{"text": "Which way does the circle move?", "files": [clip]}],
            ],
            box,
            label="Examples",
        )

        async def answer(given: dict[str, Any], shown: list[Any], said: State) -> AsyncIterator[tuple]:
            async for now, then in _answer(service, given, shown, said):
                yield now, then, gr.update(value=None), gr.update(visible=False)

        hidden = {"api_visibility": "private"}
        asked = box.submit(answer, [box, chat, state], [chat, state, box, looks], show_progress="hidden", **hidden)
        stop.click(_forget, [chat], [chat], cancels=[asked], queue=False, **hidden)
        cleared = ([], Conversation(), gr.update(value=None), gr.update(visible=False))
        all_of_it = [chat, state, box, looks]
        gr.on([new.click, chat.clear], lambda: cleared, None, all_of_it, cancels=[asked], queue=False, **hidden)
        where.click(lambda said: _map(service, said), [state], [looks], **hidden)
    return blocks


def _examples(folder: Path) -> tuple[str, str]:
    picture, clip = folder / "shapes.png", folder / "moving.mp4"
    examples.picture().save(picture)
    clip.write_bytes(examples.clip())
    return str(picture), str(clip)


async def _answer(
    service: Service, given: dict[str, Any], shown: list[Any], said: State
) -> AsyncIterator[tuple[list[Any], State]]:
    """What the chat shows and what was said, as the answer grows."""
    text, files = given.get("text") or "", [Path(f) for f in given.get("files") or []]
    if not text.strip() and not files:
        yield shown, said
        return
    shown = [*shown, *({"role": "user", "content": {"path": str(f)}} for f in files)]
    if text.strip():
        shown = [*shown, {"role": "user", "content": text}]
    yield shown, said
    try:
        asked = await _read(service, text, files, said)
        (reply,) = service.replies(
            await service.prompt(asked), Wanted(Sampling(max_new_tokens=NEW_TOKENS), seconds=service.limits.deadline)
        )
        words = ""
        async with contextlib.aclosing(reply.pieces()) as pieces:
            async for piece in pieces:
                words += piece
                yield [*shown, {"role": "assistant", "content": words}], said
    except UserError as error:
        raise gr.Error(str(as_api_error(error)), print_exception=False) from error
    told = [{"role": "assistant", "content": content} for content in (words or "(no words)", _timing(reply))]
    yield [*shown, *told], Conversation((*asked.messages, Message("assistant", words)), asked.media)


async def _read(service: Service, text: str, files: list[Path], said: State) -> State:
    limits = service.limits
    videos = [f for f in files if f.suffix.lower() not in Image.registered_extensions() or f.suffix.lower() in _MOVING]
    if len(videos) > limits.videos or len(files) - len(videos) > limits.images:
        raise UserError(f"at most {limits.images} pictures and {limits.videos} videos are read at once")
    with tempfile.TemporaryDirectory() as folder:
        media = [
            await service.media.decode(f, Clip() if f in videos else None, Path(folder) / str(n)) for n, f in enumerate(files)
        ]
    message = Message("user", with_placeholders(text.strip(), len(media)))
    return Conversation((*said.messages, message), (*said.media, *media))


_MOVING = {".mpg", ".mpeg"}  # which Pillow claims, but cannot read


def _timing(reply: Reply) -> str:
    seconds = reply.total - reply.first_token
    speed = f" · {(reply.tokens - 1) / seconds:.0f} tokens/s" if reply.tokens > 1 and seconds > 0 else ""
    told = f"encoded in {reply.encode:.2f} s · first token after {reply.first_token:.2f} s{speed}"
    return f'<span class="timing">{told}</span>'


def _forget(shown: list[Any]) -> list[Any]:
    """The chat after a stop."""
    is_done = not shown or (shown[-1]["role"] == "assistant" and 'class="timing"' in str(shown[-1]["content"]))
    return shown if is_done else [*shown, {"role": "assistant", "content": _STOPPED}]


def _map(service: Service, said: State) -> Any:
    """The compression map of the last picture, or of a video's first frame."""
    if not said.media:
        raise gr.Error("Show a picture first, and ask about it.", print_exception=False)
    try:
        from lmm_jax.analysis.compression import compression_maps
        from lmm_jax.analysis.plots import maps

        pixels = said.media[-1] if isinstance(said.media[-1], np.ndarray) else said.media[-1][0]
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            maps([pixels], [compression_maps(service.assistant, pixels)], Path(file.name))
            return gr.update(value=np.asarray(Image.open(file.name).convert("RGB")), visible=True)
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
