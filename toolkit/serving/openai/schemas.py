"""Response bodies as the OpenAPI document describes them; ``responses`` makes them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(_Schema):
    cached_tokens: int


class CompletionTokensDetails(_Schema):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(_Schema):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class Logprobs(_Schema):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(_Schema):
    logprob: float
    rank: int | None
    decoded_token: str


class Choice(_Schema):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    sampling_logprobs: list[float] | None = None


class CompletionObject(_Schema):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    system_fingerprint: str
    usage: Usage


class TopLogprob(_Schema):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Schema):
    content: list[ChatLogprob]
    declined: None = Field(alias="refusal")


class FunctionCall(_Schema):
    name: str
    arguments: str


class AssistantToolCall(_Schema):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(_Schema):
    role: Literal["assistant"]
    content: str | None
    declined: None = Field(alias="refusal")
    tool_calls: list[AssistantToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChoice(_Schema):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"]
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    sampling_logprobs: list[float] | None = None


class ChatCompletionObject(_Schema):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str
    service_tier: Literal["default"] | None = None
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None


class ModelCard(_Schema):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    weight_version: int
    parent: str | None
    root: str | None


class ModelList(_Schema):
    object: Literal["list"]
    data: list[ModelCard]


class Health(_Schema):
    status: Literal["ok"]


class Load(_Schema):
    server_load: int


class Version(_Schema):
    version: str


class Error(_Schema):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(_Schema):
    """The body of every response that is not 2xx."""

    error: Error
