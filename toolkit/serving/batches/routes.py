"""OpenAI's files and batches: ``/v1/files`` and ``/v1/batches``."""

from typing import Any, Literal

from fastapi import Request, Response
from fastapi.responses import FileResponse
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from toolkit.sentences import shown
from toolkit.serving.base import Base
from toolkit.serving.batches.jobs import Jobs
from toolkit.serving.batches.lines import ENDPOINTS
from toolkit.serving.batches.runner import BatchRunner
from toolkit.serving.batches.schemas import BatchList, BatchObject, FileDeleted, FileList, FileObject
from toolkit.serving.body import Body
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.openapi import responses, takes
from toolkit.serving.parsing import parse

MAX_FILE_SIZE = 200 * 2**20
"""Bytes of a file, as OpenAI has it."""
MAX_PAGE = 10_000
MAX_METADATA = 16
_COPIED = 2**20
_FORM: Json = {
    "type": "object",
    "properties": {"purpose": {"const": "batch"}, "file": {"type": "string", "format": "binary"}},
    "required": ["purpose", "file"],
}


_CONTENT: dict[int | str, Json] = {
    **responses(),
    200: {"description": "OK", "content": {"application/octet-stream": {}}},
}


class BatchRequest(Body):
    """The body of ``POST /v1/batches``.

    Args:
        input_file_id: of a file of requests, uploaded with the purpose "batch".
        endpoint: of all of them.
        completion_window: after which requests that are left are not made.
        metadata: kept with the batch.
    """

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(None, max_length=MAX_METADATA)


BODIES = (BatchRequest,)


def add_routes(base: Base) -> None:
    """Add the routes to an application of any model."""
    jobs = Jobs(BatchRunner(base.app, base.config), base.config.batch_folder)
    base.services.append(jobs.open)
    app, guarded = base.app, base.guarded

    @app.post(
        "/v1/files", dependencies=guarded, responses=responses(FileObject),
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
    )  # fmt: skip
    async def upload(request: Request) -> FileObject:
        _check_size(request)
        try:
            form = await request.form(max_files=1, max_fields=8)
        except HTTPException as error:
            raise RequestError(f"The request body must be multipart/form-data ({error.detail.rstrip('.')}).") from None
        try:
            unknown = next((name for name in form if name not in ("file", "purpose")), None)
            if unknown is not None:
                raise RequestError(f"Unknown field {shown(unknown)}; a file has 'file' and 'purpose'.", unknown)
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise RequestError("'file' must be a file.", "file")
            if purpose != "batch":
                raise RequestError(f"'purpose' must be 'batch', got {shown(purpose)}.", "purpose")
            with jobs.files.adding((file.filename or "upload.jsonl")[:255], "batch") as (identity, out):
                while part := await file.read(_COPIED):
                    await base.on_thread(out.write, part)
        finally:
            await form.close()
        return jobs.files.records.get(identity)

    @app.get("/v1/files", dependencies=guarded, responses=responses(FileList))
    async def list_files(
        request: Request, after: str | None = None, limit: str | None = None, order: str = "desc",
        purpose: str | None = None,
    ) -> Json:  # fmt: skip
        if order not in ("asc", "desc"):
            raise RequestError(f"'order' must be 'asc' or 'desc', got {shown(order)}.", "order")
        kept = jobs.files.records.page(
            after, _limit(limit, MAX_PAGE), order == "desc", lambda one: purpose in (None, one.purpose)
        )
        return _listed(*kept, {"first_id": "", "last_id": ""})

    @app.get("/v1/files/{identity}", dependencies=guarded, responses=responses(FileObject))
    async def show_file(identity: str) -> FileObject:
        return jobs.files.records.get(identity)

    @app.get("/v1/files/{identity}/content", dependencies=guarded, responses=_CONTENT, response_class=FileResponse)
    async def content(identity: str) -> Response:
        return FileResponse(jobs.files.path(identity), media_type="application/octet-stream")

    @app.delete("/v1/files/{identity}", dependencies=guarded, responses=responses(FileDeleted))
    async def delete(identity: str) -> FileDeleted:
        used = next((one for one in jobs.batches if one.input_file_id == identity and jobs.runs(one.id)), None)
        if used is not None:
            raise RequestError(f"A file must not be deleted while the batch {shown(used.id)} reads it.", status=409)
        jobs.files.remove(identity)
        return FileDeleted(id=identity)

    @app.post(
        "/v1/batches",
        dependencies=guarded,
        responses=responses(BatchObject),
        openapi_extra=takes(BatchRequest),
        response_model_exclude_none=True,
    )
    async def create(request: Request) -> BatchObject:
        asked = await base.read(request, lambda raw: parse(BatchRequest, raw))
        assert asked.endpoint in ENDPOINTS
        return jobs.create(asked.input_file_id, asked.endpoint, asked.metadata)

    @app.get("/v1/batches", dependencies=guarded, responses=responses(BatchList))
    async def list_batches(request: Request, after: str | None = None, limit: str | None = None) -> Json:
        return _listed(*jobs.batches.page(after, _limit(limit, 20)), {})

    @app.get(
        "/v1/batches/{identity}",
        dependencies=guarded,
        responses=responses(BatchObject),
        response_model_exclude_none=True,
    )
    async def show_batch(identity: str) -> BatchObject:
        return jobs.batches.get(identity)

    @app.post(
        "/v1/batches/{identity}/cancel",
        dependencies=guarded,
        responses=responses(BatchObject),
        response_model_exclude_none=True,
    )
    async def cancel(identity: str) -> BatchObject:
        return jobs.cancel(identity)


def _check_size(request: Request) -> None:
    length = request.headers.get("content-length", "")
    if not length.isdigit():
        raise RequestError("A file must come with a Content-Length.", status=411)
    if int(length) > MAX_FILE_SIZE + _COPIED:
        raise RequestError(f"A file must have <= {MAX_FILE_SIZE} bytes, got more.", "file", status=413)


def _limit(given: str | None, default: int) -> int:
    if given is None:
        return default
    plain = given.isascii() and given.isdigit() and len(given) <= len(str(MAX_PAGE))
    if not plain or not 1 <= int(given) <= MAX_PAGE:
        raise RequestError(f"'limit' must be an integer >= 1 and <= {MAX_PAGE}, got {shown(given)}.", "limit")
    return int(given)


def _listed(page: list[Any], more: bool, empty: Json) -> Json:
    """A page of objects; OpenAI's schemas have no nulls in them, and of files an empty page has ids too (``empty``)."""
    data = [one.model_dump(exclude_none=True) for one in page]
    ids = {"first_id": page[0].id, "last_id": page[-1].id} if page else empty
    return {"object": "list", "data": data, **ids, "has_more": more}
