"""``toolkit coverage``: what a patch does to each architecture that transformers registers, on small random models."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.testing.coverage import Row

PAGES = {"causal": "docs/coverage.md", "image-text": "docs/coverage-image-text.md"}
TITLES = {
    "causal": ("Architectures", "class of causal language model"),
    "image-text": ("Architectures of images and text", "class of models that read images and write text"),
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("coverage", help="patch a small model of every architecture and measure what holds")
    parser.add_argument(
        "architectures", nargs="*", help="model types (default: one for each class that transformers registers)"
    )
    parser.add_argument(
        "--kind", choices=list(PAGES), default="causal", help="causal language models (default), or image-text models"
    )
    parser.add_argument("--workers", type=int, default=2, help="number of processes (default 2)")
    parser.add_argument(
        "--write", metavar="FILE", help="also write the page to FILE (default docs/coverage*.md for all architectures)"
    )
    parser.add_argument("--export", action="store_true", help="measure which families each export target holds instead")
    parser.add_argument("--to", nargs="+", metavar="TARGET", help="targets of --export (default: all)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 1 where an architecture is patched and wrong. Prints a Markdown table."""
    if args.export:
        return export_matrix(args)

    from toolkit.errors import ToolkitError, nearest
    from toolkit.files import write_atomic
    from toolkit.testing.architectures import architectures, registered
    from toolkit.testing.coverage import Row, measure_all

    known = list(registered(args.kind))
    for name in args.architectures:
        if name not in known:
            hint = nearest(name, known) or "."
            raise ToolkitError(f"architecture must be a model type of transformers, got {name!r}{hint}")
    if args.workers < 1:
        raise ToolkitError(f"--workers must be >= 1, got {args.workers}.")
    names = args.architectures or architectures(args.kind)
    done: list[Row] = []

    def report(row: Row) -> None:
        done.append(row)
        print(f"{len(done)}/{len(names)} {row.model_type}: {row.verdict}, {row.seconds:.0f} s", file=sys.stderr)

    rows = measure_all(names, args.workers, on_row=report, kind=args.kind)
    print("\n".join(table(rows)))
    print(f"\n{totals(rows)}")
    path = args.write or (None if args.architectures else PAGES[args.kind])
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), page(rows, args.kind))
    return int(any(row.verdict == "wrong" for row in rows))


def export_matrix(args: argparse.Namespace) -> int:
    """Print a table of families and targets; exit status 1 where a lossless export generates other tokens."""
    from toolkit.errors import ToolkitError, must_be_one_of
    from toolkit.exporting import TARGETS
    from toolkit.testing.export_coverage import ALL, EXPORTED, columns, measure_exports

    for name in args.architectures:
        if name not in EXPORTED:
            raise ToolkitError(must_be_one_of("architecture", name, EXPORTED))
    targets = args.to or TARGETS.names()
    heads = [target if form is None else f"{target} {form}" for target, form in columns(targets)]
    cells = []
    for cell in measure_exports(args.architectures or EXPORTED, targets):
        cells.append(cell)
        print(f"{cell.family} to {cell.target} {cell.quantise or ''}: {cell.shown}", file=sys.stderr, flush=True)
    lines = [f"| family | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for start in range(0, len(cells), len(heads)):
        row = cells[start : start + len(heads)]
        lines.append(f"| {row[0].family} | {' | '.join(cell.shown for cell in row)} |")
    reasons = {cell.refused: None for cell in cells if cell.refused is not None}
    print("\n".join([*lines, "", *(f"- {reason}" for reason in reasons)]))
    return int(any(cell.lossless and cell.same not in (None, ALL) for cell in cells))


def totals(rows: "Sequence[Row]") -> str:
    verdicts = [row.verdict for row in rows]
    return ", ".join(f"{verdicts.count(name)} {name}" for name in ("covered", "unsupported", "wrong"))


PAGE = """# {title}

Written by `toolkit coverage{option}` with {packages}: one row per {what} that transformers
registers, measured on a small model with random float32 weights in bitwise mode on CPU.

| column | meaning | covered when |
|---|---|---|
| roles | modules patched, by role; a setting of the model as a whole counts as one | at least one |
| probe | largest relative error of the probes, of outputs and gradients | the probe passed |
{columns}

Covered: all of these hold; skipped modules are listed with the reason. Unsupported: nothing that was measured is wrong,
and the row says what could not be measured and why. Wrong: a number is out of its limit.

**{totals}.**

{table}
"""


def page(rows: "Sequence[Row]", kind: str = "causal") -> str:
    """The Markdown page of a run: what the columns mean, the totals and the table."""
    from importlib.metadata import version

    title, what = TITLES[kind]
    return PAGE.format(
        title=title,
        what=what,
        option="" if kind == "causal" else f" --kind {kind}",
        packages=", ".join(f"{name} {version(name)}" for name in ("transformers", "torch")),
        columns="\n".join(f"| {one.name} | {one.meaning} | {one.when} |" for one in rows[0].columns),
        totals=totals(rows),
        table="\n".join(table(rows)),
    )


def table(rows: "Sequence[Row]") -> list[str]:
    """A Markdown table, one row per architecture."""
    columns = rows[0].columns
    names = ["architecture", "verdict", "roles", "probe", *(column.name for column in columns), "reason"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        roles = ", ".join(f"{count} {role}" for role, count in row.roles.items())
        probe = "" if row.probe_error is None else f"{row.probe_error:.1e}"
        values = [column.shown(row.values.get(column.name)) for column in columns]
        reason = (row.reason or "; ".join(row.skipped)).replace("|", "\\|")
        lines.append(f"| {' | '.join([row.model_type, row.verdict, roles, probe, *values, reason])} |")
    return lines
