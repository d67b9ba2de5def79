"""The routes of a model that generates, beside those of every model: ``/v1/completions``, ``/v1/chat/completions``."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

from toolkit.engine import Completion, RequestHandle, SamplingParams
from toolkit.engine.pooling import PoolingQueue
from toolkit.engine.prompts import (
    check_num_sequences,
    fit_max_tokens,
    outside_vocabulary,
    prompt_length,
    truncated,
)
from toolkit.errors import ToolkitError
from toolkit.sentences import shown
from toolkit.serving import schemas
from toolkit.serving.base import CLIENT_CLOSED_REQUEST, Base, ServerConfig
from toolkit.serving.forms import JsonSchemaFormat, ResponseFormat, StructuredOutputs
from toolkit.serving.openapi import describe, responses, takes
from toolkit.serving.pooling import POOLING_PATHS, create_pooling_app
from toolkit.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    ImagePart,
    ImageUrl,
    Message,
    RequestError,
    Sampling,
    StreamOptions,
    TextPart,
    parse,
)
from toolkit.serving.responses import (
    END_OF_STREAM,
    ChatResponse,
    CompletionResponse,
    Json,
    error_body,
    event,
    usage,
)
from toolkit.serving.texts import Texts

__all__ = ["ServerConfig", "create_app"]

BODIES = (
    CompletionRequest, ChatRequest, StreamOptions, Message, TextPart, ImagePart, ImageUrl, ResponseFormat,
    JsonSchemaFormat, StructuredOutputs,
)  # fmt: skip
"""Of requests, and what they are made of."""
GENERATES = "The served model generates; serve a pooling model, or this one with --runner pooling."
SHORT_RESPONSE = 1000
"""Log-probabilities in a response that is written on the event loop."""


@dataclass(frozen=True)
class _Asked:
    """A request that may run: what it asks for, and what writes its response.

    Args:
        request: as it was read.
        prompts: token ids, or what a processor returned.
        params: of each prompt.
        body: writes the response.
    """

    request: Sampling
    prompts: Sequence[Any]
    params: list[SamplingParams]
    body: CompletionResponse


def create_app(config: ServerConfig) -> FastAPI:
    """The ASGI application. Its lifespan starts the engine's thread and ends it, and leaves the engine open."""
    if isinstance(config.engine, PoolingQueue):
        return create_pooling_app(config, config.engine)
    engine, metrics = config.engine, config.metrics
    base = Base(config, {*CompletionRequest.model_fields, *ChatRequest.model_fields})
    texts = Texts(config.tokenizer, config.max_model_len, config.processor, config.media_folder)
    names, app = base.names, base.app

    def check_tokens(prompts: list[list[int]]) -> None:
        if config.vocab_size is None:
            return
        for prompt in prompts:
            wrong = outside_vocabulary(prompt, config.vocab_size)
            if wrong is not None:
                message = f"'prompt' must have token ids from 0 to {config.vocab_size - 1}, got {shown(wrong)}."
                raise RequestError(message, "prompt")

    def sampling_params(
        asked: Sampling, prompts: Sequence[Any], logprobs: int | None, **defaults: Any
    ) -> tuple[Sequence[Any], list[SamplingParams]]:
        """The prompts, cut where that is asked for, and the parameters of each."""
        given = asked.sampling()
        params = SamplingParams(**{**defaults, **config.default_sampling_params, **given}, logprobs=logprobs)
        if params.form is not None:
            engine.engine.grammars.compile(params.form)  # here, where nobody else waits for it
        if params.truncate_prompt_tokens is not None:
            most = engine.engine.max_sequence_len
            prompts = [truncated(one, params, most) if isinstance(one, list) else one for one in prompts]
        longest = None if "max_tokens" in given else config.max_model_len
        fitting = [
            params if longest is None else fit_max_tokens(params, prompt_length(one), longest) for one in prompts
        ]
        return prompts, fitting

    def read_completion(raw: bytes) -> _Asked:
        asked = parse(CompletionRequest, raw)
        base.check_model(asked.model)
        check_num_sequences(len(asked.prompt) * asked.n, engine.max_queued_seqs)
        cut = asked.truncate_prompt_tokens is not None
        prompts = [texts.prompt(prompt, cut) if isinstance(prompt, str) else prompt for prompt in asked.prompt]
        check_tokens(prompts)
        body = CompletionResponse(names[0], texts, asked.logprobs, asked.prompt_logprobs)
        return _Asked(asked, *sampling_params(asked, prompts, asked.logprobs), body)

    def read_chat(raw: bytes) -> _Asked:
        asked = parse(ChatRequest, raw)
        base.check_model(asked.model)
        check_num_sequences(asked.n, engine.max_queued_seqs)
        prompts = [texts.chat(asked.messages, asked.truncate_prompt_tokens is not None)]
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        body = ChatResponse(names[0], texts, top, asked.prompt_logprobs)
        return _Asked(asked, *sampling_params(asked, prompts, top, max_tokens=None), body)

    @app.post(
        "/v1/completions",
        dependencies=base.guarded,
        responses=responses(schemas.CompletionObject, stream=True),
        openapi_extra=takes(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        return await respond(request, await base.read(request, read_completion))

    @app.post(
        "/v1/chat/completions",
        dependencies=base.guarded,
        responses=responses(schemas.ChatCompletionObject, stream=True),
        openapi_extra=takes(ChatRequest),
    )
    async def chat(request: Request) -> Response:
        return await respond(request, await base.read(request, read_chat))

    async def respond(request: Request, given: _Asked) -> Response:
        handle = engine.submit(given.prompts, given.params)
        await handle.wait_accepted()
        prompt_tokens = list(map(prompt_length, given.prompts))
        metrics.prompt_tokens.add(sum(prompt_tokens))
        base.watch(request, handle)
        if given.request.stream:
            events = _events(base, handle, prompt_tokens, given.request, given.body)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        finished = await _finished(handle, given.request.n)
        used = usage(sum(prompt_tokens), sum(len(one.token_ids) for one in finished))
        if given.body.num_logprobs(finished) <= SHORT_RESPONSE:
            return Response(b"".join(given.body.written(finished, used)), media_type="application/json")
        # A plain iterator: its parts are made on threads.
        parts = given.body.written(finished, used)
        return StreamingResponse(parts, media_type="application/json", background=BackgroundTask(base.trim_soon))

    base.add_refused(POOLING_PATHS, GENERATES)
    describe(app, names, config.max_model_len, config.vocab_size, BODIES)
    return app


async def _finished(handle: RequestHandle, n: int) -> list[Completion]:
    finished: dict[int, Completion] = {}
    async for delta in handle:
        if delta.finished is not None:
            finished[delta.prompt_index * n + delta.index] = _without_error(delta.finished)
    return [finished[index] for index in sorted(finished)]


async def _events(
    base: Base, handle: RequestHandle, prompt_tokens: list[int], asked: Sampling, body: CompletionResponse
) -> AsyncIterator[str]:
    n, generated = asked.n, [0] * handle.num_sequences

    def chunk(choice: Json) -> str:
        at = choice["index"]
        used = usage(prompt_tokens[at // n], generated[at]) if asked.usage_in_chunks else None
        return event(body.chunk([choice], used, show_usage=asked.usage_in_stream))

    try:
        for choice in body.role_chunks(handle.num_sequences):
            yield chunk(choice)
        async for delta in handle:
            if delta.finished is not None:
                _without_error(delta.finished)
            index = delta.prompt_index * n + delta.index
            generated[index] += len(delta.token_ids)
            for choice in body.deltas(index, delta):
                yield chunk(choice)
        if asked.usage_in_stream:
            yield event(body.chunk([], usage(sum(prompt_tokens), sum(generated)), show_usage=True))
        yield END_OF_STREAM
    except ToolkitError as error:
        rejected = base.as_request_error(error)
        yield event(error_body(str(rejected), rejected.status, rejected.param, rejected.code))
    finally:
        handle.cancel()


def _without_error(completion: Completion) -> Completion:
    """``completion``. Raises what the engine says went wrong with it."""
    if completion.finish_reason in ("error", "cancelled"):
        reason = completion.error or "it was cancelled"
        message = f"The request failed in the engine: {reason}"
        # A shutdown says so itself: what is cancelled otherwise has lost its client.
        status = CLIENT_CLOSED_REQUEST if completion.finish_reason == "cancelled" else 500
        raise RequestError(message, status=status, code=completion.finish_reason)
    return completion
