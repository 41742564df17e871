"""All routes together: the ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from lmm_jax.errors import UserError
from lmm_jax.serve import chat, schema, uploads
from lmm_jax.serve.errors import ApiError, as_api_error, body
from lmm_jax.serve.guards import PAGE_FOLDER, Guard
from lmm_jax.serve.service import Service

_SWEEP_SECONDS = 15.0
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.Error, "description": text}
    for status, text in (
        (400, "What was sent cannot be used; the message says why."),
        (401, "The API key is missing or wrong."),
        (404, "There is no such model or file."),
        (413, "Larger than the server takes."),
        (429, "Too much at once: try again later."),
        (403, "Sent by a web page of another server."),
        (503, "The server is about to stop or has too little memory now."),
        (500, "The server or its device failed."),
    )
}


def create(service: Service, *, api_key: str | None = None, hosts: Sequence[str] = (), drain_seconds: float = 30.0) -> FastAPI:
    """The application.

    Args:
      service: ends with the application.
      api_key: that clients must send, if any.
      hosts: names by which pages may reach it, beside the one that they ask for.
      drain_seconds: after which what runs at the end is given up.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(service))
        yield
        sweeping.cancel()
        await asyncio.to_thread(service.close, drain_seconds)

    app = FastAPI(
        title="lmm-jax",
        version=metadata.version("lmm-jax"),
        description="Questions about pictures and videos, answered by LLaVA-Mini.",
        lifespan=lifespan,
        responses=_ERRORS,
    )
    guarded = {"limits": service.limits, "metrics": service.metrics, "folder": service.folder}
    app.add_middleware(Guard, **guarded, api_key=api_key, hosts=hosts)
    app.include_router(chat.router(service))
    app.include_router(uploads.router(service.media.store))
    _errors(app)

    @app.get("/v1/models", summary="The model that is served.")
    async def models() -> schema.Models:
        return schema.Models(data=[schema.Model(id=service.name, created=service.created)])

    @app.get("/v1/models/{name:path}", summary="The same.")
    async def model(name: str) -> schema.Model:
        if name != service.name:
            raise ApiError(404, f"there is no model {name[:100]!r} here", code="model_not_found")
        return schema.Model(id=service.name, created=service.created)

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def nothing(rest: str) -> None:
        raise ApiError(404, f"there is no /v1/{rest[:100]} for this method: /docs lists what there is")

    @app.get("/health", summary="Whether questions are answered.", responses={503: {"model": schema.Health}})
    async def health(response: Response) -> schema.Health:
        if not service.live.is_well:
            response.status_code = 503
            return schema.Health(status="failed")
        return schema.Health(status="ok")

    @app.get("/metrics", response_class=PlainTextResponse, summary="Figures for Prometheus.")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _sweep(service: Service) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        service.media.store.expire()
        _remove_cut_off(service)


def _remove_cut_off(service: Service) -> None:
    """Uploads by the page that were cut off: Gradio leaves them."""
    old = time.time() - 2 * service.limits.body_seconds
    for file in (service.folder / PAGE_FOLDER).glob("tmp*"):
        with contextlib.suppress(OSError):
            if file.is_file() and file.stat().st_mtime < old:
                file.unlink()


async def of_form(_: Request, error: RequestValidationError) -> JSONResponse:
    """The answer to a request that is not of a route's form."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return JSONResponse(body(400, f"{where or 'the request'}: {first['msg']}", "invalid_value", where or None), 400)


def _errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(UserError)
    async def of_user(_: Request, error: UserError) -> JSONResponse:
        told = as_api_error(error)
        return JSONResponse(told.body, told.status, told.headers)

    app.add_exception_handler(RequestValidationError, of_form)

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(body(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def of_ours(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(body(500, "the server failed; its log says why", "server_error"), 500)
