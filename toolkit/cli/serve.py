"""``toolkit serve``: an OpenAI-compatible server for one model."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from toolkit.cli.options import add_engine_options, add_model_options, load, make_engine
from toolkit.errors import ToolkitError

KEY_VARIABLE = "TOOLKIT_API_KEY"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("serve", help="answer OpenAI-style requests over HTTP")
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--name", help="the model's name in requests (default: the folder's)")
    parser.add_argument("--api-key", help=f"key that clients must send (default: ${KEY_VARIABLE}, or none)")
    parser.add_argument(
        "--max-queue", type=int, default=1024, metavar="N", help="sequences waiting or running (503 beyond)"
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
            raise ToolkitError(f"--{field.replace('_', '-')} is {value}; allowed are {low} to {high}.")
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


def _serve(args: argparse.Namespace, engine: Any, tokenizer: Any, listener: Any) -> int:
    from toolkit.serving.app import Served
    from toolkit.serving.runner import Runner
    from toolkit.serving.server import serve

    name = args.name or Path(args.model).resolve().name
    served = Served(
        name=name,
        runner=Runner(engine, args.max_queue),
        tokenizer=tokenizer,
        max_model_len=engine.max_model_len,
        vocab_size=engine.backend.vocab_size,
        api_key=args.api_key or os.environ.get(KEY_VARIABLE) or None,
    )
    host = f"[{args.host}]" if ":" in args.host else args.host
    port = listener.getsockname()[1]
    serve(
        served,
        listener,
        grace=args.grace,
        ready=lambda: print(f"serving {name} on http://{host}:{port}", flush=True),
    )
    if served.runner.failure is not None:
        print(f"toolkit: the engine had stopped: {served.runner.failure}", file=sys.stderr)
        return 1
    return 0
