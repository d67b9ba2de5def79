"""Response bodies as the OpenAPI document describes them; ``responses`` and ``about`` make them."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OllamaError(_Schema):
    """The body of every response that is not 2xx."""

    error: str


class _Ended(_Schema):
    model: str
    created_at: str
    done: bool
    done_reason: str
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    logprobs: list[dict[str, Any]] | None = None


class GeneratedText(_Ended):
    response: str
    thinking: str | None = None


class ChatMessageObject(_Schema):
    role: str
    content: str
    thinking: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatReply(_Ended):
    message: ChatMessageObject


class OllamaModel(_Schema):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: dict[str, Any]
    expires_at: str | None = None
    size_vram: int | None = None
    context_length: int | None = None


class OllamaModels(_Schema):
    models: list[OllamaModel]


class ShownModel(_Schema):
    modelfile: str
    parameters: str
    template: str
    modified_at: str
    details: dict[str, Any]
    model_info: dict[str, Any]
    capabilities: list[str]


class OllamaVersion(_Schema):
    version: str


class Embedded(_Schema):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int
