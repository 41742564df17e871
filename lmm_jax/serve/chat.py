"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.responses import Response

from lmm_jax.errors import UserError
from lmm_jax.inference.sampling import Sampling
from lmm_jax.serve import schema
from lmm_jax.serve.errors import ApiError, as_api_error
from lmm_jax.serve.service import NEW_TOKENS, Reply, Service, Wanted, random_seed


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post(
        "/v1/chat/completions",
        response_model=schema.ChatCompletion,
        summary="Answer a question about pictures and videos.",
        responses={200: {"content": {"text/event-stream": {}}, "description": "Answers, or a stream of their pieces."}},
    )
    async def complete(asked: schema.ChatRequest, request: Request) -> Response:
        wanted = want(asked, service)
        work = asyncio.ensure_future(_begin(service, asked, wanted))
        replies, length = await _unless_left(work, request)
        if asked.stream:
            return StreamingResponse(_stream(service, asked, replies, length), media_type="text/event-stream")
        gathered = asyncio.ensure_future(_all(replies))
        texts = await _unless_left(gathered, request)
        choices = [
            schema.Choice(index=n, message=schema.Message(content=text), finish_reason=reply.finish_reason)
            for n, (text, reply) in enumerate(zip(texts, replies))
        ]
        told = schema.ChatCompletion(
            model=service.name, choices=choices, usage=_usage(length, replies), timing=_timing(replies[0])
        )
        return Response(told.model_dump_json(), media_type="application/json")

    return routes


def want(asked: schema.ChatRequest, service: Service) -> Wanted:
    """What a client wants. Raises ApiError for what is not served."""
    limits = service.limits
    if asked.model not in (None, "", service.name):
        raise ApiError(
            404, f"there is no model {asked.model[:100]!r} here: use {service.name!r}", code="model_not_found", param="model"
        )
    tokens = asked.max_completion_tokens or asked.max_tokens
    for name, value, most in (("max_tokens", tokens or 1, limits.new_tokens), ("n", asked.n or 1, limits.choices)):
        if value > most:
            raise ApiError(400, f"{name} is {value}: at most {most} is served", param=name)
    sampling = Sampling(
        max_new_tokens=tokens or min(NEW_TOKENS, limits.new_tokens),
        temperature=asked.temperature or 0.0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(asked.top_k or 0, 0),
        seed=random_seed() if asked.seed is None else asked.seed % 2**31,
        ignore_eos=bool(asked.ignore_eos),
    )
    stops = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    return Wanted(sampling, stops, asked.n or 1, min(asked.timeout or limits.deadline, limits.deadline))


async def _begin(service: Service, asked: schema.ChatRequest, wanted: Wanted) -> tuple[list[Reply], int]:
    end = time.monotonic() + wanted.seconds
    videos_as = (asked.media_io_kwargs or schema.MediaKwargs()).video
    try:
        async with asyncio.timeout(wanted.seconds):
            prompt = await service.prompt(await service.media.conversation(asked.messages, videos_as))
    except TimeoutError:
        message = f"pictures and videos were not read within {wanted.seconds:g} seconds: give smaller ones"
        raise ApiError(400, message, code="deadline_exceeded") from None
    left = dataclasses.replace(wanted, seconds=max(end - time.monotonic(), 0.0))
    return service.replies(prompt, left), service.length(prompt)


async def _unless_left(work: asyncio.Future, request: Request) -> Any:
    """The result of work, which is given up when the client leaves."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(left())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ApiError(499, "the client left")
    finally:
        for task in (work, leaving):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await leaving


async def _all(replies: list[Reply]) -> list[str]:
    tasks = [asyncio.create_task(_text(r)) for r in replies]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _text(reply: Reply) -> str:
    async with contextlib.aclosing(reply.pieces()) as pieces:
        return "".join([piece async for piece in pieces])


async def _stream(service: Service, asked: schema.ChatRequest, replies: list[Reply], length: int) -> AsyncIterator[str]:
    """Server-sent events: pieces of all answers as they come."""
    name, created = schema.completion_id(), int(time.time())
    queue: asyncio.Queue[tuple[int, str | None | UserError]] = asyncio.Queue()

    def event(choices: list[schema.ChunkChoice], **fields: Any) -> str:
        chunk = schema.Chunk(id=name, created=created, model=service.name, choices=choices, **fields)
        return f"data: {chunk.model_dump_json(exclude_none=True)}\n\n"

    def piece(index: int, finish: str | None = None, **delta: str) -> str:
        return event([schema.ChunkChoice(index=index, delta=schema.Delta(**delta), finish_reason=finish)])

    async def read(index: int, reply: Reply) -> None:
        try:
            async with contextlib.aclosing(reply.pieces()) as texts:
                async for text in texts:
                    queue.put_nowait((index, text))
            queue.put_nowait((index, None))
        except UserError as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(read(index, reply)) for index, reply in enumerate(replies)]
    try:
        for index in range(len(replies)):
            yield piece(index, role="assistant", content="")
        left = len(replies)
        while left:
            index, text = await queue.get()
            if isinstance(text, UserError):
                yield f"data: {json.dumps(as_api_error(text).body)}\n\n"
                return
            left -= text is None
            yield piece(index, replies[index].finish_reason) if text is None else piece(index, content=text)
        if asked.stream_options and asked.stream_options.include_usage:
            yield event([], usage=_usage(length, replies), timing=_timing(replies[0]))
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()


def _usage(length: int, replies: list[Reply]) -> schema.Usage:
    new = sum(r.tokens for r in replies)
    return schema.Usage(prompt_tokens=length, completion_tokens=new, total_tokens=length + new)


def _timing(reply: Reply) -> schema.Timing:
    seconds = {name: round(getattr(reply, name), 4) for name in schema.Timing.model_fields}
    return schema.Timing(**seconds)
