"""Native attention against torch's scaled_dot_product_attention on the CPU: forward, backward and decode.

``python -m benchmarks.ops.attention [--threads N] [--repeats N]`` prints a row per shape: the best time of each
(calls of the two alternate, so that a busy machine slows both), and their ratio.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.ops.attention import attention

Call = Callable[[], object]


def plan(queries: list[int], keys: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """query_offsets, kv_offsets and kv_lengths of packed sequences."""
    starts = [torch.tensor([0, *x]).cumsum(0) for x in (queries, keys)]
    return starts[0], starts[1][:-1].contiguous(), torch.tensor(keys)


def training(batch: int, heads: int, kv_heads: int, length: int, depth: int, backward: bool) -> tuple[Call, Call]:
    rows = batch * length
    layout = plan([length] * batch, [length] * batch)
    shapes = (rows, heads, depth), (rows, kv_heads, depth), (rows, kv_heads, depth)
    packed = [torch.randn(s, requires_grad=backward) for s in shapes]
    dense = [
        x.detach().view(batch, length, -1, depth).transpose(1, 2).contiguous().requires_grad_(backward) for x in packed
    ]
    grad = torch.randn(rows, heads, depth)
    dense_grad = grad.view(batch, length, heads, depth).transpose(1, 2).contiguous()

    def ours() -> object:
        q, k, v = packed
        out = attention(q, k, v, *layout)[0]
        return torch.autograd.grad(out, packed, grad) if backward else out

    def theirs() -> object:
        q, k, v = dense
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        return torch.autograd.grad(out, dense, dense_grad) if backward else out

    return ours, theirs


def decode(batch: int, heads: int, kv_heads: int, length: int, depth: int) -> tuple[Call, Call]:
    """One query a sequence over pages of 16, against a contiguous cache that grows by concatenation."""
    page = 16
    pages = -(-length // page)
    pool = torch.randn(2, batch * pages * page, kv_heads, depth)
    tables = torch.randperm(batch * pages).view(batch, pages)
    query_offsets, kv_offsets, kv_lengths = plan([1] * batch, [length] * batch)
    q = torch.randn(batch, heads, depth)
    past = torch.randn(2, batch, kv_heads, length - 1, depth)
    new = torch.randn(2, batch, kv_heads, 1, depth)
    dense_q = q[:, :, None]

    def ours() -> object:
        return attention(q, pool[0], pool[1], query_offsets, kv_offsets, kv_lengths, tables, page)

    def theirs() -> object:
        k, v = torch.cat([past[0], new[0]], 2), torch.cat([past[1], new[1]], 2)
        return F.scaled_dot_product_attention(dense_q, k, v, enable_gqa=heads != kv_heads)

    return ours, theirs


def best(calls: tuple[Call, Call], repeats: int, clock: Callable[[], float]) -> list[float]:
    """The shortest time of each call, in seconds; the calls take turns."""
    times = [float("inf")] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            start = clock()
            call()
            times[i] = min(times[i], clock() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, for a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"{'shape':44} {'toolkit ms':>11} {'torch ms':>9} {'ratio':>6}")
    for heads, kv_heads, length, depth in (
        (8, 8, 512, 64),
        (8, 2, 512, 64),
        (8, 8, 128, 64),
        (8, 8, 512, 128),
    ):
        for backward in (False, True):
            name = f"{'train' if backward else 'forward'} B=4 H={heads}/{kv_heads} S={length} D={depth}"
            ours, theirs = best(training(4, heads, kv_heads, length, depth, backward), options.repeats, clock)
            print(f"{name:44} {ours * 1e3:11.3f} {theirs * 1e3:9.3f} {theirs / ours:6.2f}", flush=True)
    for batch, heads, kv_heads, length in ((16, 8, 8, 200), (1, 8, 8, 200), (16, 8, 2, 200), (1, 8, 8, 4000)):
        with torch.inference_mode():
            calls = decode(batch, heads, kv_heads, length, 64)
            ours, theirs = best(calls, 20 * options.repeats, clock)
        name = f"decode B={batch} H={heads}/{kv_heads} keys={length} D=64"
        print(f"{name:44} {ours * 1e3:11.3f} {theirs * 1e3:9.3f} {theirs / ours:6.2f}", flush=True)


if __name__ == "__main__":
    main()
