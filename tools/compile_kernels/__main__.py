"""What the Triton kernels compile to, for every target and shipped tile, without a GPU.

``python -m tools.compile_kernels`` prints registers, shared memory, occupancy, spills and matrix instructions, and
writes them to ``benchmarks/results/kernels.json`` with a fingerprint of the kernels' sources. A test compares the
fingerprint with the tree.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from benchmarks.common import print_table
from tools.compile_kernels import table
from tools.compile_kernels.compiler import SHARED_LIMIT, Compiled, compile_case, faults

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is decorated; the workers inherit what is left

HEADER = ["case", "kernel", "target", "registers", "shared KiB", "occupancy", "spilled", "dots", "matrix instructions"]

PROGRESS = 20  # pairs of case and target, after which a line says how far it is


def compile_named(name: str, arch: str) -> list[Compiled]:
    """The kernels of the case ``name``, compiled for ``arch``; runs in a worker process."""
    return compile_case(table.cases()[name], arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="*", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    wanted = [(name, arch) for name in table.cases() if arguments.only in name for arch in arguments.arch]
    if not wanted:
        parser.error(f"--only must be part of a case's name, got {arguments.only!r}.")
    with ProcessPoolExecutor(arguments.processes) as pool:
        results = []
        for compiled in pool.map(compile_named, *zip(*wanted), chunksize=4):
            results.append(compiled)
            if len(results) % PROGRESS == 0 or len(results) == len(wanted):
                print(f"{len(results)} of {len(wanted)} compiled", file=sys.stderr, flush=True)
    rows, unfit = [], []
    for (name, arch), compiled in zip(wanted, results):
        for made in compiled:
            matrix = ", ".join(f"{count} {kind}" for kind, count in made.matrix.items()) or "none"
            filled, shared = f"{made.occupancy:.0%}", f"{made.shared / 1024:.1f}"
            rows.append([name, made.kernel, arch, made.registers, shared, filled, made.spilled, made.dots, matrix])
            unfit += [f"{name}, {made.kernel}, {arch}: {fault}" for fault in faults(made)]
    print_table("Compiled kernels", HEADER, rows)
    for line in unfit:
        print(f"unfit: {line}")
    if not arguments.only and set(arguments.arch) == set(SHARED_LIMIT):
        pairs = [(name, made) for (name, _), compiled in zip(wanted, results) for made in compiled]
        print(f"written to {table.write(pairs)}")


if __name__ == "__main__":
    main()
