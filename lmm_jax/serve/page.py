"""The page: ask about pictures and clips in a browser."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from gradio import processing_utils
from PIL import Image

from lmm_jax.data.conversation import Message, with_placeholders
from lmm_jax.demo import examples
from lmm_jax.errors import UserError
from lmm_jax.inference.assistant import Conversation
from lmm_jax.inference.sampling import Sampling
from lmm_jax.serve.app import of_form
from lmm_jax.serve.decoding import Clip
from lmm_jax.serve.errors import as_api_error
from lmm_jax.serve.guards import PAGE_FOLDER
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


@dataclasses.dataclass(frozen=True)
class State:
    """A visitor's chat: what is shown, and what was said. It stays on the server: a browser's word for it is not taken."""

    shown: tuple[dict[str, Any], ...] = ()
    said: Conversation = Conversation()
    growing: str = ""  # the answer that is on its way

    def messages(self) -> list[dict[str, Any]]:
        """All that is shown."""
        return [*self.shown, *([{"role": "assistant", "content": self.growing}] if self.growing else [])]


def mount(app: FastAPI, service: Service, api_key: str | None) -> tuple[FastAPI, Callable[[], None]]:
    """The application with the page at `/`, where who has no key is asked for one; and what closes open pages."""
    limits, folder = service.limits, service.folder / PAGE_FOLDER
    folder.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # of which files are served: nothing else may lie there
    processing_utils.async_ssrf_protected_download = _refuse  # Gradio would fetch any URL that is given as a file's path
    blocks = _blocks(service, folder)
    blocks.has_launched = True  # until then Gradio reads any file of the disk that a browser names; mounting does not set it
    blocks.queue(max_size=limits.queue, default_concurrency_limit=limits.rows, api_open=False)

    def knows(_: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), api_key.encode())

    app = gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        auth=None if api_key is None else knows,
        auth_message="Any name, and the server's API key as the password.",
        max_file_size=int(limits.file_mb * 1e6),
        show_error=False,  # errors of ours; what visitors should know is told anyway
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        footer_links=[],
        css=_CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),  # none fetched
    )
    (page,) = (found for route in app.routes if isinstance(found := getattr(route, "app", None), gr.routes.App))
    page.add_exception_handler(RequestValidationError, of_form)  # FastAPI's own fails where a body is not UTF-8
    return app, page.stop_event.set


async def _refuse(url: str, *_: Any) -> str:
    raise gr.Error("Files are uploaded here, not fetched.", print_exception=False)


def _blocks(service: Service, folder: Path) -> gr.Blocks:
    picture, clip = _examples(folder)
    with gr.Blocks(title="lmm-jax", analytics_enabled=False, fill_height=True, delete_cache=(60, 3600)) as blocks:
        gr.Markdown(f"### {service.name}\nAsk about pictures and clips: each picture is one token to the model.")
        state = gr.State(State(), time_to_live=900)
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

        async def answer(given: dict[str, Any], state: State) -> AsyncIterator[tuple]:
            async for now in _answer(service, given, state):
                yield now.messages(), now, gr.update(value=None), gr.update(visible=False)

        def forget(state: State) -> tuple[list[Any], State]:
            if state.shown and state.shown[-1]["role"] == "user":  # an answer was on its way
                state = State((*state.shown, {"role": "assistant", "content": _STOPPED}), state.said)
            return list(state.shown), state

        hidden = {"api_visibility": "private"}
        asked = box.submit(answer, [box, state], [chat, state, box, looks], show_progress="hidden", **hidden)
        stop.click(forget, [state], [chat, state], cancels=[asked], queue=False, **hidden)
        cleared = ([], State(), gr.update(value=None), gr.update(visible=False))
        all_of_it = [chat, state, box, looks]
        gr.on([new.click, chat.clear], lambda: cleared, None, all_of_it, cancels=[asked], queue=False, **hidden)
        where.click(lambda state: _map(service, state.said), [state], [looks], concurrency_limit=1, **hidden)
    return blocks


def _examples(folder: Path) -> tuple[str, str]:
    picture, clip = folder / "shapes.png", folder / "moving.mp4"
    examples.picture().save(picture)
    clip.write_bytes(examples.clip())
    return str(picture), str(clip)


async def _answer(service: Service, given: dict[str, Any], state: State) -> AsyncIterator[State]:
    """The chat as the answer grows; what was said changes with its end."""
    text, files = given.get("text") or "", [Path(f) for f in given.get("files") or []]
    if not text.strip() and not files:
        yield state
        return
    shown = (*state.shown, *({"role": "user", "content": {"path": str(f)}} for f in files))
    if text.strip():
        shown = (*shown, {"role": "user", "content": text})
    yield State(shown, state.said)
    seconds = service.limits.deadline
    try:
        async with asyncio.timeout(seconds):
            asked = await _read(service, text, files, state.said)
            prompt = await service.prompt(asked)
        (reply,) = service.replies(prompt, Wanted(Sampling(max_new_tokens=NEW_TOKENS), seconds=seconds))
        words = ""
        async with contextlib.aclosing(reply.pieces()) as pieces:
            async for piece in pieces:
                words += piece
                yield State(shown, state.said, words)
    except (UserError, TimeoutError) as error:
        told = str(as_api_error(error)) if isinstance(error, UserError) else "The files took too long to read."
        raise gr.Error(told, print_exception=False) from error
    told = ({"role": "assistant", "content": content} for content in (words or "(no words)", _timing(reply)))
    yield State((*shown, *told), Conversation((*asked.messages, Message("assistant", words)), asked.media))


async def _read(service: Service, text: str, files: list[Path], said: Conversation) -> Conversation:
    limits = service.limits
    videos = [f for f in files if f.suffix.lower() not in Image.registered_extensions() or f.suffix.lower() in _MOVING]
    if len(videos) > limits.videos or len(files) + len(said.media) > limits.images:
        raise UserError(f"at most {limits.videos} videos are read at once, and {limits.images} pictures in one chat")
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


def _map(service: Service, said: Conversation) -> Any:
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
