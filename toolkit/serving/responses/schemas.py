"""Response bodies as the OpenAPI document describes them; ``writer`` makes them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AlternativeLogprob(_Schema):
    token: str
    logprob: float
    bytes: list[int]


class OutputLogprob(AlternativeLogprob):
    sampling_logprob: float | None = None
    top_logprobs: list[AlternativeLogprob]


class OutputPart(_Schema):
    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[OutputLogprob] | None = None


class ResponseItem(_Schema):
    """A message, reasoning or a function call."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"] | None = None
    content: list[OutputPart] | None = None
    summary: list[Any] | None = None
    arguments: str | None = None
    call_id: str | None = None
    name: str | None = None


class CachedTokens(_Schema):
    cached_tokens: int


class ReasoningTokens(_Schema):
    reasoning_tokens: int


class ResponsesUsage(_Schema):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class IncompleteDetails(_Schema):
    reason: Literal["max_output_tokens"]


class ResponseObject(_Schema):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    completed_at: int | None
    background: Literal[False]
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[ResponseItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, str | None]
    level: Literal["default"] = Field(alias="service_tier")
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponsesUsage
