"""Rows in eight bits written into pools: the codes of the definition, by every implementation, in any layout."""

import pytest
import torch

from tests.helpers.implementations import HALF, impl_and_dtype
from tests.helpers.rowwise import seeded
from toolkit.ops.int8_rows import int8_codes, int8_values, state_write_int8
from toolkit.ops.registry import has_native

SLOTS = [[5, 2, -1, 9, 0], [-1, -1, 3, -5, 7], [-1] * 5, [4, 3, 2, 1, 0], []]


def pools(heads: int, width: int, slots: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((slots, heads, width), 99, dtype=torch.int8), torch.full((slots, heads, 1), torch.nan)


@impl_and_dtype()
def test_each_row_goes_to_its_slot(impl, dtype):
    for width in (1, 7, 33, 64, 200):
        for slots in SLOTS:
            rows = seeded(len(slots), 3, width, dtype=torch.float64, scale=50.0).to(dtype)
            expected, found = pools(3, width), pools(3, width)
            for row, slot in zip(rows, slots):
                if slot >= 0:
                    scale = row.float().abs().amax(-1, keepdim=True) / 127
                    expected[0][slot], expected[1][slot] = (row.float() / scale).round().to(torch.int8), scale
            state_write_int8(*found, rows, torch.tensor(slots, dtype=torch.int64), impl=impl.option)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1].nan_to_num(-1), expected[1].nan_to_num(-1))


def test_halves_of_a_step_go_to_the_even_code(impl):
    rows = torch.tensor([[[127.0, 0.5, 1.5, -0.5, -2.5, 126.5, -126.5]]])
    codes, scales = pools(1, 7)
    state_write_int8(codes, scales, rows, torch.tensor([4]), impl=impl.option)
    assert codes[4, 0].tolist() == [127, 0, 2, 0, -2, 126, -126]
    assert scales[4, 0, 0] == 1.0


def test_extremes(impl):
    """Zeros, the largest and the smallest numbers, infinity and NaN: values as the definition's, row by row."""
    rows = torch.tensor([[0.0, -0.0], [3e38, 1.0], [1e-45, 0.0], [1e-37, -1e-39], [torch.inf, 1.0], [torch.nan, 1.0]])
    rows = rows[:, None]
    codes, scales = pools(1, 2)
    state_write_int8(codes, scales, rows, torch.arange(6), impl=impl.option)
    found, expected = (int8_values(*of, torch.float32) for of in ((codes[:6], scales[:6]), int8_codes(rows)))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert torch.equal(codes[:4], int8_codes(rows)[0][:4])


def test_strided_rows_and_pools(impl):
    """Rows that are a part of a projection; pools that are one of two halves of a buffer."""
    rows = seeded(30, 3 * 4 * 8, dtype=impl.dtypes[-1])[:, 32:64].view(30, 4, 8)
    both, kept = torch.full((40, 2, 4, 8), 99, dtype=torch.int8), torch.full((40, 2, 4, 1), torch.nan)
    slots = torch.arange(40).flip(0)[:30]
    for given in (rows, rows.transpose(0, 1).contiguous().transpose(0, 1), seeded(30, 8, 4, dtype=HALF).mT):
        state_write_int8(both[:, 1], kept[:, 1], given, slots, impl=impl.option)
        codes, scales = int8_codes(given)
        assert torch.equal(both[slots, 1], codes)
        assert torch.equal(kept[slots, 1], scales)
        assert (both[:, 0] == 99).all()
        assert kept[:, 0].isnan().all()


@pytest.mark.skipif(not has_native("state_write_int8"), reason="the native CPU library is not built")
def test_bad_input_writes_nothing():
    codes, scales = pools(2, 4, 6)
    slots = torch.tensor([0, 1])
    for message, arguments in {
        r"slots\[1\] is 6; the pool has 6 slots": (codes, scales, torch.ones(2, 2, 4), torch.tensor([0, 6])),
        r"rows must be floating-point numbers \[rows, 2, 4\]": (codes, scales, torch.ones(2, 2, 5), slots),
        r"slots must be int64 \[2\]": (codes, scales, torch.ones(2, 2, 4), slots[:1]),
        r"scales must be float32 \[6, 2, 1\]": (codes, scales[:, :1], torch.ones(2, 2, 4), slots),
        r"codes must be int8 \[slots, heads, width\]": (scales, scales, torch.ones(2, 2, 1), slots),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            state_write_int8(*arguments)
    assert (codes == 99).all()
    assert scales.isnan().all()


def test_operator_registration():
    codes, scales = torch.zeros(6, 2, 4, dtype=torch.int8), torch.zeros(6, 2, 1)
    arguments = codes, scales, seeded(3, 2, 4, dtype=torch.float32), torch.tensor([4, -1, 0])
    torch.library.opcheck(torch.ops.toolkit.state_write_int8.default, arguments)
