"""Triton linear_recurrence in Triton's interpreter, against unshared fp64."""

import pytest
import torch

from tests.helpers.interpreter import close, far_apart, gradients, noise, poisoned
from tests.helpers.recurrence import Forest, cuts, inputs, tensors, unshared
from toolkit.errors import ToolkitError
from toolkit.ops.linear_recurrence import linear_recurrence, linear_recurrence_paged, triton_backward
from toolkit.ops.linear_recurrence import triton as triton_forward
from toolkit.ops.linear_recurrence.tiles import BACKWARD_PROGRAMS
from toolkit.ops.linear_recurrence.triton import groups
from toolkit.ops.linear_recurrence.triton import linear_recurrence as forward
from toolkit.ops.linear_recurrence.triton_backward import linear_recurrence_backward as backward

# Two roots from one given state, an empty segment with children, a leaf that is empty, padding rows.
FOREST: Forest = ([5, 0, 3, 2, 4, 1, 0], [-1, 0, 1, 0, -3, -3, 5])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10}


def op(given, forest, initial=None, delta=True):
    return linear_recurrence(*given, *tensors(forest), initial, 0.3, delta, impl="triton")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("delta", "weighted"), [(True, True), (False, True), (True, False)])
def test_forest_against_unshared_sequences(dtype, delta, weighted):
    for key_heads, heads, depth, width in ((1, 2, 5, 19),) if delta and weighted else ((1, 1, 3, 4),):
        given = inputs(17, key_heads, heads, depth, width, dtype)
        given[4] = given[4] if weighted else None
        initial = noise(2, heads, depth, width, seed=9)
        index = tensors(FOREST)
        with poisoned():
            out, finals, kept = forward(*given, *index, initial, 0.3, delta, True)
            upstream = noise(*out.shape, dtype=dtype, seed=11), noise(*finals.shape, seed=12)
            got = backward(*upstream, *given, *index, initial, finals, kept, 0.3, delta)
        leaves = [x for x in (*given, initial) if x is not None]

        def exact(*x):
            return unshared(*x[:4], x[4] if weighted else None, x[-1], FOREST, 0.3, delta)

        wanted = exact(*(x.double() for x in leaves))
        close(out, wanted[0], TOLERANCE[dtype])
        close(finals, wanted[1], 1e-6)
        got = [x for i, x in enumerate(got) if i != 4 or weighted]
        for x, one, leaf in zip(got, gradients(exact, leaves, list(upstream)), leaves, strict=True):
            assert x.dtype == leaf.dtype
            close(x, one, TOLERANCE[dtype] * 1.5)


@pytest.mark.parametrize("delta", [True, False])
def test_more_tokens_than_a_chunk_and_more_tasks_than_programs(delta, monkeypatch):
    for module in (triton_forward, triton_backward):  # the interpreter is too slow for chunks of 64
        monkeypatch.setattr(module, "CHUNK", 4)
    monkeypatch.setattr(triton_backward, "SPAN", 2)
    forest = ([7, 4], [-1, -1])
    given = inputs(11, 1, 1, 3, 17, torch.float32)
    out, finals, kept = forward(*given, *tensors(forest), None, 0.3, delta, True)
    upstream = noise(*out.shape, seed=11), noise(*finals.shape, seed=12)
    assert BACKWARD_PROGRAMS["interpreter"] < 2 * 2  # trees and blocks of columns
    with poisoned():
        got = backward(*upstream, *given, *tensors(forest), None, finals, kept, 0.3, delta)
    wanted = gradients(lambda *x: unshared(*x, None, forest, 0.3, delta), given, list(upstream))
    for x, one in zip(got, wanted):
        close(x, one, 3e-6)


def test_a_gradient_of_one_result_only():
    forest, given = ([2, 1], [-1, 0]), inputs(3, 1, 1, 3, 4, torch.float32)
    out, finals, kept = forward(*given, *tensors(forest), None, 0.3, True, True)
    upstream = noise(*out.shape, seed=11), noise(*finals.shape, seed=12)
    for one in ((upstream[0], None), (None, upstream[1])):
        got = backward(*one, *given, *tensors(forest), None, finals, kept, 0.3, True)
        full = [torch.zeros_like(u) if x is None else x for x, u in zip(one, upstream)]
        again = backward(*full, *given, *tensors(forest), None, finals, kept, 0.3, True)
        assert all(map(torch.equal, got, again))


@pytest.mark.parametrize(("dtype", "delta"), [(torch.float32, True), (torch.float16, False)])
def test_bits_do_not_depend_on_cuts_forests_or_pages(dtype, delta):
    rows, branch, fork = 14, 4, 6
    given = inputs(rows + branch, 1, 1, 6, 19, dtype)
    whole, final = op([x[:rows] for x in given], ([rows], [-1]), delta=delta)
    other, _ = op([torch.cat([x[:fork], x[rows:]]) for x in given], ([fork + branch], [-1]), delta=delta)
    for seed in (1,):
        pieces = [*cuts(fork, 1, seed), *((a + fork, b + fork) for a, b in cuts(rows - fork, 2, seed))]
        lengths, trunk = [b - a for a, b in pieces], len(pieces)
        forest = ([*lengths, branch], [*range(-1, trunk - 1), 1])
        with poisoned():
            out, finals = op(given, forest, delta=delta)
        assert torch.equal(out, torch.cat([whole, other[fork:]]))
        assert torch.equal(finals[trunk - 1], final[0])
        states, parts = torch.full((3, 1, 6, 19), torch.nan), []
        for i, (a, b) in enumerate(p for p in pieces if p[0] < p[1]):
            save = [(fork - 1 - a, 1)] * (a < fork <= b) + [(b - 1 - a, 2), (b - 1 - a, -1), (b - 1 - a, 99)]
            offsets, source = torch.tensor([0, b - a]), torch.tensor([2 if i else -1])
            saves = torch.tensor(save).unbind(1)
            piece = [x[a:b] for x in given]
            with poisoned():
                parts.append(
                    linear_recurrence_paged(*piece, offsets, source, *saves, states, 0.3, delta, impl="triton")
                )
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(states[2], final[0])
        assert states[0].isnan().all()
        none = torch.empty(0, dtype=torch.int64)
        rest = linear_recurrence_paged(
            *(x[rows:] for x in given), torch.tensor([0, branch]), torch.tensor([1]), none, none, states, 0.3, delta,
            impl="triton",
        )  # fmt: skip
        assert torch.equal(rest, other[fork:])


def test_decode_in_place():
    """Every sequence on its own frame, in any order, with a padding row; a frame that does not exist is zeros."""
    given = inputs(5, 1, 2, 6, 19, torch.float32)
    start = noise(6, 2, 6, 19)
    states = torch.full((6, 2, 2, 6, 24), torch.nan)[:, 1, ..., :19].copy_(start)
    order, rows = torch.tensor([2, 0, 5, 99]), torch.arange(4)
    out = linear_recurrence_paged(*given, torch.arange(5), order, rows, order, states, 0.3, impl="triton")
    assert not out[4].any()
    wanted, finals = op([x[:4] for x in given], ([1] * 4, [-4, -2, -7, -1]), start)
    assert torch.equal(out[:4], wanted)
    assert torch.equal(states[[2, 0, 5]], finals[:3])
    assert torch.equal(states[[1, 3, 4]], start[[1, 3, 4]])


def test_strides_and_offsets_past_two_to_the_31():
    wide = noise(6, 2, 40)
    given = [wide[..., 2:8], wide[..., 8:14], wide[..., 14:33], -wide[..., 30].abs(), wide[..., 31].sigmoid()]
    far = [far_apart(given[0].contiguous()), *given[1:]]
    forest = ([2, 1, 3], [-1, 0, 0])
    packed = [x.contiguous() for x in given]
    results = []
    for case in (given, packed, far, [x.half() for x in packed[:3]] + packed[3:]):
        leaves = [x.detach() for x in case]
        out, finals, kept = forward(*leaves, *tensors(forest), None, 0.3, True, True)
        upstream = noise(6, 19, 2).mT.to(out.dtype), None
        results.append([out, finals, *backward(*upstream, *leaves, *tensors(forest), None, finals, kept, 0.3, True)])
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[2], results[1]))
    assert [x.dtype for x in results[3][2:6]] == [torch.float16] * 3 + [torch.float32]
    states = far_apart(torch.zeros(3, 2, 6, 19))
    last = torch.tensor([5])
    linear_recurrence_paged(*given, torch.tensor([0, 6]), last - 3, last, last - 3, states, 0.3, impl="triton")
    assert torch.equal(states[2], op(given, ([6], [-1]))[1][0])


@pytest.mark.parametrize("delta", [True, False])
def test_a_decay_of_zero_forgets(delta):
    given = inputs(12, 1, 2, 6, 5, torch.float32)
    given[3][7] = -torch.inf
    out, finals, kept = forward(*given, *tensors(([12], [-1])), None, 0.3, delta, True)
    rest, end = op([x[7:] for x in given], ([5], [-1]), delta=delta)
    assert torch.equal(out[7:], rest)
    assert torch.equal(finals, end)
    upstream = torch.zeros_like(out)
    upstream[7:] = 1
    grads = backward(upstream, None, *given, *tensors(([12], [-1])), None, finals, kept, 0.3, delta)
    assert all(x.isfinite().all() for x in grads)
    assert not any(x[:7].any() for x in grads[:5])


def test_no_rows_and_no_segments():
    for rows, forest in ((0, ([], [])), (0, ([0, 0], [-1, 0])), (3, ([], [])), (3, ([0], [-2]))):
        given, initial = inputs(rows, 1, 2, 4, 3, torch.float32), noise(1, 2, 4, 3)
        with poisoned():
            out, finals, kept = forward(*given, *tensors(forest), initial, 0.3, True, True)
            grads = backward(out, torch.ones_like(finals), *given, *tensors(forest), initial, finals, kept, 0.3, True)
        assert not out.any()
        assert not any(x.any() for x in grads[:5])
        assert grads[5].eq(float(forest[1] == [-2])).all()


def test_groups_of_segments():
    """Against a loop: trees, and trees that share a given state, of a deep and a wide forest."""
    for parents in ([-1, 0, 1, 0, -2, 4, -3, -2, 7], [-1, *range(40)], [-3] * 5, []):
        for given in (None, 2):
            order, starts = groups(torch.tensor(parents, dtype=torch.int64), given)
            number: list[int] = []
            for s, p in enumerate(parents):
                number.append(number[p] if p >= 0 else len(parents) - 2 - p if given and p < -1 else s)
            for i in range(len(parents) + (given or 0)):
                assert order[starts[i] : starts[i + 1]].tolist() == [s for s, n in enumerate(number) if n == i]


def test_bad_input_is_one_sentence():
    with pytest.raises(
        ToolkitError, match="head size of k must be <= 256 in the Triton kernels of linear_recurrence, got 300"
    ):
        op(inputs(2, 1, 1, 300, 4, torch.float32), ([2], [-1]))
    with pytest.raises(ToolkitError, match="float64"):
        op(inputs(2, 1, 1, 3, 4, torch.float64), ([2], [-1]))
