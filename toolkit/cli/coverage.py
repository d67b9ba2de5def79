"""``toolkit coverage``: what a patch does to each architecture that transformers registers, on small random models."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.testing.coverage import Coverage


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("coverage", help="patch a small model of every architecture and measure what holds")
    parser.add_argument(
        "architectures", nargs="*", help="model types (default: one for each class that transformers registers)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that measure side by side (default 2)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 1 where an architecture is patched and wrong. Prints a Markdown table."""
    from toolkit.errors import ToolkitError, nearest
    from toolkit.testing.architectures import architectures, registered
    from toolkit.testing.coverage import measure_all

    known = list(registered())
    for name in args.architectures:
        if name not in known:
            raise ToolkitError(
                f"architecture is {name!r}; allowed are model types of transformers{nearest(name, known)}."
            )
    if args.workers < 1:
        raise ToolkitError(f"--workers is {args.workers}; allowed are 1 and more.")
    rows = measure_all(args.architectures or architectures(), args.workers)
    print("\n".join(report_lines(rows)))
    verdicts = [row.verdict for row in rows]
    print(f"\n{', '.join(f'{verdicts.count(name)} {name}' for name in ('covered', 'refused', 'wrong'))}")
    return int("wrong" in verdicts)


def report_lines(rows: "Sequence[Coverage]") -> list[str]:
    """A Markdown table, a row an architecture."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    def yes(value: bool | None) -> str:
        return "" if value is None else "yes" if value else "no"

    lines = [
        "| architecture | verdict | roles | probe | loss | gradient | greedy | differing | export | reason |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        roles = ", ".join(f"{count} {role}" for role, count in row.roles.items())
        differing = "" if row.differing is None else str(row.differing)
        reason = (row.reason or "; ".join(row.left_alone)).replace("|", "\\|")
        lines.append(
            f"| {row.model_type} | {row.verdict} | {roles} | {number(row.probe_error)} | {number(row.loss_error)} | "
            f"{number(row.gradient_error)} | {yes(row.generated)} | {differing} | {yes(row.exported)} | {reason} |"
        )
    return lines
