"""What a kernel may take at most, as data: a regression fails by name.

``budgets.json`` holds for every kernel and target the registers, shared memory, spills and instructions of the inner
loop that the largest of its cases may take, and the percentage of matrix instructions in that loop that none of its
cases may fall below. Kernels without matrix instructions, and cases that were compiled before the table had it, have no
loop. The rows of the committed table are held to it, and so is what a test compiles afresh. ``python -m
tools.compile_kernels.budgets`` writes the file from the committed table: run it only where a kernel is meant to take
more, and look at the difference.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.common import write_aside
from tools.compile_kernels import table
from tools.compile_kernels.compiler import Compiled

BUDGETS = Path(__file__).with_name("budgets.json")
LIMITS = ("registers", "shared", "spilled")
INSTRUCTIONS = "instructions"
DOT_SHARE = "dot_share"
# kernel -> target -> limit -> the most of it, of the share of matrix instructions the least
Budgets = dict[str, dict[str, dict[str, float]]]


def read() -> Budgets:
    found: Budgets = json.loads(BUDGETS.read_text())
    return found


def over(rows: Iterable[tuple[str, Compiled]], budgets: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """One sentence for each row, (case, compiled kernel), that takes more than its kernel may."""
    found = []
    for case, made in rows:
        limits = budgets.get(made.kernel, {}).get(made.arch)
        if limits is None:
            found.append(f"{made.kernel} has no budget for {made.arch} (case {case})")
            continue
        for name, amount in taken(made).items():
            limit = limits.get(name)
            if limit is not None and amount > limit:
                found.append(f"{made.kernel}, {made.arch}, case {case}: {name} {amount}, budget {limit}")
        share, least = dot_share(made), limits.get(DOT_SHARE)
        if share is not None and least is not None and share < least:
            found.append(f"{made.kernel}, {made.arch}, case {case}: {DOT_SHARE} {share:.2f} %, at least {least} %")
    return found


def taken(made: Compiled) -> dict[str, int]:
    """What is limited from above, by name; the instructions where there is an inner loop with matrix instructions."""
    return {name: getattr(made, name) for name in LIMITS} | ({INSTRUCTIONS: made.loop[0]} if made.loop else {})


def dot_share(made: Compiled) -> float | None:
    """The percentage of matrix instructions in the inner loop; None where there is no loop with some."""
    if not made.loop:
        return None
    instructions, matrix = made.loop
    return 100 * matrix / instructions


def budgets_of(rows: Iterable[tuple[str, Compiled]]) -> Budgets:
    """For each kernel and target the most that one of its cases takes, and the least share of matrix instructions."""
    found: Budgets = {}
    for _, made in rows:
        limits = found.setdefault(made.kernel, {}).setdefault(made.arch, {})
        for name, amount in taken(made).items():
            limits[name] = max(limits.get(name, 0), amount)
        share = dot_share(made)
        if share is not None:
            limits[DOT_SHARE] = min(limits.get(DOT_SHARE, 100.0), math.floor(share * 100) / 100)
    return {kernel: found[kernel] for kernel in sorted(found)}


def main() -> None:
    lines = [f"  {json.dumps(kernel)}: {json.dumps(limits)}" for kernel, limits in budgets_of(table.read()[1]).items()]
    body = ",\n".join(lines)
    path = write_aside(BUDGETS, "{\n" + body + "\n}\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
