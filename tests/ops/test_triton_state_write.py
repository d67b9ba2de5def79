"""Triton state_write in Triton's interpreter, against a Python loop."""

import pytest
import torch

from tests.helpers.interpreter import far_apart, noise
from toolkit.errors import ToolkitError
from toolkit.ops.state_write import state_write

SLOTS = [[5, 2, -1, 9, 0], [-1, -1, 3, -5, 7], [-1] * 5, [4, 3, 2, 1, 0], [3, 10, 2**40, 1, 0], []]


def write(pool, rows, slots):
    """By a loop; slots outside the pool are skipped."""
    expected = pool.clone()
    for t, slot in enumerate(slots):
        if 0 <= slot < pool.shape[0]:
            expected[slot] = rows[t].to(pool.dtype)
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int8, torch.bool])
@pytest.mark.parametrize("slots", SLOTS, ids=str)
def test_against_loop(slots, dtype):
    for heads, width in ((3, 5), (1, 1), (2, 1100)):
        pool, rows = noise(10, heads, width, scale=50.0).to(dtype), noise(len(slots), heads, width, seed=1, scale=50.0)
        for given in (rows, rows.to(dtype), rows.half()):
            expected = write(pool, given, slots)
            target = pool.clone()
            state_write(target, given, torch.tensor(slots, dtype=torch.int64), impl="triton")
            assert torch.equal(target, expected)


def test_bits_are_copied_as_they_are():
    bits = torch.randint(256, (4, 2, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float8_e4m3fn, torch.uint8):
        pool = torch.zeros(6, 2, 8, dtype=torch.uint8).view(dtype)
        state_write(pool, bits.view(dtype), torch.tensor([5, 0, 2, 1]), impl="triton")
        assert torch.equal(pool.view(torch.uint8)[[5, 0, 2, 1]], bits)


def test_strided():
    """A pool that is one of two halves of a buffer, rows that are a view of a projection."""
    buffer = torch.full((40, 2, 4, 8), torch.nan)
    pool = buffer[:, 1]
    rows = noise(30, 3 * 4 * 8)[:, 32:64].view(30, 4, 8)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:30]
    for given in (rows, noise(4, 30, 8).transpose(0, 1), noise(30, 8, 4).mT):
        state_write(pool, given, slots, impl="triton")
        assert torch.equal(pool[slots], given)
        assert buffer[:, 0].isnan().all()
        assert pool.isnan().all(-1).all(-1).sum() == 10


def test_offsets_past_two_to_the_31():
    rows = noise(3, 2, 8, dtype=torch.float16)
    pool = far_apart(torch.zeros(5, 2, 8, dtype=torch.float16))
    state_write(pool, far_apart(rows), torch.tensor([4, 0, 3]), impl="triton")
    assert torch.equal(pool[[4, 0, 3]], rows)
    assert not pool[[1, 2]].any()


def test_bad_input_is_one_sentence_and_writes_nothing():
    pool = torch.zeros(6, 2, 4)
    with pytest.raises(ToolkitError, match="same heads and width"):
        state_write(pool, torch.ones(2, 2, 5), torch.tensor([0, 1]), impl="triton")
    with pytest.raises(ToolkitError, match=r"slots has shape \[1\] and dtype torch.int64; int64 \[2\] is required"):
        state_write(pool, torch.ones(2, 2, 4), torch.tensor([0]), impl="triton")
    with pytest.raises(ToolkitError, match="contiguous last dimension"):
        state_write(pool.mT, torch.ones(2, 4, 2), torch.tensor([0, 1]), impl="triton")
    assert (pool == 0).all()
