"""linear_recurrence: bits over schedules and threads, state in place, and what the Triton launcher does."""

import pytest
import torch

from tests.helpers.implementations import NATIVE, REFERENCE, TRITON, impl_and_dtype, implementations, only_triton
from tests.helpers.interpreter import far_apart, gradients
from tests.helpers.recurrence import PrefixTrees, cuts, inputs, poisoned, random_trees, tensors, unshared
from tests.helpers.rowwise import check_repeatable, error, run, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.linear_recurrence import linear_recurrence, tiles
from toolkit.ops.linear_recurrence import linear_recurrence_paged as paged
from toolkit.ops.registry import has_native

needs_native = pytest.mark.skipif(not has_native("linear_recurrence"), reason="the native CPU library is not built")
# Sums of up to 600 products in every token, and what 20 tokens hand on.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1.3e-3}
forward, backward = torch.ops.toolkit.linear_recurrence, torch.ops.toolkit.linear_recurrence_backward
TREES: PrefixTrees = ([9, 0, 5, 7, 3, 1, 0, 4], [-1, 0, 1, 0, -3, -2, 5, -2])  # 29 rows


def op(given, trees, scale=0.3, delta=True, initial=None, impl=None):
    return linear_recurrence(*given, *tensors(trees), initial, scale, delta, impl=impl)


@impl_and_dtype([torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta", [True, False])
def test_bits_do_not_depend_on_cuts_trees_or_pages(impl, delta, dtype):
    """One sequence and a branch of it: whole, cut at random into segments, and in paged calls."""
    rows, branch, fork = (14, 4, 6) if impl is TRITON else (90, 20, 40)
    key_heads, *heads = (1, 1, 6, 19) if impl is TRITON else (2, 4, 10, 19)
    given = inputs(rows + branch, key_heads, *heads, dtype)
    upcast = torch.float64 if dtype == torch.float64 else torch.float32
    alone = [torch.cat([x[:fork], x[rows:]]) for x in given]
    whole, final = op([x[:rows] for x in given], ([rows], [-1]), delta=delta, impl=impl.option)
    other, other_final = op(alone, ([fork + branch], [-1]), delta=delta, impl=impl.option)
    wanted, ends = torch.cat([whole, other[fork:]]), torch.cat([final, other_final])
    for seed in (1,) if impl is TRITON else range(4):
        chunks = [*cuts(fork, 2, seed), *((a + fork, b + fork) for a, b in cuts(rows - fork, 3, seed))]
        lengths = [b - a for a, b in chunks]
        trunk = len(lengths)
        parents = [*range(-1, trunk - 1), 2, trunk]
        tail = cuts(branch, 1, seed)
        with threads(1 + seed % 2):
            out, finals = op(given, ([*lengths, *(b - a for a, b in tail)], parents), delta=delta, impl=impl.option)
        assert torch.equal(out, wanted)
        assert torch.equal(finals[[trunk - 1, -1]], ends)

        # Cut into calls: a snapshot at the fork goes to frame 1, the sequence itself lives in frame 2.
        states, parts = torch.full((4, *heads), torch.nan, dtype=upcast), []
        for i, (a, b) in enumerate(p for p in chunks if p[0] < p[1]):
            save = [(fork - 1, 1)] * (a < fork <= b) + [(b - 1, 2)]
            if impl is TRITON:  # frames that are not there are skipped
                save += [(b - 1, -1), (b - 1, 99)]
            save_rows, save_frames = torch.tensor([(row - a, frame) for row, frame in save]).unbind(1)
            offsets, source = torch.tensor([0, b - a]), torch.tensor([2 if i else -1])
            chunk = [x[a:b] for x in given]
            parts.append(paged(*chunk, offsets, source, save_rows, save_frames, states, 0.3, delta, impl=impl.option))
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(states[2], final[0])
        none = torch.empty(0, dtype=torch.int64)
        rest = paged(
            *(x[rows:] for x in given), torch.tensor([0, branch]), torch.tensor([1]), none, none, states, 0.3, delta,
            impl=impl.option,
        )  # fmt: skip
        assert torch.equal(rest, other[fork:])
        assert states[[0, 3]].isnan().all()


@implementations(REFERENCE, NATIVE)
def test_decode_in_place_beside_any_batch_neighbours(impl):
    """Every sequence on its own frame, for any others in the batch, with padding rows after them."""
    given = inputs(7 * 6, 1, 2, 10, 43, torch.float32)
    start = seeded(9, 2, 10, 43, dtype=torch.float32, seed=7)
    alone, wanted = start.clone(), []
    for row in range(42):
        frame, one = torch.tensor([row % 6]), torch.tensor([0])
        chunk = [x[row : row + 1] for x in given]
        wanted.append(paged(*chunk, torch.tensor([0, 1]), frame, one, frame, alone, 0.3, impl=impl.option))
    pool = torch.full((9, 2, 2, 10, 48), torch.nan)[:, 1, ..., :43]  # one of two halves of a larger buffer
    states = pool.copy_(start)
    for step in range(7):
        order = torch.arange(6).roll(step)
        rows = torch.cat([order + 6 * step, torch.tensor([0, 1])])
        stores = torch.arange(6)
        out = paged(*(x[rows] for x in given), torch.arange(7), order, stores, order, states, 0.3, impl=impl.option)
        assert torch.equal(out[:6], torch.cat(wanted)[rows[:6]])
        assert not out[6:].any()
    assert torch.equal(states, alone)
    assert torch.equal(states[6:], start[6:])
    # A step from one frame into another, as after a fork, is the same step; what it started from is left.
    row, last = [x[:1] for x in given], torch.tensor([0])
    for source, target in ((3, 8), (3, 3)):
        index, to = torch.tensor([source]), torch.tensor([target])
        paged(*row, torch.tensor([0, 1]), index, last, to, states, 0.3, impl=impl.option)
        assert torch.equal(states[3], alone[3] if target == 8 else states[8])


def test_paged_frames_that_are_skipped_or_repeated(impl):
    given = inputs(9, 1, 2, 4, 3, torch.float32)
    offsets, sources = torch.tensor([0, 4, 4, 8]), torch.tensor([-1, 1, 0])
    states = seeded(6, 2, 4, 3, dtype=torch.float32)
    before = states.clone()
    save_rows, save_frames = torch.tensor([1, 3, 3, 5, 7]), torch.tensor([-1, 2, 3, -7, 0])
    out = paged(*given, offsets, sources, save_rows, save_frames, states, 0.3, impl=impl.option)
    wanted, finals = op(given, ([4, 0, 4], [-1, -3, -2]), initial=before[:2], impl=impl.option)
    assert torch.equal(out, wanted)
    assert torch.equal(states, torch.stack([finals[2], before[1], finals[0], finals[0], before[4], before[5]]))


@pytest.mark.parametrize("delta", [True, False])
def test_gradient_bits_are_the_same_on_any_number_of_threads(delta):
    trees = random_trees(3, segments=9, longest=90, given=2)
    given = inputs(sum(trees[0]), 2, 6, 33, 35, torch.float32)
    initial = seeded(2, 6, 33, 35, dtype=torch.float32)
    check_repeatable(lambda *x: op(x[:5], trees, 0.3, delta, x[5]), [*given, initial])


@needs_native
def test_results_are_whole():
    """Fresh memory full of NaN: nothing is left unwritten, forward or backward, padding and kept states included."""
    trees = random_trees(5, segments=9, longest=150, given=2)
    given, initial = inputs(sum(trees[0]) + 3, 1, 2, 5, 19, torch.float32), seeded(2, 2, 5, 19, dtype=torch.float32)
    clean = run(lambda *x: op(x[:5], trees, initial=x[5]), [*given, initial])
    with poisoned():
        dirty = run(lambda *x: op(x[:5], trees, initial=x[5]), [*given, initial])
        kept = forward(*given, *tensors(trees), initial, 0.3, True, True)[2]
    assert kept.isfinite().all()
    for got, wanted in zip([*dirty[0], *dirty[1]], [*clean[0], *clean[1]]):
        assert wanted.isfinite().all()
        assert torch.equal(got, wanted)


def test_offsets_past_two_to_the_31():
    """Rows, and frames, further apart than 32 bits can count."""
    given = inputs(2, 1, 1, 6, 16, torch.float32)
    far = 2**31 + 64
    v = torch.empty(far + 16).as_strided((2, 1, 16), (far, 16, 1)).copy_(given[2])
    wanted = run(lambda *x: op(x, ([2], [-1])), given)
    got = run(lambda *x: op(x, ([2], [-1])), [*given[:2], v, *given[3:]])
    assert all(map(torch.equal, [*got[0], *got[1]], [*wanted[0], *wanted[1]]))
    states = torch.empty(far + 96).as_strided((2, 1, 6, 16), (far, 96, 16, 1))
    one = torch.tensor([1])
    paged(*given, torch.tensor([0, 2]), -one, one, one, states, 0.3)
    assert torch.equal(states[1], wanted[0][1][0])


@only_triton
@pytest.mark.parametrize("delta", [True, False])
def test_more_tokens_than_a_chunk_and_more_tasks_than_programs(impl, delta, monkeypatch):
    from toolkit.ops.linear_recurrence import triton as triton_forward
    from toolkit.ops.linear_recurrence import triton_backward

    for module in (triton_forward, triton_backward):  # the interpreter is too slow for chunks of 64
        monkeypatch.setattr(module, "CHUNK", 4)
    monkeypatch.setattr(triton_backward, "SPAN", 2)
    trees = ([7, 4], [-1, -1])
    given = inputs(11, 1, 1, 3, 17, torch.float32)
    out, finals, kept = forward(*given, *tensors(trees), None, 0.3, delta, True)
    upstream = seeded(*out.shape, seed=11), seeded(*finals.shape, seed=12)
    assert tiles.BACKWARD_PROGRAMS["interpreter"] < 2 * 2  # trees and blocks of columns
    got = backward(*upstream, *given, *tensors(trees), None, finals, kept, 0.3, delta)
    wanted = gradients(lambda *x: unshared(*x, None, trees, 0.3, delta), given, list(upstream))
    for x, one in zip(got, wanted):
        assert error(x, one) <= 3e-6


@only_triton
def test_a_gradient_of_one_result_only(impl):
    trees, given = ([2, 1], [-1, 0]), inputs(3, 1, 1, 3, 4, torch.float32)
    out, finals, kept = forward(*given, *tensors(trees), None, 0.3, True, True)
    upstream = seeded(*out.shape, seed=11), seeded(*finals.shape, seed=12)
    for one in ((upstream[0], None), (None, upstream[1])):
        got = backward(*one, *given, *tensors(trees), None, finals, kept, 0.3, True)
        full = [torch.zeros_like(u) if x is None else x for x, u in zip(one, upstream)]
        again = backward(*full, *given, *tensors(trees), None, finals, kept, 0.3, True)
        assert all(map(torch.equal, got, again))


@only_triton
def test_decode_in_place(impl):
    """Every sequence on its own frame, in any order, with a padding row; a frame that does not exist is zeros."""
    given = inputs(5, 1, 2, 6, 19, torch.float32)
    start = seeded(6, 2, 6, 19)
    states = torch.full((6, 2, 2, 6, 24), torch.nan)[:, 1, ..., :19].copy_(start)
    order, rows = torch.tensor([2, 0, 5, 99]), torch.arange(4)
    out = paged(*given, torch.arange(5), order, rows, order, states, 0.3)
    assert not out[4].any()
    wanted, finals = op([x[:4] for x in given], ([1] * 4, [-4, -2, -7, -1]), initial=start)
    assert torch.equal(out[:4], wanted)
    assert torch.equal(states[[2, 0, 5]], finals[:3])
    assert torch.equal(states[[1, 3, 4]], start[[1, 3, 4]])


@only_triton
def test_strides_and_offsets_past_two_to_the_31(impl):
    joined = seeded(6, 2, 40)
    given = [joined[..., 2:8], joined[..., 8:14], joined[..., 14:33], -joined[..., 30].abs(), joined[..., 31].sigmoid()]
    far = [far_apart(given[0].contiguous()), *given[1:]]
    trees = ([2, 1, 3], [-1, 0, 0])
    packed = [x.contiguous() for x in given]
    results = []
    for case in (given, packed, far, [x.half() for x in packed[:3]] + packed[3:]):
        leaves = [x.detach() for x in case]
        out, finals, kept = forward(*leaves, *tensors(trees), None, 0.3, True, True)
        upstream = seeded(6, 19, 2).mT.to(out.dtype), None
        results.append(
            [
                out,
                finals,
                *backward(*upstream, *leaves, *tensors(trees), None, finals, kept, 0.3, True),
            ]
        )
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[2], results[1]))
    assert [x.dtype for x in results[3][2:6]] == [torch.float16] * 3 + [torch.float32]
    states = far_apart(torch.zeros(3, 2, 6, 19))
    last = torch.tensor([5])
    paged(*given, torch.tensor([0, 6]), last - 3, last, last - 3, states, 0.3)
    assert torch.equal(states[2], op(given, ([6], [-1]))[1][0])


@only_triton
def test_groups_of_segments(impl):
    """Against a loop: trees, and trees that share a given state, of deep and broad trees."""
    from toolkit.ops.linear_recurrence.triton import groups

    for parents in ([-1, 0, 1, 0, -2, 4, -3, -2, 7], [-1, *range(40)], [-3] * 5, []):
        for given in (None, 2):
            order, starts = groups(torch.tensor(parents, dtype=torch.int64), given)
            number: list[int] = []
            for s, p in enumerate(parents):
                number.append(number[p] if p >= 0 else len(parents) - 2 - p if given and p < -1 else s)
            for i in range(len(parents) + (given or 0)):
                assert order[starts[i] : starts[i + 1]].tolist() == [s for s, n in enumerate(number) if n == i]


@only_triton
def test_bad_input_is_one_sentence(impl):
    with pytest.raises(
        ToolkitError, match="head size of k must be <= 256 in the Triton kernels of linear_recurrence, got 300"
    ):
        op(inputs(2, 1, 1, 300, 4, torch.float32), ([2], [-1]))
    with pytest.raises(ToolkitError, match="float64"):
        op(inputs(2, 1, 1, 3, 4, torch.float64), ([2], [-1]))
