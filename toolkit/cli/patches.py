"""``toolkit patches``: what a patch of a model would replace, with probe errors, and what it would skip and why."""

import argparse
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("patches", help="show what a patch of a model replaces and what it skips")
    parser.add_argument("model", nargs="?", help="checkpoint folder or training run")
    parser.add_argument("--random", metavar="FAMILY", help="a small random model instead")
    parser.add_argument("--numerics", choices=["bitwise", "fast"], default=None)
    parser.add_argument(
        "--roles",
        default=None,
        help="comma-separated roles; default (also without --roles): all that the model has but encoder_attention",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from toolkit.errors import ToolkitError
    from toolkit.patching import find_claims

    if (args.model is None) == (args.random is None):
        raise ToolkitError("patches needs either a model folder or --random FAMILY.")
    if args.random:
        from toolkit.testing.models import random_model

        model = random_model(args.random)
    else:
        from toolkit.loading import load_model

        model, _ = load_model(args.model)
    report = find_claims(model, args.roles.split(",") if args.roles else None, args.numerics)
    # A terminal folds long names at its width; a pipe or a file gets 160 columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title=f"{type(model).__name__}, {report.numerics} mode", title_justify="left")
    for column in ("role", "modules", "count", "becomes", "forward error", "backward error"):
        table.add_column(column, justify="right" if "error" in column or column == "count" else "left", overflow="fold")
    for row in report.rows():
        table.add_row(*row)
    console.print(table)
    if report.skipped:
        table = Table(title="skipped", title_justify="left")
        for column in ("role", "modules", "count", "why"):
            table.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
        for skipped in report.skipped_rows():
            table.add_row(*skipped)
        console.print(table)
    return 0
