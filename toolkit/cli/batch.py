"""``toolkit batch``: runs the requests of a file, as the batches of a server do, without one."""

import argparse
import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.cli.opened import add_served_options, opened
from toolkit.cli.options import runner_of
from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from toolkit.serving.base import ServerConfig


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("batch", help="run a file of requests, one per line, as OpenAI's batches have them")
    parser.add_argument("input", help="lines of {custom_id, method, url, body}")
    parser.add_argument("output", help="where responses go, as they come, and errors")
    add_served_options(parser, flag=True)
    parser.add_argument("--served-model-name", metavar="NAME", help="the model's name in requests (default: any)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 once every request has a response or an error; 1 when the engine failed."""
    source, target = Path(args.input), Path(args.output)
    if not source.is_file():
        raise ToolkitError(f"input must be a file, got '{args.input}'.")
    if not target.parent.is_dir():
        raise ToolkitError(f"output must be in a folder that exists, got '{args.output}'.")
    try:
        from toolkit.serving.batches.lines import check_file, names_of
    except ImportError as error:
        raise ToolkitError(f"Batches need the package '{error.name}'; install train-infer-toolkit[serve].") from None
    total, errors = check_file(source)
    if errors:
        first = errors[0]
        where = "" if first.line is None else f", line {first.line}"
        raise ToolkitError(f"input must be a file of requests, got '{args.input}'{where}: {first.message}")
    runner, settings = runner_of(args)
    names = [args.served_model_name] if args.served_model_name else [Path(args.model).resolve().name, *names_of(source)]
    from toolkit.engine import AsyncEngine
    from toolkit.engine.pooling import PoolingQueue
    from toolkit.serving.base import ServerConfig

    with opened(args, runner, settings) as (engine, served):
        queue: Any = PoolingQueue if runner == "pooling" else AsyncEngine
        return asyncio.run(_run(ServerConfig(names, queue(engine), **served), source, target, total))


async def _run(config: "ServerConfig", source: Path, target: Path, total: int) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from toolkit.serving.app import create_app
    from toolkit.serving.batches.files import written_aside
    from toolkit.serving.batches.lines import lines_of
    from toolkit.serving.batches.runner import BatchRunner, Counts

    app, counts = create_app(config), Counts()
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        file = stack.enter_context(written_aside(target))
        bar = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
        task = bar.add_task("requests", total=total)
        runner = BatchRunner(app, config)
        await runner.run(lines_of(source), file, file, counts, lambda line: bar.advance(task))
    print(f"{total} requests, {counts.failed} failed: {target}", file=sys.stderr, flush=True)
    if config.engine.failure is not None:
        print(f"toolkit: the engine had stopped: {config.engine.failure}", file=sys.stderr)
        return 1
    return 0
