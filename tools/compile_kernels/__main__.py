"""What the Triton kernels compile to, for every target and shipped tile, without a GPU.

``python -m tools.compile_kernels`` prints registers, shared memory, occupancy, spills, matrix instructions and their
share of the inner loop, and writes them to ``benchmarks/results/kernels.json``. Each case has a digest of the sources
and launches that it was made from: only the cases whose digest is another one in this tree are compiled, ``--all``
compiles every one. A test compares the digests with the tree.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version

from benchmarks.common import print_table
from tools.compile_kernels import budgets, table
from tools.compile_kernels.compiler import SHARED_LIMIT, Compiled, compile_case, faults

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is decorated; the workers inherit what is left

HEADER = [
    "case", "kernel", "target", "registers", "shared KiB", "occupancy", "spilled", "dots", "matrix instructions",
    "of the inner loop",
]  # fmt: skip

PROGRESS = 20  # pairs of case and target, after which a line says how far it is


def compile_named(name: str, arch: str) -> list[Compiled]:
    """The kernels of the case ``name``, compiled for ``arch``; runs in a worker process."""
    return compile_case(table.cases()[name], arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="*", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT))
    parser.add_argument("--only", default="", help="cases whose name contains this; they are printed, not written")
    parser.add_argument("--all", action="store_true", help="compile what is of this tree already, too")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    every = [(name, arch) for name in table.cases() for arch in SHARED_LIMIT]
    shown = [(name, arch) for name, arch in every if arguments.only in name and arch in arguments.arch]
    if not shown:
        parser.error(f"--only must be part of a case's name, got {arguments.only!r}.")
    whole = arguments.all or table.compiler_of_table() != version("triton")
    kept = {} if whole or arguments.only else _kept(set(table.stale()))
    wanted = [pair for pair in shown if pair not in kept]
    print(f"{len(shown) - len(wanted)} of {len(shown)} pairs of case and target are of this tree", file=sys.stderr)
    with ProcessPoolExecutor(arguments.processes) as pool:
        results = []
        for compiled in pool.map(compile_named, *(zip(*wanted) if wanted else ((), ())), chunksize=4):
            results.append(compiled)
            if len(results) % PROGRESS == 0 or len(results) == len(wanted):
                print(f"{len(results)} of {len(wanted)} compiled", file=sys.stderr, flush=True)
    rows, unfit = [], []
    for (name, arch), compiled in zip(wanted, results):
        for made in compiled:
            matrix = ", ".join(f"{count} {kind}" for kind, count in made.matrix.items()) or "none"
            filled, shared = f"{made.occupancy:.0%}", f"{made.shared / 1024:.1f}"
            share = budgets.dot_share(made)
            of_loop = "" if share is None else f"{share:.1f} % of {made.loop[0]}"
            about = made.registers, shared, filled, made.spilled, made.dots, matrix, of_loop
            rows.append([name, made.kernel, arch, *about])
            unfit += [f"{name}, {made.kernel}, {arch}: {fault}" for fault in faults(made)]
    print_table("Compiled kernels", HEADER, rows)
    for line in unfit:
        print(f"unfit: {line}")
    if len(shown) == len(every):
        print(f"written to {table.write(kept | dict(zip(wanted, results)), table.made_from(every))}")


def _kept(stale: set[tuple[str, str]]) -> dict[tuple[str, str], list[Compiled]]:
    """The rows of the committed table that are of this tree, by case and target."""
    found: dict[tuple[str, str], list[Compiled]] = {}
    for case, made in table.read()[1]:
        if (case, made.arch) not in stale:
            found.setdefault((case, made.arch), []).append(made)
    return found


if __name__ == "__main__":
    main()
