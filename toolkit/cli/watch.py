"""``toolkit watch RUN``."""

import argparse
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``watch`` command."""
    parser = subparsers.add_parser(
        "watch",
        help="show a training run in a browser",
        description="Serve a page that shows a training run while it trains: curves, completions, blocks.",
    )
    parser.add_argument("folder", metavar="RUN", help="the run's folder, such as runs/grpo")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=6007, help="0 takes a free one (default: 6007)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; 0 then."""
    from toolkit.serving.watch.run import WatchedRun
    from toolkit.serving.watch.server import WatchServer, serve_until_signal

    server = WatchServer(WatchedRun(Path(args.folder)), args.host, args.port)
    serve_until_signal(server, lambda: print(f"watching {args.folder} on {server.url}", flush=True))
    return 0
