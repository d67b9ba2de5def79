"""OpenAI's files and batches: ``/v1/files`` and ``/v1/batches``."""

from typing import Any, Literal

from fastapi import Request, Response
from fastapi.responses import FileResponse
from pydantic import Field
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from toolkit.sentences import shown
from toolkit.serving.base import Base
from toolkit.serving.batches.jobs import Jobs
from toolkit.serving.batches.lines import ENDPOINTS
from toolkit.serving.batches.runner import BatchRunner
from toolkit.serving.batches.schemas import KEPT_INSIDE, BatchList, BatchObject, FileDeleted, FileList, FileObject
from toolkit.serving.body import Body
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.openapi import responses, takes
from toolkit.serving.parsing import parse

MAX_FILE_SIZE = 200 * 2**20
"""Bytes of a file, as OpenAI has it."""
MAX_PAGE = 10_000
MAX_METADATA = 16
MIN_LIFETIME, MAX_LIFETIME = 3600, 30 * 24 * 3600
"""Seconds until a file expires, as OpenAI has it."""
_COPIED = 2**20
EXPIRES = ("expires_after[anchor]", "expires_after[seconds]")
"""Fields of a form, as clients flatten the object."""
_FORM: Json = {
    "type": "object",
    "properties": {
        "purpose": {"const": "batch"},
        "file": {"type": "string", "format": "binary"},
        EXPIRES[0]: {"const": "created_at"},
        EXPIRES[1]: {"type": "integer", "minimum": MIN_LIFETIME, "maximum": MAX_LIFETIME},
    },
    "required": ["purpose", "file"],
}


_CONTENT: dict[int | str, Json] = {
    **responses(),
    200: {"description": "OK", "content": {"application/octet-stream": {}}},
}


class ExpiresAfter(Body):
    """When a file is deleted.

    Args:
        anchor: what the time begins with: "created_at" of the file.
        seconds: from then on.
    """

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_LIFETIME, le=MAX_LIFETIME)


class BatchRequest(Body):
    """The body of ``POST /v1/batches``.

    Args:
        input_file_id: of a file of requests, uploaded with the purpose "batch".
        endpoint: of all of them.
        completion_window: after which requests that are left are not made.
        metadata: kept with the batch.
        output_expires_after: when its output and error files are deleted; null for never.
    """

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(None, max_length=MAX_METADATA)
    output_expires_after: ExpiresAfter | None = None


BODIES = (BatchRequest, ExpiresAfter)


def add_routes(base: Base) -> None:
    """Add the routes to an application of any model."""
    jobs = Jobs(BatchRunner(base.app, base.config), base.config.batch_folder)
    base.services.append(jobs.open)
    app, guarded = base.app, base.guarded

    @app.post(
        "/v1/files", dependencies=guarded, responses=responses(FileObject), response_model_exclude_none=True,
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
    )  # fmt: skip
    async def upload(request: Request) -> FileObject:
        _check_size(request)
        try:
            form = await request.form(max_files=1, max_fields=8)
        except HTTPException as error:
            raise RequestError(f"The request body must be multipart/form-data ({error.detail.rstrip('.')}).") from None
        try:
            unknown = next((name for name in form if name not in ("file", "purpose", *EXPIRES)), None)
            if unknown is not None:
                message = f"Unknown field {shown(unknown)}; a file has 'file', 'purpose' and 'expires_after'."
                raise RequestError(message, unknown)
            lifetime = _lifetime(form)
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise RequestError("'file' must be a file.", "file")
            if purpose != "batch":
                raise RequestError(f"'purpose' must be 'batch', got {shown(purpose)}.", "purpose")
            with jobs.files.adding((file.filename or "upload.jsonl")[:255], "batch", lifetime) as (identity, out):
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

    @app.get(
        "/v1/files/{identity}",
        dependencies=guarded,
        responses=responses(FileObject),
        response_model_exclude_none=True,
    )
    async def show_file(identity: str) -> FileObject:
        return jobs.files.records.get(identity)

    @app.get("/v1/files/{identity}/content", dependencies=guarded, responses=_CONTENT, response_class=FileResponse)
    async def content(identity: str) -> Response:
        return FileResponse(jobs.files.path(identity), media_type="application/octet-stream")

    @app.delete("/v1/files/{identity}", dependencies=guarded, responses=responses(FileDeleted))
    async def delete(identity: str) -> FileDeleted:
        used = jobs.reader(identity)
        if used is not None:
            raise RequestError(f"A file must not be deleted while the batch {shown(used.id)} reads it.", status=409)
        jobs.files.remove(identity)
        return FileDeleted(id=identity)

    @app.post(
        "/v1/batches",
        dependencies=guarded,
        responses=responses(BatchObject),
        response_model_exclude=KEPT_INSIDE,
        openapi_extra=takes(BatchRequest),
        response_model_exclude_none=True,
    )
    async def create(request: Request) -> BatchObject:
        asked = await base.read(request, lambda raw: parse(BatchRequest, raw))
        assert asked.endpoint in ENDPOINTS
        after = asked.output_expires_after
        lifetime = None if after is None else after.seconds
        return jobs.create(asked.input_file_id, asked.endpoint, asked.metadata, lifetime)

    @app.get("/v1/batches", dependencies=guarded, responses=responses(BatchList))
    async def list_batches(request: Request, after: str | None = None, limit: str | None = None) -> Json:
        return _listed(*jobs.batches.page(after, _limit(limit, 20)), {})

    @app.get(
        "/v1/batches/{identity}",
        dependencies=guarded,
        responses=responses(BatchObject),
        response_model_exclude=KEPT_INSIDE,
        response_model_exclude_none=True,
    )
    async def show_batch(identity: str) -> BatchObject:
        return jobs.batches.get(identity)

    @app.post(
        "/v1/batches/{identity}/cancel",
        dependencies=guarded,
        responses=responses(BatchObject),
        response_model_exclude=KEPT_INSIDE,
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


def _lifetime(form: FormData) -> int | None:
    """Seconds until an uploaded file expires. Raises RequestError."""
    given = {name: form[name] for name in EXPIRES if name in form}
    if not given:
        return None
    anchor, seconds = given.get(EXPIRES[0]), given.get(EXPIRES[1])
    if anchor != "created_at":
        raise RequestError(f"'{EXPIRES[0]}' must be 'created_at', got {shown(anchor)}.", EXPIRES[0])
    plain = isinstance(seconds, str) and seconds.isascii() and seconds.isdigit() and len(seconds) < 10
    if not plain or not MIN_LIFETIME <= int(str(seconds)) <= MAX_LIFETIME:
        message = f"'{EXPIRES[1]}' must be an integer >= {MIN_LIFETIME} and <= {MAX_LIFETIME}, got {shown(seconds)}."
        raise RequestError(message, EXPIRES[1])
    return int(str(seconds))


def _limit(given: str | None, default: int) -> int:
    if given is None:
        return default
    plain = given.isascii() and given.isdigit() and len(given) <= len(str(MAX_PAGE))
    if not plain or not 1 <= int(given) <= MAX_PAGE:
        raise RequestError(f"'limit' must be an integer >= 1 and <= {MAX_PAGE}, got {shown(given)}.", "limit")
    return int(given)


def _listed(page: list[Any], more: bool, empty: Json) -> Json:
    """A page of objects; OpenAI's schemas have no nulls in them, and of files an empty page has ids too (``empty``)."""
    data = [one.model_dump(exclude_none=True, exclude=KEPT_INSIDE) for one in page]
    ids = {"first_id": page[0].id, "last_id": page[-1].id} if page else empty
    return {"object": "list", "data": data, **ids, "has_more": more}
