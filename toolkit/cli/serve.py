"""``toolkit serve``: an OpenAI-compatible server for one model."""

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.cli.options import add_engine_options, add_model_options, load, make_engine
from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from toolkit.engine import Engine

KEY_VARIABLE = "TOOLKIT_API_KEY"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("serve", help="serve a model over an OpenAI-compatible HTTP API")
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="the model's name in requests (default: the folder's)"
    )
    parser.add_argument("--api-key", help=f"key that clients must send (default: ${KEY_VARIABLE}, or none)")
    parser.add_argument(
        "--max-queue", type=int, default=1024, metavar="N", help="most sequences that wait or run (503 beyond)"
    )
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="seconds for running requests at shutdown"
    )
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; 0 after a clean shutdown, 1 when the engine failed."""
    for field, low, high in (("port", 0, 65535), ("max_queue", 1, 2**31), ("grace", 0, 86400)):
        value = getattr(args, field)
        if not low <= value <= high:
            raise ToolkitError(f"--{field.replace('_', '-')} must be >= {low} and <= {high}, got {value}.")
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ToolkitError(f"Serving needs the package '{error.name}'; install train-infer-toolkit[serve].") from None

    from toolkit.serving.server import listen

    # Bound first: a port that is taken is known before the model is read.
    with listen(args.host, args.port) as listener:
        model, tokenizer = load(args)
        with make_engine(args, model, tokenizer) as engine:
            return _serve(args, engine, tokenizer, listener)


def _serve(args: argparse.Namespace, engine: "Engine", tokenizer: Any, listener: socket.socket) -> int:
    from toolkit.engine import AsyncEngine
    from toolkit.serving.app import ServerConfig
    from toolkit.serving.metrics import Metrics
    from toolkit.serving.server import serve

    name, metrics = args.served_model_name or Path(args.model).resolve().name, Metrics()
    config = ServerConfig(
        served_model_name=name,
        engine=AsyncEngine(engine, max_queued_seqs=args.max_queue, listener=metrics),
        metrics=metrics,
        tokenizer=tokenizer,
        max_model_len=engine.max_model_len,
        vocab_size=engine.vocab_size,
        api_key=args.api_key or os.environ.get(KEY_VARIABLE) or None,
    )
    host = f"[{args.host}]" if ":" in args.host else args.host
    port = listener.getsockname()[1]
    serve(
        config,
        listener,
        grace=args.grace,
        ready=lambda: print(f"serving {name} on http://{host}:{port}", flush=True),
    )
    config.engine.join()  # a step that outlasts the shutdown still uses the engine
    if config.engine.failure is not None:
        print(f"toolkit: the engine had stopped: {config.engine.failure}", file=sys.stderr)
        return 1
    return 0
