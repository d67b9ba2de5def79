"""Triton causal_conv in Triton's interpreter, against F.conv1d in fp64."""

import pytest
import torch
from test_causal_conv import unshared

from tests.helpers.interpreter import DTYPES, close, far_apart, gradients, noise, poisoned
from tests.helpers.recurrence import Forest, cuts, past_rows, random_forest, tensors
from toolkit.errors import ToolkitError
from toolkit.ops.activation import activation
from toolkit.ops.causal_conv import causal_conv, causal_conv_paged
from toolkit.ops.causal_conv.triton_backward import causal_conv_backward
from toolkit.ops.triton_rows import part_of_row, parts

FOREST: Forest = ([9, 0, 1, 2, 3, 1, 0, 4], [-1, 0, 1, 2, -3, -2, 5, -2])  # 20 rows
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11}
NONE = torch.empty(0, dtype=torch.int64)


def op(x, weight, bias, tails, forest, kind=None):
    past = past_rows(forest, weight.shape[1] - 1)
    return causal_conv(x, weight, bias, tensors(forest)[0], past, tails, kind, impl="triton")


def check(given, forest, kind, dtype):
    """Value and gradients of x, weight, bias (or None) and tails (or None)."""
    x, weight, bias, tails = given
    past, offsets = past_rows(forest, weight.shape[1] - 1), tensors(forest)[0]
    grad = noise(*x.shape, dtype=dtype, seed=11)
    with poisoned():
        y = op(*given, forest, kind)
        got = causal_conv_backward(grad, x, weight, bias, offsets, past, tails, kind)
    leaves = [t for t in given if t is not None]

    def exact(*t):
        rest = list(t[2:])
        return unshared(t[0], t[1], None if bias is None else rest.pop(0), rest.pop() if rest else None, forest, kind)

    close(y, exact(*(t.double() for t in leaves)), TOLERANCE[dtype])
    for one, wanted, leaf in zip([g for g in got if g.numel()], gradients(exact, leaves, [grad]), leaves, strict=True):
        assert one.dtype == leaf.dtype
        close(one, wanted, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, "silu"])
def test_forest_against_unshared_sequences(dtype, kind):
    for width, channels in ((2, 1), (8, 5)) if kind is None else ((4, 37),):
        x, weight, bias = noise(22, channels), noise(channels, width, seed=1, scale=0.5), noise(channels, seed=2)
        given = [t.to(dtype) for t in (x, weight, bias, noise(2, width - 1, channels, seed=3))]
        check(given, FOREST, kind, dtype)
        check([given[0], given[1], None, given[3]], FOREST, kind, dtype)
    no_tails = (FOREST[0], [max(p, -1) for p in FOREST[1]])
    check([*given[:3], None], no_tails, kind, dtype)


def test_a_forest_of_many_tiles():
    forest = random_forest(0, segments=12, longest=90, given=2)
    x, weight = noise(sum(forest[0]) + 1, 70), noise(70, 4, seed=1, scale=0.5)
    assert parts(len(x), part_of_row(70, 4), x)[1] > 1
    check([x, weight, noise(70, seed=2), noise(2, 3, 70, seed=3)], forest, "silu", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 4])
def test_bits_do_not_depend_on_cuts_forests_or_pages(dtype, width):
    rows, branch, fork, channels, held = 40, 12, 17, 19, width - 1
    x, weight = noise(rows + branch, channels, dtype=dtype), noise(channels, width, dtype=dtype, seed=1)
    bias = noise(channels, dtype=dtype, seed=2)
    whole = op(x[:rows], weight, bias, None, ([rows], [-1]), "silu")
    other = op(torch.cat([x[:fork], x[rows:]]), weight, bias, None, ([fork + branch], [-1]), "silu")
    for seed in range(3):
        first = cuts(fork, 2 + seed, seed)
        pieces = [*first, *((a + fork, b + fork) for a, b in cuts(rows - fork, 3 + 3 * seed, seed))]
        trunk = len(pieces)
        forest = ([*(b - a for a, b in pieces), branch], [*range(-1, trunk - 1), len(first) - 1])
        assert torch.equal(op(x, weight, bias, None, forest, "silu"), torch.cat([whole, other[fork:]]))
        tails, parts = torch.full((4, held, channels), torch.nan, dtype=dtype), []
        for i, (a, b) in enumerate(p for p in pieces if p[0] < p[1]):
            save = [(fork - 1 - a, 1)] * (a < fork <= b) + [(b - 1 - a, 2), (b - 1 - a, -1), (b - 1 - a, 99)]
            saves, source = torch.tensor(save).unbind(1), torch.tensor([2 if i else -1])
            offsets = torch.tensor([0, b - a])
            with poisoned():
                parts.append(
                    causal_conv_paged(x[a:b], weight, bias, offsets, source, *saves, tails, "silu", impl="triton")
                )
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(tails[2], x[rows - held : rows])
        assert torch.equal(tails[1], x[fork - held : fork])
        assert tails[[0, 3]].isnan().all()
        rest = causal_conv_paged(
            x[rows:], weight, bias, torch.tensor([0, branch]), torch.tensor([1]), NONE, NONE, tails, "silu",
            impl="triton",
        )  # fmt: skip
        assert torch.equal(rest, other[fork:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_frames_that_are_skipped_repeated_or_of_short_segments(dtype):
    """In place, in half of a larger buffer, in either dtype of tails, with a row of padding."""
    x, weight = noise(9, 5, dtype=dtype), noise(5, 4, dtype=dtype, seed=1)
    offsets, sources = torch.tensor([0, 4, 4, 8]), torch.tensor([-1, 1, 0])
    save_rows, save_frames = torch.tensor([0, 1, 3, 3, 4, 5, 7]), torch.tensor([4, -1, 2, 3, 5, -7, 0])
    for held in (dtype, torch.float32):
        before = noise(7, 3, 5, seed=3).to(dtype).to(held)
        tails = torch.full((7, 2, 3, 8), torch.nan, dtype=held)[:, 1, :, :5].copy_(before)
        args = (offsets, sources, save_rows, save_frames, tails)
        with poisoned():
            y = causal_conv_paged(x, weight, None, *args, "silu", impl="triton")
        assert torch.equal(y, op(x, weight, None, before[:2], ([4, 0, 4], [-1, -3, -2]), "silu"))
        assert not y[8].any()
        short = torch.cat([torch.zeros(2, 5), x[:1]])
        third = torch.cat([before[0, 1:], x[4:5].to(held)])
        wanted = [x[5:8], before[1], x[1:4], x[1:4], short, third, before[6]]
        assert torch.equal(tails, torch.stack([t.to(held) for t in wanted]))


def test_activation_has_the_bits_of_the_op():
    x, weight = noise(30, 33, scale=4.0), noise(33, 4, seed=1)
    plain, silu = (op(x, weight, None, None, ([30], [-1]), kind) for kind in (None, "silu"))
    assert torch.equal(silu, activation(plain, "silu", impl="triton"))


def test_strides_and_offsets_past_two_to_the_31():
    wide, weight, bias = noise(20, 40), noise(8, 7, seed=1)[:, ::2], noise(16, seed=2)[::2]
    tails, forest = noise(3, 2, 8, seed=3).transpose(0, 1), FOREST
    packed = wide[:, 8:16].contiguous()
    results = []
    for x in (packed, wide[:, 8:16], packed.t().contiguous().t(), far_apart(packed)):
        args = (tensors(forest)[0], past_rows(forest, 3), tails, "silu")
        results.append([op(x, weight, bias, tails, forest, "silu"), *causal_conv_backward(x, x, weight, bias, *args)])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    frames = far_apart(noise(3, 3, 8))
    last = torch.tensor([19])
    offsets, source = torch.tensor([0, 20]), torch.tensor([2])
    y = causal_conv_paged(packed, weight, bias, offsets, source, last, source, frames, impl="triton")
    assert torch.equal(y, op(packed, weight, bias, noise(3, 3, 8)[2:], ([20], [-2])))
    assert torch.equal(frames[2], packed[17:])


def test_no_rows_and_no_segments():
    weight, bias, tails = noise(5, 3, seed=1), noise(5, seed=2), noise(1, 2, 5, seed=3)
    for rows, forest in ((0, ([], [])), (0, ([0, 0], [-1, 0])), (3, ([], [])), (3, ([0], [-2]))):
        x, past = noise(rows, 5), past_rows(forest, 2)
        with poisoned():
            y = op(x, weight, bias, tails, forest)
            grads = causal_conv_backward(x, x, weight, bias, tensors(forest)[0], past, tails, None)
        assert y.shape == (rows, 5)
        assert not any(t.any() for t in (y, *grads))


def test_extreme_values():
    """NaN and inf stay where they are read, also in the gradient."""
    x = torch.ones(12, 1)
    x[4], x[9] = torch.nan, torch.inf
    y = op(x, torch.ones(1, 2), None, None, ([6, 6], [-1, -1]), "silu")[:, 0]
    assert y.isnan().nonzero().flatten().tolist() == [4, 5]
    assert y.isinf().nonzero().flatten().tolist() == [9, 10]


def test_bad_input_is_one_sentence():
    with pytest.raises(ToolkitError, match="float64"):
        op(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 2), None, None, ([2], [-1]))
