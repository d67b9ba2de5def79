"""The routes: ``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``, ``/health``, ``/ping``, ``/version`` and
``/metrics``, with ``/openapi.json`` and ``/docs``."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

import toolkit
from toolkit.engine import AsyncEngine, Completion, EngineUnavailable, RequestHandle, SamplingParams
from toolkit.engine.prompts import check_num_sequences, fit_max_tokens, outside_vocabulary, prompt_length
from toolkit.engine.request_handle import SHUTTING_DOWN
from toolkit.errors import ToolkitError
from toolkit.sentences import shown
from toolkit.serving import schemas
from toolkit.serving.access import ApiKeys, Cors
from toolkit.serving.limits import MAX_BODY_SIZE, SMALL_BODY, give_back_memory
from toolkit.serving.metrics import Metrics
from toolkit.serving.middleware import CountRequests, HeadAsGet, RequestIds
from toolkit.serving.openapi import describe, responses, takes
from toolkit.serving.protocol import ChatRequest, CompletionRequest, RequestError, Sampling, parse
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

WORKERS = 4
"""Threads that read requests."""
SHORT_RESPONSE = 1000
"""Log-probabilities in a response that is written on the event loop."""
READ_ON = 64 * 2**20
"""Bytes of a body beyond the limit that are read, and dropped: a client that is still sending reads no response."""
TRIM_DELAY = 1.0
"""Seconds after a large body or response until what it took is given back; by then nothing holds it."""
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
        max_body_size: most bytes of a request's body.
        processor: of chats with images; None takes none.
        media_folder: whose files requests may name as images (``file://``); None for none.
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
    max_body_size: int = MAX_BODY_SIZE
    processor: Any = None
    media_folder: Path | None = None
    default_sampling_params: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | Sequence[str] | None = None
    cors: Cors | None = None
    root_path: str = ""
    docs: bool = True

    @property
    def model_names(self) -> tuple[str, ...]:
        return (self.served_model_name,) if isinstance(self.served_model_name, str) else tuple(self.served_model_name)


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
    engine, metrics = config.engine, config.metrics
    texts = Texts(config.tokenizer, config.max_model_len, config.processor, config.media_folder)
    names, created = config.model_names, int(time.time())
    keys = ApiKeys([config.api_key] if isinstance(config.api_key, str) else config.api_key or ())
    watchers: set[asyncio.Task[None]] = set()  # the event loop does not hold them
    workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="request")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.shutdown, close_engine=False, timeout=STEP_TIMEOUT)
        workers.shutdown(wait=False, cancel_futures=True)

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
        for prompt in prompts:
            wrong = outside_vocabulary(prompt, config.vocab_size)
            if wrong is not None:
                message = f"'prompt' must have token ids from 0 to {config.vocab_size - 1}, got {shown(wrong)}."
                raise RequestError(message, "prompt")

    def sampling_params(
        asked: Sampling, prompts: Sequence[Any], logprobs: int | None, **defaults: Any
    ) -> list[SamplingParams]:
        given = asked.sampling()
        params = SamplingParams(**{**defaults, **config.default_sampling_params, **given}, logprobs=logprobs)
        longest = None if "max_tokens" in given else config.max_model_len
        return [params if longest is None else fit_max_tokens(params, prompt_length(one), longest) for one in prompts]

    def read_completion(raw: bytes) -> _Asked:
        asked = parse(CompletionRequest, raw)
        check_model(asked.model)
        check_num_sequences(len(asked.prompt) * asked.n, engine.max_queued_seqs)
        prompts = [texts.prompt(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompt]
        check_tokens(prompts)
        body = CompletionResponse(names[0], texts, asked.logprobs)
        return _Asked(asked, prompts, sampling_params(asked, prompts, asked.logprobs), body)

    def read_chat(raw: bytes) -> _Asked:
        asked = parse(ChatRequest, raw)
        check_model(asked.model)
        check_num_sequences(asked.n, engine.max_queued_seqs)
        prompts = [texts.chat(asked.messages)]
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        params = sampling_params(asked, prompts, top, max_tokens=None)
        return _Asked(asked, prompts, params, ChatResponse(names[0], texts, top))

    def trim() -> None:
        with suppress(RuntimeError):  # the server has ended
            workers.submit(give_back_memory)

    async def trim_soon() -> None:
        asyncio.get_running_loop().call_later(TRIM_DELAY, trim)

    async def read(request: Request, read_body: Callable[[bytes], _Asked]) -> _Asked:
        """The request, read on a thread: the event loop serves everybody else meanwhile."""
        raw = await _body(request, config.max_body_size)
        try:
            return await asyncio.get_running_loop().run_in_executor(workers, read_body, raw)
        finally:
            if len(raw) > SMALL_BODY:
                await trim_soon()

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
        return await respond(request, await read(request, read_completion))

    @app.post(
        "/v1/chat/completions",
        dependencies=guarded,
        responses=responses(schemas.ChatCompletionObject, stream=True),
        openapi_extra=takes(ChatRequest),
    )
    async def chat(request: Request) -> Response:
        return await respond(request, await read(request, read_chat))

    async def respond(request: Request, given: _Asked) -> Response:
        handle = engine.submit(given.prompts, given.params)
        await handle.wait_accepted()
        prompt_tokens = list(map(prompt_length, given.prompts))
        metrics.prompt_tokens.add(sum(prompt_tokens))
        watcher = asyncio.create_task(_cancel_on_disconnect(request, handle))
        watchers.add(watcher)
        watcher.add_done_callback(watchers.discard)
        if given.request.stream:
            events = _events(handle, prompt_tokens, given.request, given.body)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        finished = await _finished(handle, given.request.n)
        used = usage(sum(prompt_tokens), sum(len(one.token_ids) for one in finished))
        if given.body.top is None or used["completion_tokens"] * (1 + given.body.top) <= SHORT_RESPONSE:
            return Response(b"".join(given.body.written(finished, used)), media_type="application/json")
        # A plain iterator: its parts are made on threads.
        parts = given.body.written(finished, used)
        return StreamingResponse(parts, media_type="application/json", background=BackgroundTask(trim_soon))

    describe(app, names, config.max_model_len, config.vocab_size)
    return app


async def _finished(handle: RequestHandle, n: int) -> list[Completion]:
    finished: dict[int, Completion] = {}
    async for delta in handle:
        if delta.finished is not None:
            finished[delta.prompt_index * n + delta.index] = _without_error(delta.finished)
    return [finished[index] for index in sorted(finished)]


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


async def _body(request: Request, most: int) -> bytes:
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            body += chunk
        elif size > most + READ_ON:
            break
    if size > most:
        raise RequestError(f"The request body must have <= {most} bytes, got more.", status=413)
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
