"""``/v1/completions`` and ``/v1/chat/completions``."""

from fastapi import Request, Response

from toolkit.engine.prompts import check_num_sequences
from toolkit.serving.generation import Asked, Generation
from toolkit.serving.openai import schemas
from toolkit.serving.openai.forms import JsonSchemaFormat, ResponseFormat, StructuredOutputs
from toolkit.serving.openai.requests import (
    ChatRequest,
    CompletionRequest,
    ImagePart,
    ImageUrl,
    Message,
    StreamOptions,
    TextPart,
)
from toolkit.serving.openai.responses import ChatResponse, CompletionResponse
from toolkit.serving.openapi import responses, takes
from toolkit.serving.parsing import parse

BODIES = (
    CompletionRequest, ChatRequest, StreamOptions, Message, TextPart, ImagePart, ImageUrl, ResponseFormat,
    JsonSchemaFormat, StructuredOutputs,
)  # fmt: skip
"""Of requests, and what they are made of."""


def add_routes(generation: Generation) -> None:
    """Add the routes to the application of ``generation``."""
    base, texts, engine = generation.base, generation.texts, generation.engine
    model = base.names[0]

    def read_completion(raw: bytes) -> Asked:
        asked = parse(CompletionRequest, raw)
        base.check_model(asked.model)
        check_num_sequences(len(asked.prompt) * asked.n, engine.max_queued_seqs)
        cut = asked.truncate_prompt_tokens is not None
        prompts = [texts.prompt(prompt, cut) if isinstance(prompt, str) else prompt for prompt in asked.prompt]
        generation.check_tokens(prompts)
        writer = CompletionResponse(model, texts, asked, asked.logprobs)
        given = generation.sampling_params(asked.sampling(), prompts, asked.logprobs)
        return Asked(*given, asked.stream, writer)

    def read_chat(raw: bytes) -> Asked:
        asked = parse(ChatRequest, raw)
        base.check_model(asked.model)
        check_num_sequences(asked.n, engine.max_queued_seqs)
        prompts = [texts.chat(asked.messages, asked.truncate_prompt_tokens is not None)]
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        writer = ChatResponse(model, texts, asked, top)
        given = generation.sampling_params(asked.sampling(), prompts, top, max_tokens=None)
        return Asked(*given, asked.stream, writer)

    @base.app.post(
        "/v1/completions",
        dependencies=base.guarded,
        responses=responses(schemas.CompletionObject, stream=True),
        openapi_extra=takes(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        return await generation.respond(request, await base.read(request, read_completion))

    @base.app.post(
        "/v1/chat/completions",
        dependencies=base.guarded,
        responses=responses(schemas.ChatCompletionObject, stream=True),
        openapi_extra=takes(ChatRequest),
    )
    async def chat(request: Request) -> Response:
        return await generation.respond(request, await base.read(request, read_chat))
