"""`/v1/files`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, File, Form, UploadFile

from lmm_jax.serve import schema
from lmm_jax.serve.files import FileStore

_PIECE = 1 << 20


def router(store: FileStore) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1/files")

    @routes.post("", summary="Upload a picture or a video.")
    async def upload(
        file: Annotated[UploadFile, File()], purpose: Annotated[str, Form(max_length=64)] = "user_data"
    ) -> schema.File:
        return await store.add((file.filename or "file")[:255], purpose, _pieces(file))

    @routes.get("", summary="All files.")
    async def files() -> schema.Files:
        return schema.Files(data=store.all())

    @routes.get("/{file_id}", summary="One file.")
    async def one(file_id: str) -> schema.File:
        return store.get(file_id).told

    @routes.delete("/{file_id}", summary="Delete a file.")
    async def delete(file_id: str) -> schema.Deleted:
        store.delete(file_id)
        return schema.Deleted(id=file_id)

    return routes


async def _pieces(file: UploadFile) -> AsyncIterator[bytes]:
    while piece := await file.read(_PIECE):
        yield piece
