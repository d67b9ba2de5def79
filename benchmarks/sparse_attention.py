"""A decode step of one attention layer with an indexer against dense attention of the same layer, on the CPU.

``python -m benchmarks.sparse_attention [--lengths N ...] [--threads N] [--repeats N] [--json NAME]``: for each length
of the context the median time of dense attention over the latents, of the indexer's selection and of attention over
what it selected, from pages of 16 in random order, by DeepSeek-V3.2's widths (128 heads, latents of 576 and 512, an
indexer of 64 heads of 128, 2,048 keys). The three take turns, so that a busy machine slows each. At 65,536 tokens and
more dense attention must take at least five times as long as the other two together.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.common import write_json
from toolkit.ops.attention import attention
from toolkit.ops.select_keys import select_keys, selected_rows
from toolkit.ops.sparse_attention import sparse_attention

PAGE, GATE, GATED_LENGTH = 16, 5.0, 65_536


def calls_of(length: int, sizes: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Dense attention, selection, and attention over the selection, of one new token after ``length - 1`` others."""
    generator = torch.Generator().manual_seed(length)
    pages = -(-length // PAGE)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    latents, keys = normal(pages * PAGE, 1, sizes.latent + sizes.rotated), normal(pages * PAGE, sizes.index_dim)
    values = latents[..., : sizes.latent]
    tables = torch.randperm(pages, generator=generator)[None]
    plan = torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([length]), tables, PAGE
    q, index_q = normal(1, sizes.heads, sizes.latent + sizes.rotated), normal(1, sizes.index_heads, sizes.index_dim)
    weights, scale = normal(1, sizes.index_heads), 192**-0.5
    selected = select_keys(index_q, keys, weights, *plan, topk=sizes.topk)
    return {
        "dense": lambda: attention(q, latents, values, *plan, scale),
        "select": lambda: select_keys(index_q, keys, weights, *plan, topk=sizes.topk),
        "attend": lambda: sparse_attention(q, latents, values, selected_rows(selected, *plan), scale),
    }


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each call; the calls take turns, the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(one) for name, one in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16_384, 65_536, 131_072])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="name of a file in benchmarks/results")
    widths = {"heads": 128, "latent": 512, "rotated": 64, "index-heads": 64, "index-dim": 128, "topk": 2048}
    for name, size in widths.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    sizes = parser.parse_args()
    torch.set_num_threads(sizes.threads)
    rows, failed = [], False
    print(f"{'keys':>8} {'dense ms':>10} {'select ms':>10} {'attend ms':>10} {'ratio':>7}")
    for length in sizes.lengths:
        found = measure(calls_of(length, sizes), sizes.repeats)
        ratio = found["dense"] / (found["select"] + found["attend"])
        failed = failed or (length >= GATED_LENGTH and ratio < GATE)
        milliseconds = {name: 1000 * seconds for name, seconds in found.items()}
        rows.append({"keys": length, "ratio": ratio} | milliseconds)
        print(f"{length:8d} {' '.join(f'{one:10.2f}' for one in milliseconds.values())} {ratio:6.1f}x", flush=True)
    if sizes.json:
        write_json(sizes.json, {"sizes": vars(sizes), "rows": rows})
    if failed:
        sys.exit(f"dense attention of {GATED_LENGTH} keys and more must take {GATE:.0f} times as long")


if __name__ == "__main__":
    main()
