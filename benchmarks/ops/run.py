"""Ops against their peers on CPU, each after a float64 gate: ``python -m benchmarks.ops``.

``linear`` against ``torch.nn.functional.linear``; the row-wise ops against transformers' own code, eager and compiled
by ``torch.compile``, forward and backward; ``linear_cross_entropy`` and ``linear_logprob`` against a dense head with
cross-entropy and against ``torch.nn.functional.linear_cross_entropy``, in time and in peak memory; ``lora_add``
against a loop over the adapters. Calls are timed in turns; a ratio is of medians, above 1 ours is faster.
"""

import argparse

import torch

from benchmarks.common import write_json
from benchmarks.ops.registry import SECTIONS, section


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each cell of a table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=tuple(SECTIONS), nargs="+")
    parser.add_argument("--head-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.head_memory:
        from benchmarks.ops.head import measure_head_memory

        measure_head_memory(options.head_memory)
        return
    chosen = options.only or list(SECTIONS)
    results = {name: section(name)(options.seconds) for name in chosen}
    if chosen == list(SECTIONS):
        print(f"written to {write_json('ops-cpu', results)}")


if __name__ == "__main__":
    main()
