"""state_write against a Python loop."""

import pytest
import torch

from toolkit.ops.registry import has_native
from toolkit.ops.state_write import state_write

needs_native = pytest.mark.skipif(not has_native("state_write"), reason="the native CPU library is not built")
IMPLS = ["reference", pytest.param("cpu", marks=needs_native)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("slots", [[5, 2, -1, 9, 0], [-1, -1, 3, -5, 7], [-1] * 5, [4, 3, 2, 1, 0], []], ids=str)
def test_against_loop(slots, dtype, impl):
    pool = torch.randn(10, 3, 5).to(dtype)
    rows = torch.randn(len(slots), 3, 5)
    expected = pool.clone()
    for t, slot in enumerate(slots):
        if slot >= 0:
            expected[slot] = rows[t].to(dtype)
    state_write(pool, rows, torch.tensor(slots, dtype=torch.int64), impl=impl)
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided(impl):
    """A pool that is one of two halves of a buffer, rows that are a view of a projection."""
    buffer = torch.full((40, 2, 4, 8), torch.nan)
    pool = buffer[:, 1]
    rows = torch.randn(30, 3 * 4 * 8)[:, 32:64].view(30, 4, 8)
    slots = torch.randperm(40)[:30]
    state_write(pool, rows, slots, impl=impl)
    assert torch.equal(pool[slots], rows)
    assert buffer[:, 0].isnan().all()
    assert pool.isnan().all(-1).all(-1).sum() == 10
    heads_first = torch.randn(4, 30, 8).transpose(0, 1)
    state_write(pool, heads_first, slots, impl=impl)
    assert torch.equal(pool[slots], heads_first)


@pytest.mark.parametrize("impl", IMPLS)
def test_many_rows_that_require_grad(impl):
    pool = torch.zeros(5000, 4, 32)
    rows = torch.randn(3000, 4, 32, requires_grad=True)
    slots = torch.randperm(5000)[:3000]
    state_write(pool, rows, slots, impl=impl)
    assert not pool.requires_grad
    assert torch.equal(pool[slots], rows.detach())


def test_operator_registration():
    pool, rows = torch.zeros(6, 2, 4), torch.randn(3, 2, 4)
    torch.library.opcheck(torch.ops.toolkit.state_write.default, (pool, rows, torch.tensor([4, -1, 0])))


@needs_native
def test_bad_input_writes_nothing():
    pool = torch.zeros(6, 2, 4)
    with pytest.raises(RuntimeError, match="6 slots"):
        state_write(pool, torch.ones(2, 2, 4), torch.tensor([0, 6]))
    with pytest.raises(RuntimeError, match="same heads and width"):
        state_write(pool, torch.ones(2, 2, 5), torch.tensor([0, 1]))
    assert (pool == 0).all()
