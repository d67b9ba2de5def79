"""What a kernel may take at most, as data: a regression fails by name.

``budgets.json`` holds for every kernel and target the registers, shared memory and spills that the largest of its cases
may take. The rows of the committed table are held to it, and so is what a test compiles afresh.
``python -m tools.compile_kernels.budgets`` writes the file from the committed table: run it only where a kernel is
meant to take more, and look at the difference.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.common import write_aside
from tools.compile_kernels import table
from tools.compile_kernels.compiler import Compiled

BUDGETS = Path(__file__).with_name("budgets.json")
LIMITS = ("registers", "shared", "spilled")
# kernel -> target -> limit -> the most of it
Budgets = dict[str, dict[str, dict[str, int]]]


def read() -> Budgets:
    found: Budgets = json.loads(BUDGETS.read_text())
    return found


def over(rows: Iterable[tuple[str, Compiled]], budgets: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """One sentence for each row, (case, compiled kernel), that takes more than its kernel may."""
    found = []
    for case, made in rows:
        limits = budgets.get(made.kernel, {}).get(made.arch)
        if limits is None:
            found.append(f"{made.kernel} has no budget for {made.arch} (case {case})")
            continue
        for name in LIMITS:
            taken, limit = getattr(made, name), limits[name]
            if taken > limit:
                found.append(f"{made.kernel}, {made.arch}, case {case}: {name} {taken}, budget {limit}")
    return found


def budgets_of(rows: Iterable[tuple[str, Compiled]]) -> Budgets:
    """For each kernel and target the most that one of its cases takes."""
    found: Budgets = {}
    for _, made in rows:
        limits = found.setdefault(made.kernel, {}).setdefault(made.arch, dict.fromkeys(LIMITS, 0))
        for name in LIMITS:
            limits[name] = max(limits[name], getattr(made, name))
    return {kernel: found[kernel] for kernel in sorted(found)}


def main() -> None:
    lines = [f"  {json.dumps(kernel)}: {json.dumps(limits)}" for kernel, limits in budgets_of(table.read()[1]).items()]
    body = ",\n".join(lines)
    path = write_aside(BUDGETS, "{\n" + body + "\n}\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
