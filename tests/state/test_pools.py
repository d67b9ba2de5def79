"""Keys selected pool by pool: against loops over tokens, contiguous, paged and in a prefix tree."""

import pytest
import torch

from toolkit.ops.select_keys.reference import index_scores
from toolkit.state.pools import Pools, select_pools

SIZE, COUNT, WIDTH = 4, 2, 8


def make(rows):
    """Offsets within a pool count differently, so that a token at another one's shows."""
    return (rows * torch.arange(1.0, SIZE + 1)[:, None]).sum(1)


POOLS = Pools(SIZE, COUNT, 0.5, make)


def expected(q, rows, weights, past):
    """Positions for each of the last tokens of one sequence [n, WIDTH], of which ``past`` were there before."""
    found = []
    for at in range(len(q)):
        seen = past + at + 1
        complete = seen // SIZE
        kept = list(range(complete * SIZE, seen))
        if complete:
            keys = make(rows[: complete * SIZE].view(complete, SIZE, -1))
            scores = index_scores(q[at : at + 1], keys, weights[at : at + 1], POOLS.scale)[0]
            best = scores.topk(min(COUNT, complete)).indices.tolist()
            kept += [pool * SIZE + offset for pool in best for offset in range(SIZE)]
        found.append(sorted(kept) + [-1] * (POOLS.width - len(kept)))
    return torch.tensor(found)


def sequences(lengths):
    source = torch.Generator().manual_seed(0)
    rows = [torch.randn(length, WIDTH, generator=source) for length in lengths]
    q = [torch.randn(length, 3, WIDTH, generator=source) for length in lengths]
    weights = [torch.randn(length, 3, generator=source) for length in lengths]
    return rows, q, weights


@pytest.mark.parametrize("pasts", [(0, 0, 0), (22, 3, 0)])
@pytest.mark.parametrize("block_size", [0, 3])
def test_against_loops(pasts, block_size):
    lengths = 23, 4, 2
    rows, q, weights = sequences(lengths)
    new = [part[past:] for part, past in zip(q, pasts, strict=True)]
    counts = torch.tensor([len(part) for part in new])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    if block_size:
        kept = torch.full((72, WIDTH), torch.nan)
        tables = torch.stack([torch.arange(8), torch.arange(8, 16), torch.arange(16, 24)]).flip(1)
        for s, part in enumerate(rows):
            at = torch.arange(len(part))
            kept[tables[s][at // block_size] * block_size + at % block_size] = part
        plan = offsets, torch.zeros(3, dtype=torch.int64), torch.tensor(lengths), tables, block_size
    else:
        kept = torch.cat(rows)
        plan = offsets, torch.tensor([0, 23, 27]), torch.tensor(lengths), None, 1
    parts = [part[past:] for part, past in zip(weights, pasts, strict=True)]
    found = select_pools(torch.cat(new), kept, torch.cat(parts), plan, POOLS)
    wanted = [expected(*one) for one in zip(new, rows, parts, pasts, strict=True)]
    assert torch.equal(found, torch.cat(wanted))


def test_no_pool_is_complete():
    rows, q, weights = sequences([3])
    plan = torch.tensor([0, 3]), torch.tensor([0]), torch.tensor([3]), None, 1
    found = select_pools(q[0], rows[0], weights[0], plan, POOLS)
    assert torch.equal(found, expected(q[0], rows[0], weights[0], 0))
