"""The routes: ``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``, ``/health`` and ``/metrics``."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toolkit.engine import AsyncEngine, Completion, EngineUnavailable, RequestHandle, SamplingParams
from toolkit.engine.request_handle import SHUTTING_DOWN
from toolkit.errors import ToolkitError
from toolkit.sentences import shown
from toolkit.serving.metrics import Counter, Metrics
from toolkit.serving.protocol import ChatRequest, CompletionRequest, RequestError, Sampling, parse
from toolkit.serving.responses import END_OF_STREAM, ChatResponse, CompletionResponse, Json, error_body, event, usage
from toolkit.serving.texts import Texts

MAX_BODY = 32 * 2**20
KNOWN_PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics")


STEP_TIMEOUT = 10.0
"""Seconds that a shutdown waits for the step in progress."""


@dataclass(frozen=True)
class ServerConfig:
    """What is served, and to whom.

    Args:
        served_model_name: the model's public name.
        engine: its engine, with ``metrics`` as listener.
        metrics: what ``/metrics`` shows.
        tokenizer: a Hugging Face tokenizer; None for prompts of token ids only.
        max_model_len: shown by ``/v1/models``.
        vocab_size: bounds token ids; None checks none.
        api_key: that clients must send; None for no key.
    """

    served_model_name: str
    engine: AsyncEngine
    metrics: Metrics = field(default_factory=Metrics)
    tokenizer: Any = None
    max_model_len: int | None = None
    vocab_size: int | None = None
    api_key: str | None = None


def create_app(config: ServerConfig) -> FastAPI:
    """The ASGI application. Its lifespan starts the engine's thread and ends it, and leaves the engine open."""
    engine, metrics, texts = config.engine, config.metrics, Texts(config.tokenizer)
    name, created = config.served_model_name, int(time.time())
    watchers: set[asyncio.Task[None]] = set()  # the event loop does not hold them

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.shutdown, close_engine=False, timeout=STEP_TIMEOUT)

    async def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if config.api_key and not hmac.compare_digest(given.encode(), config.api_key.encode()):
            raise RequestError("The API key is missing or wrong.", status=401, code="invalid_api_key")

    app = FastAPI(title="toolkit", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(CountRequests, counter=metrics.http_requests)
    guarded = [Depends(check_key)]

    @app.exception_handler(ToolkitError)
    async def rejected(request: Request, error: ToolkitError) -> JSONResponse:
        return _error_response(_as_request_error(error))

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> JSONResponse:
        asked = f"{request.method} {shown(request.url.path)[1:-1]}"
        about = {404: f"There is no {asked}.", 405: f"{asked} is not allowed."}
        return _error_response(RequestError(about.get(error.status_code, f"{error.detail}."), status=error.status_code))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _error_response(RequestError(f"The server failed: {type(error).__name__}.", status=500))

    def card() -> Json:
        about = {"id": name, "object": "model", "created": created, "owned_by": "toolkit"}
        return {**about, "max_model_len": config.max_model_len}

    def check_model(asked: str | None) -> None:
        if asked not in (None, name):
            message = f"'model' must be {shown(name)}, got {shown(asked)}."
            raise RequestError(message, "model", status=404, code="model_not_found")

    def check_tokens(prompts: list[list[int]]) -> None:
        if config.vocab_size is None:
            return
        wrong = [token for prompt in prompts for token in prompt if not 0 <= token < config.vocab_size]
        if wrong:
            message = f"'prompt' must have token ids from 0 to {config.vocab_size - 1}, got {shown(wrong[0])}."
            raise RequestError(message, "prompt")

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> Json:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{asked:path}", dependencies=guarded)
    async def model(asked: str) -> Json:
        check_model(asked)
        return card()

    @app.get("/health")
    async def health() -> JSONResponse:
        if engine.failure is not None:
            raise EngineUnavailable(f"The engine has stopped: {engine.failure}")
        if engine.draining:
            raise EngineUnavailable(SHUTTING_DOWN)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics.render(engine.stats()), media_type="text/plain; version=0.0.4")

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request))
        check_model(asked.model)
        prompts = [texts.prompt(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompt]
        check_tokens(prompts)
        params = _sampling_params(asked, asked.logprobs)
        return await respond(
            request, asked, prompts, params, CompletionResponse(config.served_model_name, texts, asked.logprobs)
        )

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request))
        check_model(asked.model)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        params = _sampling_params(asked, top, max_tokens=None)
        return await respond(
            request, asked, [texts.chat(asked.messages)], params, ChatResponse(config.served_model_name, texts, top)
        )

    async def respond(
        request: Request,
        asked: Sampling,
        prompts: list[list[int]],
        params: SamplingParams,
        body: CompletionResponse,
    ) -> Response:
        handle = engine.submit(prompts, params)
        await handle.wait_accepted()
        num_prompt_tokens = sum(map(len, prompts))
        metrics.prompt_tokens.add(num_prompt_tokens)
        watcher = asyncio.create_task(_cancel_on_disconnect(request, handle))
        watchers.add(watcher)
        watcher.add_done_callback(watchers.discard)
        if asked.stream:
            events = _events(handle, num_prompt_tokens, params.n, body, asked.usage_in_stream)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        return JSONResponse(await _whole(handle, num_prompt_tokens, params.n, body))

    return app


async def _whole(handle: RequestHandle, num_prompt_tokens: int, n: int, body: CompletionResponse) -> Json:
    finished: dict[int, Completion] = {}
    async for delta in handle:
        if delta.finished is not None:
            finished[delta.prompt_index * n + delta.index] = _without_error(delta.finished)
    generated = sum(len(completion.token_ids) for completion in finished.values())
    choices = [body.choice(index, finished[index]) for index in sorted(finished)]
    return body.whole(choices, usage(num_prompt_tokens, generated))


async def _events(
    handle: RequestHandle, num_prompt_tokens: int, n: int, body: CompletionResponse, show_usage: bool
) -> AsyncIterator[str]:
    generated = 0
    try:
        for choice in body.role_chunks(handle.num_sequences):
            yield event(body.chunk([choice], show_usage=show_usage))
        async for delta in handle:
            if delta.finished is not None:
                _without_error(delta.finished)
            generated += len(delta.token_ids)
            for choice in body.deltas(delta.prompt_index * n + delta.index, delta):
                yield event(body.chunk([choice], show_usage=show_usage))
        if show_usage:
            yield event(body.chunk([], usage(num_prompt_tokens, generated), show_usage=True))
        yield END_OF_STREAM
    except ToolkitError as error:
        rejected = _as_request_error(error)
        yield event(error_body(str(rejected), rejected.status, rejected.param, rejected.code))
    finally:
        handle.cancel()


async def _cancel_on_disconnect(request: Request, handle: RequestHandle) -> None:
    """Ends with the response too: servers report a completed response as a disconnect."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    handle.cancel()


def _without_error(completion: Completion) -> Completion:
    """``completion``. Raises what the engine says went wrong with it."""
    if completion.finish_reason in ("error", "cancelled"):
        reason = completion.error or "it was cancelled"
        message = f"The request failed in the engine: {reason}"
        raise RequestError(message, status=500, code=completion.finish_reason)
    return completion


def _sampling_params(asked: Sampling, logprobs: int | None, **defaults: Any) -> SamplingParams:
    return SamplingParams(**{**defaults, **asked.sampling()}, logprobs=logprobs)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise RequestError(f"The request body is larger than {MAX_BODY} bytes.", status=413)
    return bytes(body)


def _as_request_error(error: ToolkitError) -> RequestError:
    """An error of the engine as a response. It names its field first; that is the ``param``."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineUnavailable):
        return RequestError(str(error), status=503, code="unavailable")
    field = str(error).split()[0].strip("'")
    known = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    return RequestError(str(error), field if field in known else None)


def _error_response(error: RequestError) -> JSONResponse:
    headers = {"retry-after": "1"} if error.status == 503 else None
    return JSONResponse(error_body(str(error), error.status, error.param, error.code), error.status, headers)


class CountRequests:
    """ASGI middleware that counts responses by path and status, and lets streams pass through untouched."""

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self.app, self.counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in KNOWN_PATHS else "other"
                self.counter.add(path=path, status=str(message["status"]))
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)
