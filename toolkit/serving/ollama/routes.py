"""``/api/chat`` and ``/api/generate``, and the routes that say what is served."""

from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from toolkit.chat.reply import ReplyReading
from toolkit.engine.prompts import prompt_length
from toolkit.serving.chat_prompts import chat_prompt
from toolkit.serving.conversation import Chat
from toolkit.serving.errors import Json
from toolkit.serving.generation import Asked, Generation
from toolkit.serving.ollama import schemas
from toolkit.serving.ollama.about import add_about, check_name
from toolkit.serving.ollama.requests import (
    OllamaCall,
    OllamaCalledFunction,
    OllamaChatRequest,
    OllamaFunction,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaOptions,
    OllamaRequest,
    OllamaShowRequest,
    OllamaTool,
)
from toolkit.serving.ollama.responses import GenerateResponse, OllamaChatResponse, loaded
from toolkit.serving.openapi import responses, takes

BODIES = (
    OllamaChatRequest, OllamaGenerateRequest, OllamaShowRequest, OllamaMessage, OllamaOptions, OllamaTool,
    OllamaFunction, OllamaCall, OllamaCalledFunction,
)  # fmt: skip
"""Of requests, and what they are made of."""
LINES = "application/x-ndjson"


def add_routes(generation: Generation) -> None:
    """Add the routes to the application of ``generation``."""
    base, texts, longest = generation.base, generation.texts, generation.config.max_model_len
    reading = generation.replies.reading
    can = {"tools": reading.reads_calls, "thinking": reading.reads_reasoning, "vision": generation.config.processor}
    add_about(base, ["completion", *(name for name, is_so in can.items() if is_so)])

    def planned(asked: OllamaRequest, chat: Chat | None, prompt: Any, ends: list[int], writer: Any) -> Asked:
        given = asked.sampling() | check_name(base, asked.model).sampling
        if ends:
            given["stop_token_ids"] = ends
        if chat is None:
            parser = ReplyReading().parser("")
        else:
            plan = generation.replies.plan(prompt, chat.tools, chat.choice, given, chat.continued)
            given, parser = {**given, **plan.params}, plan.parser()
        if "max_tokens" in given and longest is not None:
            given["max_tokens"] = min(given["max_tokens"], max(1, longest - prompt_length(prompt)))
        prompts, params = generation.sampling_params(given, [prompt], asked.num_logprobs, max_tokens=None)
        written = writer(asked.model, texts, parser, asked.num_logprobs, asked.return_sampling_logprobs)
        return Asked(prompts, params, asked.stream, written, LINES)

    def only_loaded(asked: OllamaRequest, content: Json) -> Response:
        generation.sampling_params(asked.sampling(), [], None)  # checks them
        return JSONResponse(loaded(asked.model, content))

    def read_chat(asked: OllamaChatRequest) -> Asked | Response:
        check_name(base, asked.model)
        if not asked.messages:
            return only_loaded(asked, {"message": {"role": "assistant", "content": ""}})
        chat = asked.chat()
        return planned(asked, chat, chat_prompt(texts, chat), [], OllamaChatResponse)

    def read_generate(asked: OllamaGenerateRequest) -> Asked | Response:
        check_name(base, asked.model)
        if not (asked.prompt or asked.suffix or asked.images or asked.raw):
            return only_loaded(asked, {"response": ""})
        if asked.suffix:
            filled = texts.infill(asked.prompt, asked.suffix)
            return planned(asked, None, filled.token_ids, filled.stop_token_ids, GenerateResponse)
        if asked.raw:
            return planned(asked, None, texts.prompt(asked.prompt), [], GenerateResponse)
        chat = asked.chat()
        return planned(asked, chat, chat_prompt(texts, chat), [], GenerateResponse)

    async def respond(request: Request, read: Callable[[bytes], Asked | Response]) -> Response:
        given = await base.read(request, read)
        return given if isinstance(given, Response) else await generation.respond(request, given)

    chat = generation.reader(OllamaChatRequest, read_chat)
    generate = generation.reader(OllamaGenerateRequest, read_generate)

    @base.app.post(
        "/api/chat",
        dependencies=base.guarded,
        responses=responses(schemas.ChatReply, lines=True, error=schemas.OllamaError),
        openapi_extra=takes(OllamaChatRequest),
    )
    async def ollama_chat(request: Request) -> Response:
        return await respond(request, chat)

    @base.app.post(
        "/api/generate",
        dependencies=base.guarded,
        responses=responses(schemas.GeneratedText, lines=True, error=schemas.OllamaError),
        openapi_extra=takes(OllamaGenerateRequest),
    )
    async def ollama_generate(request: Request) -> Response:
        return await respond(request, generate)
