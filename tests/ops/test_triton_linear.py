"""Triton linear in Triton's interpreter, against fp64."""

import random

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from tests.helpers.interpreter import poisoned, row_by_row
from toolkit.errors import ToolkitError
from toolkit.ops.linear import tiles
from toolkit.ops.linear.triton import linear
from toolkit.ops.tiles import DECODE_ROWS, GemmTile

EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def poisoned_and_row_by_row(monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", row_by_row)
    with poisoned():
        yield


def make(rows, depth, outputs, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, generator=g).to(dtype) for size in ((rows, depth), (outputs, depth), (outputs,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "depth", "outputs"), [(0, 8, 5), (1, 1, 1), (3, 40, 70), (37, 17, 24), (50, 64, 25), (5, 33, 3), (2, 0, 4)]
)
def test_matches_fp64(dtype, rows, depth, outputs):
    x, weight, bias = make(rows, depth, outputs, dtype)
    for shift in (None, bias):
        y = linear(x, weight, shift)
        assert y.shape == (rows, outputs)
        assert y.dtype == dtype
        expected = x.double() @ weight.double().T + (0 if shift is None else shift.double())
        terms = x.double().abs() @ weight.double().abs().T + bias.double().abs()
        bound = EPS[dtype] * expected.abs() + (depth + 2) * EPS[torch.float32] * terms
        assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("outputs", [20, 40])
def test_a_row_keeps_its_bits(outputs):
    x, weight, bias = make(75, 50, outputs)
    whole = linear(x, weight, bias)
    assert torch.equal(whole, linear(x, weight, bias))
    rng = random.Random(1)
    for _ in range(6):
        index = torch.randperm(75)[: rng.choice([1, 2, 15, 17, 33, 60])]
        assert torch.equal(linear(x[index], weight, bias), whole[index])
    x[7] = float("nan")
    others = torch.arange(75) != 7
    assert torch.equal(linear(x, weight, bias)[others], whole[others])


def test_strides_and_leading_dimensions():
    x, weight, bias = make(24, 40, 30)
    flat = linear(x, weight, bias)
    assert torch.equal(linear(x.view(2, 3, 4, 40), weight, bias), flat.view(2, 3, 4, 30))
    assert torch.equal(linear(x[5], weight, bias), flat[5])
    wide = torch.cat([x, x], 1)
    assert torch.equal(linear(wide[::2, 40:], weight, bias), flat[::2])
    assert torch.equal(linear(x.t().contiguous().t(), weight.t().contiguous().t(), bias), flat)
    assert torch.equal(linear(x, torch.cat([weight, weight], 1)[:, :40], torch.stack([bias, bias], 1)[:, 0]), flat)
    assert torch.equal(linear(x[:1].expand(9, 40), weight, bias), flat[:1].expand(9, 30))


def test_rows_beyond_two_to_the_31_elements():
    """Views over memory that is reserved but touched in three rows only."""
    far = 1 << 30
    memory = torch.empty(2 * far + 64, dtype=torch.float16)
    x, weight, _ = make(3, 16, 3, torch.float16)
    for matrix in (x, weight):
        view = memory.as_strided((3, 16), (far, 1))
        view.copy_(matrix)
        assert view.storage_offset() + 2 * view.stride(0) >= 1 << 31
        got = linear(view, weight, None) if matrix is x else linear(x, view, None)
        assert torch.equal(got, linear(x, weight, None))


def test_extreme_values():
    x = torch.tensor([[1e38, -1e38, 0.0], [3e38, 3e38, 0.0], [-0.0, 0.0, 0.0], [0.0, 0.0, 1e-38]])
    weight = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.25, 1.0]])
    expected = torch.tensor([[0.0, 2.5e37], [float("inf"), 2.25e38], [0.0, 0.0], [1e-38, 1e-38]])
    assert torch.equal(linear(x, weight, None), expected)


def test_a_decode_tile_serves_few_rows(monkeypatch):
    rows = [choices for row in tiles.TABLE.entries.values() for choices in row.values()]
    assert all(tile.decode is None for choices in rows for _, tile in choices)
    small = GemmTile(16, 32, 16, 1, 1)
    large = GemmTile(32, 16, 16, 1, 1, decode=small)
    monkeypatch.setitem(tiles.TABLE.entries["interpreter"], 4, ((None, large),))
    tile = tiles.TABLE.find("interpreter", torch.float32, 9, row_widths=(40,))
    assert tile.for_rows(DECODE_ROWS) == small
    assert tile.for_rows(DECODE_ROWS + 1) == large
    x, weight, bias = make(70, 40, 20)
    torch.testing.assert_close(linear(x[:5], weight, bias), linear(x, weight, bias)[:5])


def test_bad_input_is_one_sentence():
    x, weight, bias = make(2, 4, 3)
    for arguments, words in [
        ((x.double(), weight.double(), None), "float64"),
        ((x, weight.half(), None), "must be equal"),
        ((x[:, :3], weight, None), r"x \[2, 3\] and weight \[3, 4\]"),
        ((x, weight, bias[:2]), r"bias \[2\]"),
        ((x.bfloat16(), weight.bfloat16(), None), "interpreter takes float32 and float16"),
    ]:
        with pytest.raises(ToolkitError, match=words):
            linear(*arguments)
