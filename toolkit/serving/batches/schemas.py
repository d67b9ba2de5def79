"""OpenAI's objects of files and batches. What is None is left out of responses."""

from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import SkipJsonSchema

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]  # fmt: skip
ENDED = ("failed", "completed", "expired", "cancelled")


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FileObject(_Schema):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"
    expires_at: int | None = None


class FileList(_Schema):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str
    last_id: str
    has_more: bool


class FileDeleted(_Schema):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class BatchError(_Schema):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(_Schema):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(_Schema):
    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchObject(_Schema):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: dict[str, str] | None = None
    output_lifetime: SkipJsonSchema[int | None] = None
    """Seconds until its files expire, which OpenAI's object does not say."""


KEPT_INSIDE = {"output_lifetime"}
"""Fields of a batch that no response has."""


class BatchList(_Schema):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool
