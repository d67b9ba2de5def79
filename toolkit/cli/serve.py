"""``toolkit serve``: an OpenAI-compatible server for one model."""

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.cli.live import add_live_options, check_live_options, live_training
from toolkit.cli.opened import add_served_options, opened
from toolkit.cli.operations import add_operation_options, operation_of
from toolkit.cli.options import runner_of
from toolkit.cli.ranks import Ranks, add_ranks_option, is_first_rank, ranks_of
from toolkit.errors import ToolkitError, first_line
from toolkit.machine import describe_cpus
from toolkit.sentences import shown

if TYPE_CHECKING:
    from toolkit.engine import AsyncEngine

KEY_VARIABLE = "TOOLKIT_API_KEY"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("serve", help="serve a model over an OpenAI-compatible HTTP API")
    add_served_options(parser)
    add_ranks_option(parser)
    _add_api_options(parser.add_argument_group("API"))
    _add_http_options(parser.add_argument_group("HTTP"))
    add_operation_options(parser.add_argument_group("operation"))
    add_live_options(parser.add_argument_group("training"))
    parser.set_defaults(run=run)


def _add_api_options(group: Any) -> None:
    group.add_argument(
        "--served-model-name",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="names of the model in requests; responses give the first (default: the folder's)",
    )
    group.add_argument(
        "--api-key",
        nargs="+",
        action="extend",
        metavar="KEY",
        help=f"keys, of which clients must send one (default: ${KEY_VARIABLE}, or none)",
    )
    group.add_argument(
        "--lora-modules",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FOLDER",
        help="PEFT adapters, LoRA or DoRA, which requests name as their model",
    )
    group.add_argument("--enable-lora", action="store_true", help="accepted and unused: adapters may always come")
    group.add_argument("--max-lora-rank", metavar="N", help="accepted and unused: adapters may have any rank")
    group.add_argument("--chat-template", metavar="FILE", help="a Jinja file, or the template itself")
    group.add_argument(
        "--tool-call-parser",
        "--tool-parser",
        default="auto",
        metavar="NAME",
        help="how tool calls are read, such as hermes (default: auto, by the chat template; none reads none)",
    )
    group.add_argument(
        "--reasoning-parser",
        "--reasoning",
        default="auto",
        metavar="NAME",
        help="how reasoning is read, such as qwen3 (default: auto, by the chat template; none reads none)",
    )
    group.add_argument("--enable-auto-tool-choice", action="store_true", help="accepted and not needed")
    group.add_argument(
        "--allowed-local-media-path",
        metavar="FOLDER",
        help="whose files requests may name as images (file://; default: data URLs alone)",
    )
    group.add_argument(
        "--max-queue", type=int, default=1024, metavar="N", help="most sequences that wait or run (503 beyond)"
    )
    group.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="seconds for running requests at shutdown"
    )
    group.add_argument(
        "--payload-limit",
        type=int,
        default=4 * 2**20,
        metavar="N",
        help="most bytes of a request's body (default: 4194304)",
    )
    group.add_argument(
        "--batch-folder", metavar="FOLDER", help="where files and batches are kept (default: a temporary one)"
    )
    group.add_argument("--disable-page", action="store_true", help="serve no page for browsers at /")
    group.add_argument("--watch", metavar="RUN", help="the folder of a training run that /watch shows beside the page")
    group.add_argument("--disable-fastapi-docs", action="store_true", help="serve no /docs and no /openapi.json")


def _add_http_options(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1")
    group.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    group.add_argument("--uds", metavar="PATH", help="a Unix domain socket, in the place of host and port")
    group.add_argument("--root-path", default="", metavar="PATH", help="where a proxy serves this")
    group.add_argument(
        "--timeout-keep-alive",
        type=float,
        default=75.0,
        metavar="S",
        help="seconds that an idle connection stays open (default: 75)",
    )
    for name, about in (
        ("origins", "web pages that may use the server, such as https://chat.example.org, or '*' (default: none)"),
        ("methods", "methods that they may use (default: all)"),
        ("headers", "headers that they may send (default: all)"),
    ):
        option = f"--allowed-{name}"
        group.add_argument(option, nargs="+", action="extend", type=_list, metavar="X", help=f"{about}; words or JSON")
    group.add_argument("--allow-credentials", action="store_true", help="let web pages send cookies")
    group.add_argument("--ssl-certfile", metavar="FILE", help="certificate (PEM): HTTPS in the place of HTTP")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="its key (default: in the certificate's file)")
    group.add_argument("--ssl-ca-certs", metavar="FILE", help="authorities whose clients alone are let in")


def _list(text: str) -> list[str]:
    """vLLM takes a JSON list, a shell words; both are fine."""
    if not text.lstrip().startswith("["):
        return [text]
    try:
        items = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON list or words, got {shown(text)} ({error})") from None
    return [str(item) for item in items]


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; 0 after a clean shutdown, 1 when the engine failed."""
    for field, low, high in (
        ("port", 0, 65535),
        ("max_queue", 1, 2**31),
        ("payload_limit", 1, 2**31),
        ("grace", 0, 86400),
        ("timeout_keep_alive", 0, 86400),
    ):
        value = getattr(args, field)
        if not low <= value <= high:
            raise ToolkitError(f"--{field.replace('_', '-')} must be >= {low} and <= {high}, got {value}.")
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ToolkitError(f"Serving needs the package '{error.name}'; install train-infer-toolkit[serve].") from None

    from toolkit.serving.server import HttpOptions, listen, listen_unix
    from toolkit.serving.watch.run import WatchedRun

    if args.watch and args.disable_page:
        raise ToolkitError(f"--watch must be left out with --disable-page, got {shown(args.watch)}.")
    args.watch = None if args.watch is None else WatchedRun(Path(args.watch))
    options = {name: getattr(args, name) for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")}
    http = HttpOptions(timeout_keep_alive=args.timeout_keep_alive, **options)
    lora_modules(args.lora_modules)
    _access(args)  # what is wrong with the options is known before the model is read, and so is a port that is taken
    args.operation = operation_of(args)
    template = _chat_template(args.chat_template)
    from toolkit.chat.reply import reading_of

    reading_of(None, None, args.tool_call_parser, args.reasoning_parser)
    if args.allowed_local_media_path is not None and not Path(args.allowed_local_media_path).is_dir():
        given = shown(args.allowed_local_media_path)
        raise ToolkitError(f"--allowed-local-media-path must be a folder, got {given}.")
    if not is_first_rank():
        with _opened(args, template) as (_, engine, _served):
            ranks: Ranks = args.ranks
            return ranks.follow(engine)
    with listen_unix(args.uds) if args.uds else listen(args.host, args.port) as listener:
        try:
            with _opened(args, template) as (runner, engine, served):
                serve = _serve_pooling if runner == "pooling" else _serve
                return serve(args, engine, served, listener, http)
        finally:
            if args.uds:
                Path(args.uds).unlink(missing_ok=True)


@contextmanager
def _opened(args: argparse.Namespace, template: str | None) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The runner, and what ``opened`` gives; ``args.ranks`` are the processes of the model, None for one."""
    runner, settings = runner_of(args)
    check_live_options(args, runner)
    with ranks_of(args, runner) as args.ranks, opened(args, runner, settings, template) as (engine, served):
        yield runner, engine, served


def _access(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``ServerConfig``: who may use the server."""
    from toolkit.serving.access import ApiKeys, Cors

    of_environment = os.environ.get(KEY_VARIABLE)
    keys = args.api_key or ([of_environment] if of_environment else [])
    ApiKeys(keys)
    cors = None
    if args.allowed_origins:
        given = (args.allowed_origins, args.allowed_methods or [["*"]], args.allowed_headers or [["*"]])
        origins, methods, headers = (tuple(chain(*lists)) for lists in given)
        cors = Cors(origins, methods, headers, args.allow_credentials)
    elif args.allowed_methods or args.allowed_headers or args.allow_credentials:
        raise ToolkitError("--allowed-origins must be given with what web pages are allowed, got none.")
    return {"api_key": keys, "cors": cors}


def _chat_template(given: str | None) -> str | None:
    """The template that ``--chat-template`` names or is."""
    if given is None or any(mark in given for mark in ("{{", "{%", "\n")):
        return given
    try:
        return Path(given).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ToolkitError(f"--chat-template must be a file or a template, got {shown(given)} ({reason}).") from None


def lora_modules(given: list[str]) -> dict[str, str]:
    """Name and folder of each adapter, as vLLM's option gives them: NAME=FOLDER, or JSON with name and path."""
    found: dict[str, str] = {}
    for text in given:
        if text.lstrip().startswith("{"):
            try:
                module = json.loads(text)
                name, folder = str(module["name"]), str(module["path"])
            except (ValueError, KeyError):
                raise ToolkitError(f"--lora-modules must be JSON with name and path, got {shown(text)}.") from None
        else:
            name, _, folder = text.partition("=")
        if not name or not folder:
            raise ToolkitError(f"--lora-modules must be NAME=FOLDER, got {shown(text)}.")
        if name in found:
            raise ToolkitError(f"--lora-modules must have each name once, got {shown(name)} twice.")
        found[name] = folder
    return found


def _serve(args: argparse.Namespace, engine: Any, served: dict[str, Any], listener: socket.socket, http: Any) -> int:
    from toolkit.engine import AsyncEngine
    from toolkit.engine.memory_plan import describe_memory
    from toolkit.exporting import export
    from toolkit.loading import read_new_weights
    from toolkit.serving.metrics import Metrics

    metrics = Metrics()
    adapters = lora_modules(args.lora_modules)
    for name, folder in adapters.items():
        engine.load_adapter(name, folder)
    print(describe_memory(engine), file=sys.stderr, flush=True)
    running = AsyncEngine(engine, max_queued_seqs=args.max_queue, listener=metrics)
    if args.ranks is not None:
        _end_with_ranks(args.ranks, running, args.grace)
    with live_training(args, running, _names(args)) as live:
        return _run(
            args,
            listener,
            http,
            engine.backend.device.type,
            engine=running,
            metrics=metrics,
            media_folder=None if args.allowed_local_media_path is None else Path(args.allowed_local_media_path),
            lora_modules=adapters,
            read_weights=read_new_weights,
            export=export,
            tool_call_parser=args.tool_call_parser,
            reasoning_parser=args.reasoning_parser,
            live=live,
            **served,
        )


def _end_with_ranks(ranks: Ranks, running: "AsyncEngine", grace: float) -> None:
    """Let the server end when a rank does: at once, or after ``grace`` seconds where a step waits for it for ever."""

    def lost(sentence: str) -> None:
        leading: Any = running.engine
        leading.lost = sentence
        running.start()
        running.cancel(-1)  # the next call is the last
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace + 5)
        print(f"toolkit: {sentence}", file=sys.stderr, flush=True)
        os._exit(1)

    ranks.watch(lost)


def _names(args: argparse.Namespace) -> list[str]:
    """Public names of the model."""
    return args.served_model_name or [Path(args.model).resolve().name]


def _serve_pooling(
    args: argparse.Namespace, engine: Any, served: dict[str, Any], listener: socket.socket, http: Any
) -> int:
    from toolkit.engine.pooling import PoolingQueue
    from toolkit.loading import read_new_weights

    how = f", {engine.pooling_type} pooling" if engine.tasks[0] == "embed" else f", {engine.activation}"
    print(f"pooling: {engine.tasks[0]}{how}, {engine.max_model_len} tokens a sequence", file=sys.stderr, flush=True)
    return _run(
        args,
        listener,
        http,
        next(engine.model.parameters()).device.type,
        engine=PoolingQueue(engine, max_queued_seqs=args.max_queue),
        read_weights=read_new_weights,
        **served,
    )


def _run(args: argparse.Namespace, listener: socket.socket, http: Any, device: str, **what: Any) -> int:
    """Serve ``what``, arguments of ``ServerConfig``, on a ``device``; 1 when the engine failed."""
    import torch

    from toolkit.serving.app import ServerConfig
    from toolkit.serving.server import serve

    names = _names(args)
    access = {**_access(args), **args.operation}
    docs = not args.disable_fastapi_docs
    batch_folder = None if args.batch_folder is None else Path(args.batch_folder)
    config = ServerConfig(
        names,
        max_body_size=args.payload_limit,
        root_path=args.root_path,
        docs=docs,
        page=not args.disable_page,
        watch=args.watch,
        batch_folder=batch_folder,
        **access,
        **what,
    )
    where = _address(args, listener)
    if device == "cpu":
        print(f"cpu: {describe_cpus(torch.get_num_threads())}", file=sys.stderr, flush=True)
    serve(
        config, listener, grace=args.grace, http=http, ready=lambda: print(f"serving {names[0]} on {where}", flush=True)
    )
    config.engine.join()  # a step that outlasts the shutdown still uses the engine
    if config.engine.failure is not None:
        print(f"toolkit: the engine had stopped: {config.engine.failure}", file=sys.stderr)
        return 1
    return 0


def _address(args: argparse.Namespace, listener: socket.socket) -> str:
    if args.uds:
        return f"unix:{args.uds}"
    host = f"[{args.host}]" if ":" in args.host else args.host
    return f"{'https' if args.ssl_certfile else 'http'}://{host}:{listener.getsockname()[1]}"
