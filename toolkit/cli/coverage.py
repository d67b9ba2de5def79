"""``toolkit coverage``: what a patch does to each architecture that transformers registers, on small random models."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.testing.coverage import Coverage


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("coverage", help="patch a small model of every architecture and measure what holds")
    parser.add_argument(
        "architectures", nargs="*", help="model types (default: one for each class that transformers registers)"
    )
    parser.add_argument("--workers", type=int, default=2, help="number of processes (default 2)")
    parser.add_argument(
        "--write", metavar="FILE", help="also write the page to FILE (default docs/coverage.md for all architectures)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 1 where an architecture is patched and wrong. Prints a Markdown table."""
    from toolkit.errors import ToolkitError, nearest
    from toolkit.testing.architectures import architectures, registered
    from toolkit.testing.coverage import Coverage, measure_all
    from toolkit.training.files import write_atomic

    known = list(registered())
    for name in args.architectures:
        if name not in known:
            hint = nearest(name, known) or "."
            raise ToolkitError(f"architecture must be a model type of transformers, got {name!r}{hint}")
    if args.workers < 1:
        raise ToolkitError(f"--workers must be >= 1, got {args.workers}.")
    names = args.architectures or architectures()
    done: list[Coverage] = []

    def report(row: Coverage) -> None:
        done.append(row)
        print(f"{len(done)}/{len(names)} {row.model_type}: {row.verdict}, {row.seconds:.0f} s", file=sys.stderr)

    rows = measure_all(names, args.workers, on_row=report)
    print("\n".join(table(rows)))
    print(f"\n{totals(rows)}")
    path = args.write or (None if args.architectures else "docs/coverage.md")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), page(rows))
    return int(any(row.verdict == "wrong" for row in rows))


def totals(rows: "Sequence[Coverage]") -> str:
    verdicts = [row.verdict for row in rows]
    return ", ".join(f"{verdicts.count(name)} {name}" for name in ("covered", "unsupported", "wrong"))


PAGE = """# Architectures

Written by `toolkit coverage` with {packages}: one row per class of causal language model that transformers
registers, measured on a small model with random float32 weights in bitwise mode on CPU.

| column | meaning | covered when |
|---|---|---|
| roles | modules patched, by role; a setting of the model as a whole counts as one | at least one |
| probe | largest relative error of the probes, of outputs and gradients | the probe passed |
| loss | relative difference from the unpatched model's loss | at most {loss:.0e} |
| gradient | the same of all gradients together, by norm | at most {gradient:.0e} |
| greedy | the engine's {new} greedy tokens for two prompts are those of the unpatched `generate` | yes |
| differing | tokens, of {parity} or more, whose log-probability differs in a bit between engine and training | 0 |
| export | unpatched transformers opens an export and computes the same logits | yes |

Covered: all of these hold; skipped modules are listed with the reason. Unsupported: nothing that was measured is wrong,
and the row says where it ended and why. Wrong: a number is out of its limit.

**{totals}.**

{table}
"""


def page(rows: "Sequence[Coverage]") -> str:
    """The Markdown page of a run: what the columns mean, the totals and the table."""
    from importlib.metadata import version

    from toolkit.testing.coverage import GRADIENT_LIMIT, LOSS_LIMIT, NEW_TOKENS, PARITY_TOKENS

    return PAGE.format(
        packages=", ".join(f"{name} {version(name)}" for name in ("transformers", "torch")),
        loss=LOSS_LIMIT,
        gradient=GRADIENT_LIMIT,
        new=NEW_TOKENS,
        parity=PARITY_TOKENS,
        totals=totals(rows),
        table="\n".join(table(rows)),
    )


def table(rows: "Sequence[Coverage]") -> list[str]:
    """A Markdown table, one row per architecture."""

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
        reason = (row.reason or "; ".join(row.skipped)).replace("|", "\\|")
        lines.append(
            f"| {row.model_type} | {row.verdict} | {roles} | {number(row.probe_error)} | {number(row.loss_error)} | "
            f"{number(row.gradient_error)} | {yes(row.generated)} | {differing} | {yes(row.exported)} | {reason} |"
        )
    return lines
