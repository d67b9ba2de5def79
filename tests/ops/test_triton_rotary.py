"""Triton rotary and rotary_tables in Triton's interpreter, against fp64."""

import pytest
import torch

from tests.helpers.interpreter import DTYPES, TOLERANCE, close, far_apart, noise, poisoned, rows_alone
from toolkit.errors import ToolkitError
from toolkit.ops.rotary import reference, rotary, rotary_tables

SHAPES = [  # tokens, heads, width, rotated
    (1, 1, 2, 2),
    (5, 3, 64, 64),
    (7, 2, 60, 30),
    (3, 1, 13, 6),
    (0, 2, 8, 8),
    (4, 2, 8, 0),
    (3, 0, 8, 8),
    (2, 40, 128, 128),
    (65, 1, 32, 32),
]


def frequencies(n, theta=10_000.0):
    return 1.0 / theta ** (torch.arange(n, dtype=torch.float32) / n)


def matrix(cos, sin, width, interleaved):
    """The map of one token as [width, width], from its definition, in float64."""
    half, cos, sin = cos.shape[0] // 2, cos.double(), sin.double()
    turn = torch.eye(width, dtype=torch.float64)
    for i in range(half):
        a, b, second = (2 * i, 2 * i + 1, i) if interleaved else (i, half + i, half + i)
        turn[a, a], turn[a, b] = cos[i], -sin[i]
        turn[b, b], turn[b, a] = cos[second], sin[second]
    return turn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_matches_fp64(interleaved, dtype):
    for tokens, heads, width, rotated in SHAPES:
        x = noise(tokens, heads, width, dtype=dtype)
        cos, sin = noise(tokens, rotated, seed=1), noise(tokens, rotated, seed=2)
        back = reference.transposed_sin(sin, interleaved)
        with poisoned():
            y = rotary(x, cos, sin, interleaved, impl="triton")
            pulled = rotary(x, cos, back, interleaved, impl="triton")
        assert y.dtype == dtype
        assert torch.equal(y, rotary(x, cos, sin, interleaved, impl="reference"))
        maps = [matrix(c, s, width, interleaved) for c, s in zip(cos, sin)]
        turns = torch.stack(maps) if maps else torch.zeros(0, width, width, dtype=torch.float64)
        close(y, torch.einsum("tij,thj->thi", turns, x.double()), TOLERANCE[dtype])
        close(pulled, torch.einsum("tij,thi->thj", turns, x.double()), TOLERANCE[dtype])


@pytest.mark.parametrize("interleaved", [False, True])
def test_strides_and_table_dtypes(interleaved):
    cos, sin = rotary_tables(torch.arange(6), frequencies(4), impl="triton")
    rows = noise(6, 4 * 8 + 5)[:, 3:35].view(6, 4, 8)
    halves = noise(6, 4, 16)
    for x in (
        rows,
        halves[..., 8:],
        halves.mT[:, :8].mT,
        rows[:, ::2],
        rows.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        got = rotary(x, cos, sin, interleaved, impl="triton")
        assert torch.equal(got, rotary(x.contiguous(), cos, sin, interleaved, impl="triton"))
        wide = torch.cat((cos, cos), -1)[:, :8]
        assert torch.equal(got, rotary(x, wide, sin.double(), interleaved, impl="triton"))
    c, s = cos.half(), sin.half()
    assert torch.equal(
        rotary(rows, c, s, interleaved, impl="triton"),
        rotary(rows, c.float(), s.float(), interleaved, impl="triton"),
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_tokens_do_not_depend_on_other_tokens(interleaved):
    inputs = [noise(23, 3, 20), noise(23, 14, seed=1), noise(23, 14, seed=2)]
    rows_alone(lambda x, c, s: rotary(x, c, s, interleaved, impl="triton"), inputs)


def test_offsets_past_two_to_the_31():
    x, cos, sin = noise(3, 2, 16, dtype=torch.float16), noise(3, 16, seed=1), noise(3, 16, seed=2)
    for interleaved in (False, True):
        got, wanted = (rotary(t, cos, sin, interleaved, impl="triton") for t in (far_apart(x), x))
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("n", [1, 5, 64, 130])
def test_tables(n):
    positions = torch.tensor([[0, 1, 2, 17], [1023, 4097, 131071, 999_999]])
    inv_freq = frequencies(n)
    angles = (positions.float()[..., None] * inv_freq).double()
    for dtype, tolerance in ((torch.float32, 1.2e-7), (torch.float16, 2**-11)):
        with poisoned():
            tables = rotary_tables(positions, inv_freq, 1.3, dtype, impl="triton")
        for got, wanted in zip(tables, (angles.cos(), angles.sin())):
            assert got.dtype == dtype
            close(got, 1.3 * torch.cat((wanted, wanted), -1), tolerance)
    cos, sin = rotary_tables(positions, inv_freq, 1.3, torch.float64, impl="triton")
    exact = positions.double()[..., None] * inv_freq.double()
    close(cos[..., :n], 1.3 * exact.cos(), 1e-15)
    close(sin[..., n:], 1.3 * exact.sin(), 1e-15)


def test_tables_are_those_of_the_reference_but_for_the_last_bit():
    positions = torch.randint(1 << 24, (400,), generator=torch.Generator().manual_seed(0))
    angles = (positions.float()[:, None] * frequencies(16)).double()
    cos, sin = rotary_tables(positions, frequencies(16), impl="triton")
    assert torch.equal(cos[:, :16], angles.cos().float())
    assert torch.equal(sin[:, :16], angles.sin().float())


def test_tables_of_several_axes():
    positions = torch.randint(5000, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    axes = torch.tensor([0, 0, 2, 1, 1, 2, 0])
    got = rotary_tables(positions, frequencies(7), 1.0, torch.float32, axes, impl="triton")
    for f, axis in enumerate(axes):
        alone = rotary_tables(positions[axis], frequencies(7), impl="triton")
        for one, wanted in zip(got, alone):
            assert one.shape == (2, 7, 14)
            assert torch.equal(one[..., [f, f + 7]], wanted[..., [f, f + 7]])
    for bad in (-1, 3):
        axes[4] = bad
        cos, _ = rotary_tables(positions, frequencies(7), 1.0, torch.float32, axes, impl="triton")
        assert cos.isnan().any((0, 1)).nonzero().flatten().tolist() == [4, 11]
    empty = rotary_tables(positions[:, :, :0], frequencies(7), 1.0, torch.float32, axes, impl="triton")
    assert [t.shape for t in empty] == [(2, 0, 14)] * 2


def test_table_rows_do_not_depend_on_other_rows():
    positions = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    rows_alone(lambda p: rotary_tables(p, frequencies(5), impl="triton"), [positions])


def test_bad_input_is_one_sentence():
    with pytest.raises(ToolkitError, match=r"rotary got dtype torch\.float64"):
        rotary(torch.ones(1, 1, 2).double(), torch.ones(1, 2), torch.ones(1, 2), impl="triton")
    with pytest.raises(ToolkitError, match=r"positions of torch.int32; .* int64"):
        rotary_tables(torch.arange(3, dtype=torch.int32), frequencies(2), impl="triton")
