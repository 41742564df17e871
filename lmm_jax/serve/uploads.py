"""`/v1/files`."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile

from lmm_jax.serve import schema
from lmm_jax.serve.errors import ApiError
from lmm_jax.serve.files import FileStore

_PIECE = 1 << 20
# FastAPI's own form would take any number of files before this code is asked
_FIELDS = {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "maxLength": 64}}
_FORM = {"type": "object", "required": ["file"], "properties": _FIELDS}
_BODY = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}


def router(store: FileStore) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1/files")

    @routes.post("", summary="Upload a picture or a video.", openapi_extra={"requestBody": _BODY})
    async def upload(request: Request) -> schema.File:
        async with request.form(max_files=1, max_fields=4, max_part_size=1024) as form:
            file, purpose = form.get("file"), form.get("purpose", "user_data")
            if not isinstance(file, UploadFile):
                raise ApiError(400, "no file was sent: expected multipart/form-data with a file", param="file")
            if not isinstance(purpose, str) or len(purpose) > 64:
                raise ApiError(400, "the purpose is too long: expected at most 64 characters", param="purpose")
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
