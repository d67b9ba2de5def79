"""state_write against a Python loop."""

import pytest
import torch

from tests.helpers.implementations import TRITON, only_triton
from tests.helpers.interpreter import far_apart
from tests.helpers.rowwise import seeded
from toolkit.errors import ToolkitError
from toolkit.ops.registry import has_native
from toolkit.ops.state_write import state_write

needs_native = pytest.mark.skipif(not has_native("state_write"), reason="the native CPU library is not built")
SLOTS = [[5, 2, -1, 9, 0], [-1, -1, 3, -5, 7], [-1] * 5, [4, 3, 2, 1, 0], []]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", SLOTS, ids=str)
def test_against_loop(impl, slots, dtype):
    if dtype == torch.bfloat16 and dtype not in impl.dtypes:
        dtype = torch.int8
    check_against_loop(slots, dtype, impl.option)


@only_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int8, torch.bool])
def test_other_dtypes_and_slots_outside_the_pool_which_are_skipped(impl, dtype):
    for slots in ([3, 10, 2**40, 1, 0], *SLOTS):
        check_against_loop(slots, dtype, impl.option)


def check_against_loop(slots: list[int], dtype: torch.dtype, option: str | None) -> None:
    for heads, width in ((3, 5), (1, 1), (2, 1100)):
        pool = seeded(10, heads, width, scale=50.0).to(dtype)
        rows = seeded(len(slots), heads, width, dtype=torch.float32, seed=1, scale=50.0)
        for given in (rows, rows.to(dtype), rows.half()):
            expected = pool.clone()
            for t, slot in enumerate(slots):
                if 0 <= slot < len(pool):
                    expected[slot] = given[t].to(dtype)
            target = pool.clone()
            state_write(target, given, torch.tensor(slots, dtype=torch.int64), impl=option)
            assert torch.equal(target, expected)


@only_triton
def test_bits_are_copied_as_they_are(impl):
    bits = torch.arange(64, dtype=torch.uint8).mul(4).view(4, 2, 8)
    for dtype in (torch.float8_e4m3fn, torch.uint8):
        pool = torch.zeros(6, 2, 8, dtype=torch.uint8).view(dtype)
        state_write(pool, bits.view(dtype), torch.tensor([5, 0, 2, 1]))
        assert torch.equal(pool.view(torch.uint8)[[5, 0, 2, 1]], bits)


def test_strided(impl):
    """A pool that is one of two halves of a buffer, rows that are a view of a projection."""
    buffer = torch.full((40, 2, 4, 8), torch.nan)
    pool = buffer[:, 1]
    rows = seeded(30, 3 * 4 * 8, dtype=torch.float32)[:, 32:64].view(30, 4, 8)
    slots = torch.arange(40).flip(0)[:30]
    heads_first = seeded(4, 30, 8, dtype=torch.float32, seed=1).transpose(0, 1)
    for given in (rows, heads_first, seeded(30, 8, 4, dtype=torch.float32, seed=2).mT):
        state_write(pool, given, slots, impl=impl.option)
        assert torch.equal(pool[slots], given)
        assert buffer[:, 0].isnan().all()
        assert pool.isnan().all(-1).all(-1).sum() == 10


@only_triton
def test_offsets_past_two_to_the_31(impl):
    rows = seeded(3, 2, 8, dtype=torch.float16)
    pool = far_apart(torch.zeros(5, 2, 8, dtype=torch.float16))
    state_write(pool, far_apart(rows), torch.tensor([4, 0, 3]))
    assert torch.equal(pool[[4, 0, 3]], rows)
    assert not pool[[1, 2]].any()


@only_triton
def test_limits_of_the_triton_kernel_are_named_and_nothing_is_written(impl):
    pool = torch.zeros(6, 2, 4)
    with pytest.raises(ToolkitError, match="same heads and width"):
        state_write(pool, torch.ones(2, 2, 5), torch.tensor([0, 1]))
    with pytest.raises(ToolkitError, match=r"slots must be int64 \[2\], got torch.int64 of shape \[1\]"):
        state_write(pool, torch.ones(2, 2, 4), torch.tensor([0]))
    with pytest.raises(ToolkitError, match="contiguous last dimension"):
        state_write(pool.mT, torch.ones(2, 4, 2), torch.tensor([0, 1]))
    assert (pool == 0).all()


def test_many_rows_that_require_grad(impl):
    count = 300 if impl is TRITON else 3000
    pool = torch.zeros(5000, 4, 32)
    rows = seeded(count, 4, 32, dtype=torch.float32).requires_grad_()
    slots = torch.arange(len(pool)).flip(0)[:count]
    state_write(pool, rows, slots, impl=impl.option)
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
