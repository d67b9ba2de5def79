"""Response bodies as the OpenAPI document describes them; ``responses`` makes them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Caller(_Schema):
    type: Literal["direct"]


class ReplyBlock(_Schema):
    """A block of text, of thoughts or of a tool call."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    citations: None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    caller: Caller | None = None


class MessageUsage(_Schema):
    input_tokens: int
    output_tokens: int
    cache_creation: None
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    inference_geo: None
    output_tokens_details: None
    server_tool_use: None
    level: Literal["standard"] = Field(alias="service_tier")


class MessageObject(_Schema):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ReplyBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    stop_details: None
    container: None
    usage: MessageUsage


class TokenCount(_Schema):
    input_tokens: int


class MessagesError(_Schema):
    type: Literal[
        "invalid_request_error", "authentication_error", "not_found_error", "request_too_large", "api_error",
        "overloaded_error",
    ]  # fmt: skip
    message: str


class MessagesErrorResponse(_Schema):
    """The body of every response that is not 2xx."""

    type: Literal["error"]
    error: MessagesError
    request_id: str
