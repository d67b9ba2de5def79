"""The routes: ``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``, ``/health`` and ``/metrics``."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toolkit.engine.params import SamplingParams
from toolkit.errors import ToolkitError
from toolkit.sentences import shown
from toolkit.serving.metrics import Counter
from toolkit.serving.protocol import ChatRequest, CompletionRequest, RequestError, Sampling, parse
from toolkit.serving.responses import END_OF_STREAM, ChatAnswer, CompletionAnswer, error_body, event, usage
from toolkit.serving.runner import Runner, Ticket, Unavailable
from toolkit.serving.texts import Texts

MAX_BODY = 32 * 2**20
KNOWN_PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics")


@dataclass(frozen=True)
class Served:
    """What is served: the model's public name, its engine's runner and tokenizer, and who may ask."""

    name: str
    runner: Runner
    tokenizer: Any = None
    max_model_len: int | None = None
    vocab_size: int | None = None
    api_key: str | None = None


def create_app(served: Served) -> FastAPI:
    """The ASGI application. Its lifespan starts the runner's thread and closes it, not the engine itself."""
    runner, texts = served.runner, Texts(served.tokenizer)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runner.start()
        yield
        await asyncio.to_thread(runner.close)

    async def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if served.api_key and not hmac.compare_digest(given.encode(), served.api_key.encode()):
            raise RequestError("The API key is missing or wrong.", status=401, code="invalid_api_key")

    app = FastAPI(title="toolkit", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(CountRequests, counter=runner.metrics.requests)
    guarded = [Depends(check_key)]

    @app.exception_handler(ToolkitError)
    async def refused(request: Request, error: ToolkitError) -> JSONResponse:
        return _error_response(_as_request_error(error))

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> JSONResponse:
        asked = f"{request.method} {shown(request.url.path)[1:-1]}"
        about = {404: f"There is no {asked}.", 405: f"{asked} is not allowed."}
        return _error_response(RequestError(about.get(error.status_code, f"{error.detail}."), status=error.status_code))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _error_response(RequestError(f"The server failed: {type(error).__name__}.", status=500))

    def card() -> dict[str, Any]:
        about = {"id": served.name, "object": "model", "created": created, "owned_by": "toolkit"}
        return {**about, "max_model_len": served.max_model_len}

    def check_model(name: str | None) -> None:
        if name not in (None, served.name):
            message = f"'model' is {shown(name)}, but this server has only {shown(served.name)}."
            raise RequestError(message, "model", status=404, code="model_not_found")

    def check_tokens(prompts: list[list[int]]) -> None:
        if served.vocab_size is None:
            return
        wrong = [token for prompt in prompts for token in prompt if not 0 <= token < served.vocab_size]
        if wrong:
            allowed = f"allowed are 0 to {served.vocab_size - 1}"
            raise RequestError(f"'prompt' has the token id {shown(wrong[0])}; {allowed}.", "prompt")

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def model(name: str) -> dict[str, Any]:
        check_model(name)
        return card()

    @app.get("/health")
    async def health() -> JSONResponse:
        if runner.failure is not None:
            raise Unavailable(f"The engine has stopped: {runner.failure}")
        if runner.draining:
            raise Unavailable("The server is shutting down.")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(runner.metrics.render(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request))
        check_model(asked.model)
        prompts = [texts.prompt(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompt]
        check_tokens(prompts)
        params = _sampling_params(asked, asked.logprobs)
        return await answer(request, asked, prompts, params, CompletionAnswer(served.name, texts, asked.logprobs))

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request))
        check_model(asked.model)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        params = _sampling_params(asked, top, max_tokens=None)
        return await answer(request, asked, [texts.chat(asked.messages)], params, ChatAnswer(served.name, texts, top))

    async def answer(
        request: Request,
        asked: Sampling,
        prompts: list[list[int]],
        params: SamplingParams,
        shape: CompletionAnswer,
    ) -> Response:
        ticket = await runner.submit(prompts, params)
        ticket.watcher = asyncio.create_task(_cancel_on_disconnect(request, ticket))
        if asked.stream:
            events = _events(ticket, params.n, shape, asked.usage_in_stream)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        return JSONResponse(await _whole(ticket, params.n, shape))

    return app


async def _whole(ticket: Ticket, n: int, shape: CompletionAnswer) -> dict[str, Any]:
    finished: dict[int, Any] = {}
    async for prompt, delta in ticket.deltas():
        if delta.finished is not None:
            finished[prompt * n + delta.index] = _without_error(delta.finished)
    generated = sum(len(completion.token_ids) for completion in finished.values())
    choices = [shape.choice(index, finished[index]) for index in sorted(finished)]
    return shape.body(choices, usage(ticket.prompt_tokens, generated))


async def _events(ticket: Ticket, n: int, shape: CompletionAnswer, show_usage: bool) -> AsyncIterator[str]:
    generated = 0
    try:
        for opening in shape.openings(ticket.sequences):
            yield event(shape.piece([opening], show_usage=show_usage))
        async for prompt, delta in ticket.deltas():
            if delta.finished is not None:
                _without_error(delta.finished)
            generated += len(delta.token_ids)
            for choice in shape.deltas(prompt * n + delta.index, delta):
                yield event(shape.piece([choice], show_usage=show_usage))
        if show_usage:
            yield event(shape.piece([], usage(ticket.prompt_tokens, generated), show_usage=True))
        yield END_OF_STREAM
    except ToolkitError as error:
        refused = _as_request_error(error)
        yield event(error_body(str(refused), refused.status, refused.param, refused.code))
    finally:
        ticket.cancel()


async def _cancel_on_disconnect(request: Request, ticket: Ticket) -> None:
    """Ends with the answer too: servers report a completed response as a disconnect."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.cancel()


def _without_error(completion: Any) -> Any:
    """``completion``, or what the engine says went wrong with it as an exception."""
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
    """The engine's errors name their field first; that is the ``param`` of the answer."""
    if isinstance(error, RequestError):
        return error
    field = str(error).split()[0].strip("'")
    known = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    return RequestError(str(error), field if field in known else None)


def _error_response(error: RequestError) -> JSONResponse:
    headers = {"retry-after": "1"} if error.status == 503 else None
    return JSONResponse(error_body(str(error), error.status, error.param, error.code), error.status, headers)


class CountRequests:
    """ASGI middleware that counts answers by path and status, and lets streams pass through untouched."""

    def __init__(self, app: ASGIApp, counter: Counter):
        self.app, self.counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in KNOWN_PATHS else "other"
                self.counter.add(path=path, status=str(message["status"]))
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)
