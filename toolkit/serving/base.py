"""What the routes of every served model share: errors, keys, reading, and ``/v1/models``, ``/health``, ``/metrics``."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import Depends, FastAPI, Request, Response, params
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

import toolkit
from toolkit.engine import AsyncEngine, EngineUnavailable
from toolkit.engine.fingerprint import numerics_fingerprint
from toolkit.engine.pooling import PoolingQueue
from toolkit.engine.request_handle import SHUTTING_DOWN
from toolkit.errors import ToolkitError
from toolkit.live import LiveTraining
from toolkit.sentences import shown
from toolkit.serving.access import AdminAccess, ApiKeys, Cors
from toolkit.serving.errors import ErrorStyle, Json, RequestError, error_body
from toolkit.serving.limits import MAX_BODY_SIZE, SMALL_BODY, give_back_memory
from toolkit.serving.metrics import Metrics
from toolkit.serving.middleware import REQUEST_ID_HEADERS, CountRequests, HeadAsGet, RequestIds
from toolkit.serving.numerics_check import NumericsCheck
from toolkit.serving.openai import schemas
from toolkit.serving.openapi import responses
from toolkit.serving.paths import meant_path
from toolkit.serving.request_log import JsonLog, LogRequests, record_of
from toolkit.serving.running import RunningRequests, request_id
from toolkit.serving.served_models import ServedModel, ServedModels
from toolkit.serving.watch.run import WatchedRun

WORKERS = 4
"""Threads that read requests."""
READ_ON = 64 * 2**20
"""Bytes of a body beyond the limit that are read, and dropped: a client that is still sending reads no response."""
TRIM_DELAY = 1.0
"""Seconds after a large body or response until what it took is given back; by then nothing holds it."""
CLIENT_CLOSED_REQUEST = 499
"""The status, in metrics alone, of a client that left before its response; nginx' number."""
STEP_TIMEOUT = 10.0
"""Seconds that a shutdown waits for the step in progress."""

Read = TypeVar("Read")


@dataclass(frozen=True)
class ServerConfig:
    """What is served, and to whom.

    Args:
        served_model_name: the model's public name, or several: requests may give any, responses give the first.
        engine: its engine, with ``metrics`` as listener; or the queue of a pooling model.
        metrics: what ``/metrics`` shows.
        tokenizer: a Hugging Face tokenizer; None for prompts of token ids only.
        max_model_len: most tokens of prompt and completion together.
        vocab_size: bounds token ids; None checks none.
        max_body_size: most bytes of a request's body.
        processor: of chats with images; None takes none.
        media_folder: whose files requests may name as images (``file://``); None for none.
        lora_modules: adapters that the engine has, and the folder of each; requests name them as their ``model``.
        default_sampling_params: of what a request does not say, such as a checkpoint's ``generation_config.json``.
        api_key: that clients must send, or several of which any is right; None for no key.
        cors: which web pages may use the server; None for none.
        root_path: under which a proxy serves it.
        tool_call_parser: how tool calls are read: a name of ``chat.reply.families``, "auto" or "none".
        reasoning_parser: how reasoning is read, in the same way.
        docs: whether ``/docs`` and ``/openapi.json`` are served.
        page: whether ``/`` is a page for browsers.
        watch: a training run that ``/watch`` shows; None for none.
        batch_folder: of files and batches; None for a temporary one.
        admin: who may use the admin endpoints.
        read_weights: (folder, model, what the request calls it) -> its state dict for the model; None updates none.
        export: (model, path, target, tokenizer, format) -> the folder it wrote; None exports nothing.
        max_requests_per_client: most unfinished sequences of a client; None for no bound.
        log: where each request is logged; None for nowhere.
        live: training on the engine, by Tinker's routes; None for none.
    """

    served_model_name: str | Sequence[str]
    engine: AsyncEngine | PoolingQueue
    metrics: Metrics = field(default_factory=Metrics)
    tokenizer: Any = None
    max_model_len: int | None = None
    vocab_size: int | None = None
    max_body_size: int = MAX_BODY_SIZE
    processor: Any = None
    media_folder: Path | None = None
    lora_modules: Mapping[str, str] = field(default_factory=dict)
    default_sampling_params: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | Sequence[str] | None = None
    cors: Cors | None = None
    root_path: str = ""
    docs: bool = True
    page: bool = True
    watch: WatchedRun | None = None
    batch_folder: Path | None = None
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    admin: AdminAccess = field(default_factory=AdminAccess)
    read_weights: Callable[[str, Any, str], Mapping[str, Any]] | None = None
    export: Callable[[Any, str, str, Any, str | None], Path] | None = None
    max_requests_per_client: int | None = None
    log: JsonLog | None = None
    live: LiveTraining | None = None

    @property
    def model_names(self) -> tuple[str, ...]:
        return (self.served_model_name,) if isinstance(self.served_model_name, str) else tuple(self.served_model_name)


class Cancellable(Protocol):
    """What a client that leaves gives up."""

    def cancel(self) -> Any: ...


class Base:
    """An application without the routes that run the model.

    Args:
        config: what is served.
        fields: of request bodies, which errors of the engine may be about.

    Attributes:
        app: the ASGI application. Its lifespan starts the engine's thread and ends it, and leaves the engine open.
        guarded: dependencies of routes that ask for a key.
        running: requests under way.
        numerics: refuses clients of other numerics.
        services: context managers that are entered when the application starts, and left before the engine ends.
    """

    def __init__(self, config: ServerConfig, fields: set[str]) -> None:
        self.config, self.engine, self.metrics = config, config.engine, config.metrics
        self.names = config.model_names
        self.models = ServedModels(self.names, config.lora_modules)
        self.fields = fields
        keys = ApiKeys([config.api_key] if isinstance(config.api_key, str) else config.api_key or ())
        backend = getattr(getattr(config.engine, "engine", None), "backend", None)
        self.numerics = NumericsCheck(None if backend is None else numerics_fingerprint(backend))
        self.guarded = [Depends(keys.check), Depends(self.numerics.check)]
        self.running = RunningRequests(config.max_requests_per_client, bool(keys))
        self._error_styles: dict[str, ErrorStyle] = {}
        self.services: list[Callable[[], AbstractAsyncContextManager[None]]] = []
        self._created = int(time.time())
        self._watchers: set[asyncio.Task[None]] = set()  # the event loop does not hold them
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="request")
        self.app = FastAPI(
            title="toolkit",
            version=toolkit.__version__,
            lifespan=self._lifespan,
            docs_url=None,  # FastAPI's page loads its scripts from elsewhere; page/routes.py has ours
            redoc_url=None,
            openapi_url="/openapi.json" if config.docs else None,
        )
        self.app.root_path = config.root_path.rstrip("/")
        self.app.add_middleware(HeadAsGet)
        self.app.add_middleware(CountRequests, counter=self.metrics.http_requests)
        if config.log is not None:
            self.app.add_middleware(LogRequests, log=config.log, by_key=bool(keys))
        self.app.add_middleware(RequestIds)
        if config.cors is not None:
            self.app.add_middleware(CORSMiddleware, **asdict(config.cors), expose_headers=REQUEST_ID_HEADERS)
        self._handle_errors()
        self._add_routes()

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        async with AsyncExitStack() as stack:
            for service in self.services:
                await stack.enter_async_context(service())
            yield
        await asyncio.to_thread(self.engine.shutdown, close_engine=False, timeout=STEP_TIMEOUT)
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _handle_errors(self) -> None:
        app = self.app

        @app.exception_handler(ToolkitError)
        async def rejected(request: Request, error: ToolkitError) -> JSONResponse:
            return self._error_response(request, self.as_request_error(error))

        @app.exception_handler(HTTPException)
        async def no_such_route(request: Request, error: HTTPException) -> Response:
            allow = _allowed(request)
            if allow and request.method == "OPTIONS":
                return Response(status_code=204, headers=allow)
            asked = f"{request.method} {shown(request.url.path)[1:-1]}"
            meant = meant_path(request) if error.status_code == 404 else None
            instead = f"; use {shown(meant)[1:-1]}" if meant else ""
            about = {404: f"There is no {asked}{instead}.", 405: f"{asked} is not allowed."}
            message = about.get(error.status_code, f"{error.detail}.")
            return self._error_response(request, RequestError(message, status=error.status_code), allow)

        @app.exception_handler(ClientDisconnect)
        async def left(request: Request, error: ClientDisconnect) -> Response:
            return Response(status_code=CLIENT_CLOSED_REQUEST)  # which goes nowhere

        @app.exception_handler(Exception)
        async def failed(request: Request, error: Exception) -> JSONResponse:
            message = f"The server failed: {type(error).__name__}."
            return self._error_response(request, RequestError(message, status=500))

    def add_error_style(self, path: str, style: ErrorStyle) -> None:
        """Errors of ``path``, and of paths below it, in the form of another protocol than OpenAI's."""
        self._error_styles[path] = style

    def _error_response(self, request: Request, error: RequestError, headers: Mapping[str, str] = {}) -> JSONResponse:
        every = {**_HEADERS.get(error.status, {}), **headers}
        path = request.scope["path"].removeprefix(self.app.root_path)
        for above, style in sorted(self._error_styles.items(), key=lambda one: -len(one[0])):
            if path == above or path.startswith(f"{above}/"):
                return JSONResponse(style(error, request_id(request)), error.status, every)
        return JSONResponse(error_body(str(error), error.status, error.param, error.code), error.status, every)

    def _add_routes(self) -> None:
        app, engine = self.app, self.engine

        def card(name: str) -> Json:
            about = {"id": name, "object": "model", "created": self._created, "owned_by": "toolkit"}
            about |= {"max_model_len": self.config.max_model_len, "weight_version": self.weight_version}
            return {**about, **self.models.relation(name)}

        @app.get("/v1/models", dependencies=self.guarded, responses=responses(schemas.ModelList))
        async def models() -> Json:
            return {"object": "list", "data": [card(name) for name in self.models.all]}

        @app.get("/v1/models/{asked:path}", dependencies=self.guarded, responses=responses(schemas.ModelCard))
        async def model(asked: str) -> Json:
            self.check_model(asked)
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

        @app.get("/load", responses=responses(schemas.Load))
        async def load() -> Json:
            return {"server_load": self.running.load}

        @app.get("/version", responses=responses(schemas.Version))
        async def version() -> Json:
            return {"version": toolkit.__version__}

        @app.get("/metrics", response_class=PlainTextResponse, responses=responses(text=True))
        async def show_metrics() -> PlainTextResponse:
            shown_metrics = self.metrics.render(engine.stats())
            return PlainTextResponse(shown_metrics, media_type="text/plain; version=0.0.4")

    def add_refused(self, paths: Sequence[str], message: str, guarded: list[params.Depends] | None = None) -> None:
        """Routes that this model does not serve, with the reason; ``guarded`` in the place of the dependencies."""

        async def refuse() -> Response:
            raise RequestError(message, "model")

        for path in paths:
            depends = self.guarded if guarded is None else guarded
            self.app.post(path, dependencies=depends, include_in_schema=False)(refuse)

    @property
    def weight_version(self) -> int:
        """Of the weights that are served."""
        return int(self.engine.stats().get("weight_version", 0))

    def check_model(self, asked: str | None) -> ServedModel:
        """What a request's ``model`` names. Raises RequestError for a name that nothing has."""
        return self.models.find(asked)

    async def on_thread(self, function: Callable[..., Read], *given: Any) -> Read:
        """``function`` of what is given, on a thread: the event loop serves everybody else meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *given)

    async def read(
        self, request: Request, read_body: Callable[[bytes], Read], decode: Callable[[bytes, str], bytes] | None = None
    ) -> Read:
        """The request, read on a thread.

        Args:
            read_body: reads a body.
            decode: (body, its content-encoding in lower case) -> the body before that; None refuses every encoding.
        """
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if decode is None and encoding != "identity":
            message = f"The request body must not be encoded, got the Content-Encoding {shown(encoding)}."
            raise RequestError(message, status=415)
        raw = await _body(request, self.config.max_body_size)
        record = record_of(request.scope)
        if record is not None:
            record.body = raw
        try:
            return await self.on_thread(lambda: read_body(raw if decode is None else decode(raw, encoding)))
        finally:
            if len(raw) > SMALL_BODY:
                await self.trim_soon()

    async def trim_soon(self) -> None:
        """Give memory back to the operating system when what was large is gone."""
        asyncio.get_running_loop().call_later(TRIM_DELAY, self._trim)

    def _trim(self) -> None:
        with suppress(RuntimeError):  # the server has ended
            self._workers.submit(give_back_memory)

    def watch(self, request: Request, running: Cancellable) -> None:
        """Cancel what runs for a client that leaves."""
        watcher = asyncio.create_task(_cancel_on_disconnect(request, running))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    def as_request_error(self, error: ToolkitError) -> RequestError:
        """An error of the engine as a response. It names its field first; that is the ``param``."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, EngineUnavailable):
            return RequestError(str(error), status=503, code="unavailable")
        field = str(error).split()[0].strip("'").partition(".")[0]
        return RequestError(str(error), field if field.partition("[")[0] in self.fields else None)


async def _cancel_on_disconnect(request: Request, running: Cancellable) -> None:
    """Ends with the response too: servers report a completed response as a disconnect."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    running.cancel()


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


_HEADERS = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}, 503: {"retry-after": "1"}}


def _allowed(request: Request) -> dict[str, str]:
    """The ``Allow`` header of a path that exists (RFC 9110, 10.2.1): HEAD stands beside GET, OPTIONS beside all."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in routes for method in route.methods or ()}
    if not methods:
        return {}
    return {"allow": ", ".join(sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))}
