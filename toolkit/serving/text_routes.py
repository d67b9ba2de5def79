"""Texts and tokens: vLLM's ``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, llama.cpp's ``/apply-template``."""

import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from toolkit.engine.prompts import outside_vocabulary
from toolkit.sentences import shown
from toolkit.serving.base import Base
from toolkit.serving.body import Body
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.field_names import naming
from toolkit.serving.generation import Generation
from toolkit.serving.openai.messages import Message
from toolkit.serving.openai.requests import MAX_MESSAGES, ChatRequest, Conversation
from toolkit.serving.openapi import responses, takes
from toolkit.serving.parsing import parse
from toolkit.serving.texts import Texts
from toolkit.strict_json import strict_json

LOCAL = ("name_or_path", "local_files_only", "tokenizer_file", "vocab_file", "merges_file", "cache_dir")
"""Settings of a tokenizer that say where its files are."""


class TokenizeRequest(Conversation):
    """The body of ``POST /tokenize``: a ``prompt``, or ``messages``.

    Args:
        model: any of the served names.
        prompt: a text, as ``/v1/completions`` takes it.
        messages: of a chat, in the place of a prompt.
        add_special_tokens: whether those that the tokenizer puts around a text are there; None: around a prompt, for
            a chat template writes its own.
        return_token_strs: whether the response spells the tokens too.
    """

    other_names: ClassVar[Mapping[str, str]] = {"content": "prompt", "add_special": "add_special_tokens"}
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] = Field([], max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (not self.messages):
            state = "is required, or 'messages'" if self.prompt is None else "is given, and so is 'messages'; give one"
            raise ValueError(f"'prompt' {state}.")
        return self


class DetokenizeRequest(Body):
    """The body of ``POST /detokenize``.

    Args:
        model: any of the served names.
        tokens: token ids.
    """

    model: str | None = None
    tokens: list[int]


class TemplateRequest(ChatRequest):
    """The body of ``POST /apply-template``: that of a chat, of which only what its template reads is used."""


BODIES = (TokenizeRequest, DetokenizeRequest, TemplateRequest)
Given = TypeVar("Given", TokenizeRequest, DetokenizeRequest, TemplateRequest)


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Tokenized(_Schema):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Schema):
    prompt: str


class Templated(_Schema):
    prompt: str


class TokenizerInfo(BaseModel):
    """The tokenizer's settings; which there are depends on its class."""

    model_config = ConfigDict(extra="allow")
    tokenizer_class: str


def add_routes(generation: Generation) -> None:
    """Add the routes to the application of a model that generates."""
    texts = generation.texts

    def tokens_of(text: str, special: bool) -> list[int]:
        return texts.prompt(text, True, special)

    add_text_routes(generation.base, texts, tokens_of)


def add_text_routes(base: Base, texts: Texts, tokens_of: Callable[[str, bool], list[int]]) -> None:
    """Add the routes to the application of any model.

    Args:
        base: the application.
        texts: the tokenizer's part.
        tokens_of: the tokens that the model gets of a text, with or without special tokens around it. Of any length.
    """
    app, guarded, config = base.app, base.guarded, base.config

    def tokenize(asked: TokenizeRequest) -> Json:
        special = asked.prompt is not None if asked.add_special_tokens is None else asked.add_special_tokens
        if asked.prompt is not None:
            tokens = tokens_of(asked.prompt, special)
        elif any(message.images for message in asked.messages):
            found: Any = texts.chat(asked.messages, **asked.template_options())
            tokens = [int(token) for token in found["input_ids"][0]]
        else:
            tokens = tokens_of(texts.chat_text(asked.messages, True, **asked.template_options()), special)
        strings = texts.raw_tokens(tokens) if asked.return_token_strs else None
        return {
            "count": len(tokens), "max_model_len": config.max_model_len, "tokens": tokens, "token_strs": strings,
        }  # fmt: skip

    def detokenize(asked: DetokenizeRequest) -> Json:
        size = config.vocab_size or 2**63
        wrong = outside_vocabulary(asked.tokens, size)
        if wrong is not None:
            message = f"'tokens' must have token ids from 0 to {size - 1}, got {shown(wrong)}."
            raise RequestError(message, "tokens")
        return {"prompt": texts.text_of(asked.tokens)}

    def apply_template(asked: TemplateRequest) -> Json:
        needed = asked.choice.mode != "none"
        return {"prompt": texts.chat_text(asked.messages, True, tools_needed=needed, **asked.template_options())}

    def add(path: str, make: Callable[[Given], Json], body: type[Given], response: type[BaseModel]) -> None:
        def read(raw: bytes) -> Json:
            asked = parse(body, raw)
            base.check_model(asked.model)
            with naming(asked.field_names):
                return make(asked)

        @app.post(
            path, dependencies=guarded, responses=responses(response), openapi_extra=takes(body),
            operation_id=path.strip("/").replace("-", "_"),
        )  # fmt: skip
        async def route(request: Request) -> Response:
            found = await base.read(request, read)
            content = await base.on_thread(lambda: strict_json(found, ensure_ascii=False, separators=(",", ":")))
            return Response(content, media_type="application/json")

    add("/tokenize", tokenize, TokenizeRequest, Tokenized)
    add("/detokenize", detokenize, DetokenizeRequest, Detokenized)
    add("/apply-template", apply_template, TemplateRequest, Templated)

    @app.get("/tokenizer_info", dependencies=guarded, responses=responses(TokenizerInfo))
    async def tokenizer_info() -> Json:
        if config.tokenizer is None:
            raise RequestError("The served model has no tokenizer.", status=404)
        return tokenizer_settings(config.tokenizer)


def tokenizer_settings(tokenizer: Any) -> Json:
    """What ``tokenizer_config.json`` has of a tokenizer, without where its files are."""
    given = {**getattr(tokenizer, "init_kwargs", {}), "chat_template": getattr(tokenizer, "chat_template", None)}
    found = {name: _plain(value) for name, value in given.items() if name not in LOCAL and not name.startswith("_")}
    kept = {name: value for name, value in found.items() if value is not None}
    return {**kept, "tokenizer_class": type(tokenizer).__name__}


def _plain(value: Any) -> Any:
    """A setting as JSON; an added token as its text, None for what is nothing of the kind."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    content = getattr(value, "content", value)
    try:
        json.dumps(content, allow_nan=False)
    except (TypeError, ValueError):
        return None
    return content
