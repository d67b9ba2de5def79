"""The routes: ``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``, ``/health``, ``/ping``, ``/version`` and
``/metrics``, with ``/openapi.json`` and ``/docs``."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

import toolkit
from toolkit.engine import AsyncEngine, Completion, EngineUnavailable, RequestHandle, SamplingParams
from toolkit.engine.prompts import fit_max_tokens
from toolkit.engine.request_handle import SHUTTING_DOWN
from toolkit.errors import ToolkitError
from toolkit.sentences import shown
from toolkit.serving import schemas
from toolkit.serving.access import ApiKeys, Cors
from toolkit.serving.metrics import Metrics
from toolkit.serving.middleware import CountRequests, HeadAsGet, RequestIds
from toolkit.serving.openapi import describe, responses, takes
from toolkit.serving.protocol import ChatRequest, CompletionRequest, RequestError, Sampling, parse
from toolkit.serving.responses import END_OF_STREAM, ChatResponse, CompletionResponse, Json, error_body, event, usage
from toolkit.serving.texts import Texts

MAX_BODY = 32 * 2**20
CLIENT_CLOSED_REQUEST = 499
"""The status, in metrics alone, of a client that left before its response; nginx' number."""

STEP_TIMEOUT = 10.0
"""Seconds that a shutdown waits for the step in progress."""


@dataclass(frozen=True)
class ServerConfig:
    """What is served, and to whom.

    Args:
        served_model_name: the model's public name, or several: requests may give any, responses give the first.
        engine: its engine, with ``metrics`` as listener.
        metrics: what ``/metrics`` shows.
        tokenizer: a Hugging Face tokenizer; None for prompts of token ids only.
        max_model_len: most tokens of prompt and completion together.
        vocab_size: bounds token ids; None checks none.
        default_sampling_params: of what a request does not say, such as a checkpoint's ``generation_config.json``.
        api_key: that clients must send, or several of which any is right; None for no key.
        cors: which web pages may use the server; None for none.
        root_path: under which a proxy serves it.
        docs: whether ``/docs`` and ``/openapi.json`` are served.
    """

    served_model_name: str | Sequence[str]
    engine: AsyncEngine
    metrics: Metrics = field(default_factory=Metrics)
    tokenizer: Any = None
    max_model_len: int | None = None
    vocab_size: int | None = None
    default_sampling_params: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | Sequence[str] | None = None
    cors: Cors | None = None
    root_path: str = ""
    docs: bool = True

    @property
    def model_names(self) -> tuple[str, ...]:
        return (self.served_model_name,) if isinstance(self.served_model_name, str) else tuple(self.served_model_name)


def create_app(config: ServerConfig) -> FastAPI:
    """The ASGI application. Its lifespan starts the engine's thread and ends it, and leaves the engine open."""
    engine, metrics, texts = config.engine, config.metrics, Texts(config.tokenizer)
    names, created = config.model_names, int(time.time())
    keys = ApiKeys([config.api_key] if isinstance(config.api_key, str) else config.api_key or ())
    watchers: set[asyncio.Task[None]] = set()  # the event loop does not hold them

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.shutdown, close_engine=False, timeout=STEP_TIMEOUT)

    app = FastAPI(
        title="toolkit",
        version=toolkit.__version__,
        lifespan=lifespan,
        docs_url="/docs" if config.docs else None,
        redoc_url="/redoc" if config.docs else None,
        openapi_url="/openapi.json" if config.docs else None,
    )
    app.root_path = config.root_path.rstrip("/")
    app.add_middleware(HeadAsGet)
    app.add_middleware(CountRequests, counter=metrics.http_requests)
    app.add_middleware(RequestIds)
    if config.cors is not None:
        app.add_middleware(CORSMiddleware, **asdict(config.cors), expose_headers=("x-request-id",))
    guarded = [Depends(keys.check)]

    @app.exception_handler(ToolkitError)
    async def rejected(request: Request, error: ToolkitError) -> JSONResponse:
        return _error_response(_as_request_error(error))

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        allow = _allowed(request)
        if allow and request.method == "OPTIONS":
            return Response(status_code=204, headers=allow)
        asked = f"{request.method} {shown(request.url.path)[1:-1]}"
        about = {404: f"There is no {asked}.", 405: f"{asked} is not allowed."}
        message = about.get(error.status_code, f"{error.detail}.")
        return _error_response(RequestError(message, status=error.status_code), allow)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # which goes nowhere

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _error_response(RequestError(f"The server failed: {type(error).__name__}.", status=500))

    def card(name: str) -> Json:
        about = {"id": name, "object": "model", "created": created, "owned_by": "toolkit"}
        return {**about, "max_model_len": config.max_model_len}

    def check_model(asked: str | None) -> None:
        if asked is not None and asked not in names:
            which = " or ".join(map(shown, names))
            message = f"'model' must be {which}, got {shown(asked)}."
            raise RequestError(message, "model", status=404, code="model_not_found")

    def check_tokens(prompts: list[list[int]]) -> None:
        if config.vocab_size is None:
            return
        wrong = [token for prompt in prompts for token in prompt if not 0 <= token < config.vocab_size]
        if wrong:
            message = f"'prompt' must have token ids from 0 to {config.vocab_size - 1}, got {shown(wrong[0])}."
            raise RequestError(message, "prompt")

    def sampling_params(
        asked: Sampling, prompts: list[list[int]], logprobs: int | None, **defaults: Any
    ) -> list[SamplingParams]:
        given = asked.sampling()
        params = SamplingParams(**{**defaults, **config.default_sampling_params, **given}, logprobs=logprobs)
        longest = None if "max_tokens" in given else config.max_model_len
        return [params if longest is None else fit_max_tokens(params, len(one), longest) for one in prompts]

    @app.get("/v1/models", dependencies=guarded, responses=responses(schemas.ModelList))
    async def models() -> Json:
        return {"object": "list", "data": [card(name) for name in names]}

    @app.get("/v1/models/{asked:path}", dependencies=guarded, responses=responses(schemas.ModelCard))
    async def model(asked: str) -> Json:
        check_model(asked)
        return card(asked)

    @app.get("/health", responses=responses(schemas.Health))
    async def health() -> JSONResponse:
        if engine.failure is not None:
            raise EngineUnavailable(f"The engine has stopped: {engine.failure}")
        if engine.draining:
            raise EngineUnavailable(SHUTTING_DOWN)
        return JSONResponse({"status": "ok"})

    app.get("/ping", responses=responses(schemas.Health))(health)
    app.post("/ping", responses=responses(schemas.Health))(health)

    @app.get("/version", responses=responses(schemas.Version))
    async def version() -> Json:
        return {"version": toolkit.__version__}

    @app.get("/metrics", response_class=PlainTextResponse, responses=responses(text=True))
    async def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics.render(engine.stats()), media_type="text/plain; version=0.0.4")

    @app.post(
        "/v1/completions",
        dependencies=guarded,
        responses=responses(schemas.CompletionObject, stream=True),
        openapi_extra=takes(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request))
        check_model(asked.model)
        prompts = [texts.prompt(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompt]
        check_tokens(prompts)
        params = sampling_params(asked, prompts, asked.logprobs)
        return await respond(request, asked, prompts, params, CompletionResponse(names[0], texts, asked.logprobs))

    @app.post(
        "/v1/chat/completions",
        dependencies=guarded,
        responses=responses(schemas.ChatCompletionObject, stream=True),
        openapi_extra=takes(ChatRequest),
    )
    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request))
        check_model(asked.model)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        prompts = [texts.chat(asked.messages)]
        params = sampling_params(asked, prompts, top, max_tokens=None)
        return await respond(request, asked, prompts, params, ChatResponse(names[0], texts, top))

    async def respond(
        request: Request,
        asked: Sampling,
        prompts: list[list[int]],
        params: list[SamplingParams],
        body: CompletionResponse,
    ) -> Response:
        handle = engine.submit(prompts, params)
        await handle.wait_accepted()
        prompt_tokens = list(map(len, prompts))
        metrics.prompt_tokens.add(sum(prompt_tokens))
        watcher = asyncio.create_task(_cancel_on_disconnect(request, handle))
        watchers.add(watcher)
        watcher.add_done_callback(watchers.discard)
        if asked.stream:
            events = _events(handle, prompt_tokens, asked, body)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        return JSONResponse(await _whole(handle, sum(prompt_tokens), asked.n, body))

    describe(app, names, config.max_model_len, config.vocab_size)
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
    handle: RequestHandle, prompt_tokens: list[int], asked: Sampling, body: CompletionResponse
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
        # A shutdown says so itself: what is cancelled otherwise has lost its client.
        status = CLIENT_CLOSED_REQUEST if completion.finish_reason == "cancelled" else 500
        raise RequestError(message, status=status, code=completion.finish_reason)
    return completion


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


_HEADERS = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}


def _error_response(error: RequestError, headers: Mapping[str, str] = {}) -> JSONResponse:
    every = {**_HEADERS.get(error.status, {}), **headers}
    return JSONResponse(error_body(str(error), error.status, error.param, error.code), error.status, every)


def _allowed(request: Request) -> dict[str, str]:
    """The ``Allow`` header of a path that exists (RFC 9110, 10.2.1): HEAD stands beside GET, OPTIONS beside all."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in routes for method in route.methods or ()}
    if not methods:
        return {}
    return {"allow": ", ".join(sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))}
