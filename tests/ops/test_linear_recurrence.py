"""linear_recurrence against unshared float64 sequences and transformers' own rules; its result over cuts and trees."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.implementations import NATIVE, REFERENCE, TRITON, impl_and_dtype, implementations, only_triton
from tests.helpers.interpreter import far_apart, gradients
from tests.helpers.recurrence import PrefixTrees, cuts, inputs, poisoned, random_trees, tensors, unshared
from tests.helpers.rowwise import check_oracle, check_repeatable, error, run, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.linear_recurrence import linear_recurrence, tiles
from toolkit.ops.linear_recurrence import linear_recurrence_paged as paged
from toolkit.ops.registry import has_native
from toolkit.testing.oracle import lifted_to_double

needs_native = pytest.mark.skipif(not has_native("linear_recurrence"), reason="the native CPU library is not built")
# Sums of up to 600 products in every token, and what 20 tokens hand on.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1.3e-3}
forward, backward = torch.ops.toolkit.linear_recurrence, torch.ops.toolkit.linear_recurrence_backward
TREES: PrefixTrees = ([9, 0, 5, 7, 3, 1, 0, 4], [-1, 0, 1, 0, -3, -2, 5, -2])  # 29 rows


def op(given, trees, scale=0.3, delta=True, initial=None, impl=None):
    return linear_recurrence(*given, *tensors(trees), initial, scale, delta, impl=impl)


@impl_and_dtype()
@pytest.mark.parametrize("delta", [True, False])
def test_trees_against_unshared_sequences(impl, delta, dtype):
    upcast = torch.float64 if dtype == torch.float64 else torch.float32
    bound = {torch.float32: (2e-6, 3e-6), torch.float16: (2**-10, 1.5 * 2**-10)} if impl is TRITON else TOLERANCE
    bound = bound.get(dtype, TOLERANCE[dtype])
    shapes = ((1, 1, 1, 1), (2, 4, 5, 7), (1, 3, 16, 33)) if dtype.itemsize > 2 else ((1, 3, 16, 33),)
    if impl is TRITON:  # the interpreter takes a token at a time
        shapes = ((1, 2, 5, 19),)
    for key_heads, heads, depth, width in shapes:
        given = inputs(31, key_heads, heads, depth, width, dtype)
        initial = 0.5 * seeded(2, heads, depth, width, dtype=upcast, seed=9)
        for weighted in (True, False) if impl is not TRITON or delta else (True,):

            def ours(q, k, v, g, beta, initial, weighted=weighted):
                return op((q, k, v, g, beta if weighted else None), TREES, 0.3, delta, initial, impl.option)

            def exact(q, k, v, g, beta, initial, weighted=weighted):
                return unshared(q, k, v, g, beta if weighted else None, initial, TREES, 0.3, delta)

            if weighted:
                check_oracle(ours, exact, [*given, initial], bound)
            else:
                without = [x for i, x in enumerate([*given, initial]) if i != 4]
                check_oracle(
                    lambda *x, f=ours: f(*x[:4], None, x[4]),
                    lambda *x, f=exact: f(*x[:4], None, x[4]),
                    without,
                    bound,
                )


@pytest.mark.parametrize("seed", range(4))
def test_random_segment_trees(impl, seed):
    trees = random_trees(seed, segments=12, given=2)
    given = inputs(sum(trees[0]) + seed % 2, 1, 2, 6, 5, seed=seed)
    initial = seeded(2, 2, 6, 5, seed=9)
    check_oracle(
        lambda *x: op(x[:5], trees, 0.3, seed % 2 == 0, x[5], impl.option),
        lambda *x: unshared(*x, trees, 0.3, seed % 2 == 0),
        [*given, initial],
        impl.near(1e-13),
    )


@implementations(REFERENCE, NATIVE)
@pytest.mark.parametrize("delta", [True, False])
def test_more_tokens_than_a_chunk(impl, delta):
    """Kept states are used, those of every share of the rows; heads beyond what one part sums."""
    trees = ([130, 64, 65, 63], [-1, 0, 0, -1])
    given = inputs(323, 1, 2, 3, 4, torch.float64)
    check_oracle(
        lambda *x: op(x, trees, 0.3, delta, impl=impl.option),
        lambda *x: unshared(*x, None, trees, 0.3, delta),
        given,
        1e-13,
    )
    many = inputs(9, 1, 37, 4, 18, torch.float64)
    trees = ([4, 5], [-1, 0])
    check_oracle(
        lambda *x: op(x, trees, 0.3, delta, impl=impl.option),
        lambda *x: unshared(*x, None, trees, 0.3, delta),
        many,
        1e-13,
    )


def test_each_result_alone(impl):
    given = inputs(29, 1, 2, 6, 5)
    initial = seeded(2, 2, 6, 5, seed=9)
    for which in (0, 1):

        def alone(results, x, i=which):  # in the graph of every input, of q too
            return results[i] + 0 * sum(y.sum() for y in x)

        check_oracle(
            lambda *x, f=alone: f(op(x[:5], TREES, 0.3, True, x[5], impl.option), x),
            lambda *x, f=alone: f(unshared(*x, TREES, 0.3, True), x),
            [*given, initial],
            impl.near(1e-13),
        )


@implementations(REFERENCE, NATIVE)
def test_transformers_gated_delta_rule(impl):
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    given = inputs(150, 2, 4, 8, 8, torch.float64)
    initial = seeded(1, 4, 8, 8, seed=9)
    trees = ([150], [-2])

    def theirs(name):
        def call(q, k, v, g, beta, initial):
            with lifted_to_double():
                rows = [x[None] for x in (q, k, v, g, beta)]
                out, final = getattr(modeling, name)(*rows, initial_state=initial, output_final_state=True)
            return out[0], final

        return call

    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        check_oracle(
            lambda *x: op(x[:5], trees, 8**-0.5, True, x[5], impl.option), theirs(name), [*given, initial], 1e-12
        )


@implementations(REFERENCE, NATIVE)
def test_transformers_ssd(impl):
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    heads, groups, state, width, rows = 4, 2, 8, 6, 70
    x, b, c = seeded(rows, heads, width), seeded(rows, groups, state, seed=1), seeded(rows, groups, state, seed=2)
    dt, a = F.softplus(seeded(rows, heads, seed=3)), -seeded(heads, seed=4).exp()

    def theirs(x, b, c, dt):
        with lifted_to_double():
            out, final = modeling.mamba2_chunk_scan(
                x[None], dt[None], a, b[None], c[None], chunk_size=32, return_final_states=True
            )
        return out[0], final.mT

    check_oracle(
        lambda x, b, c, dt: op((c, b, x, dt * a, dt), ([rows], [-1]), 1.0, False, impl=impl.option),
        theirs,
        [x, b, c, dt],
        1e-12,
    )


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


def test_strided_inputs(impl):
    joined = seeded(12, 3, 40)
    q, k, v = joined[..., 2:8], joined[..., 8:14], joined[..., 14:21]
    g, beta = -joined[..., 30].abs(), joined[..., 31].sigmoid()
    trees = ([5, 7], [-1, 0])
    for given in ([q, k, v, g, beta], [joined[..., 0:12:2], k, seeded(3, 12, 7, seed=1).transpose(0, 1), g, beta]):
        y, grads = run(lambda *x: op(x, trees, impl=impl.option), given)
        z, wanted = run(lambda *x: op(x, trees, impl="reference"), [x.contiguous() for x in given])
        assert max(map(error, [*y, *grads], [*z, *wanted])) < impl.near(1e-13)


def test_no_rows_and_no_segments(impl):
    for rows, trees in ((0, ([], [])), (0, ([0, 0], [-1, 0])), (3, ([], [])), (3, ([0], [-2]))):
        given = inputs(rows, 1, 2, 4, 3, torch.float32)
        initial = seeded(1, 2, 4, 3, dtype=torch.float32)
        leaves = [x.requires_grad_() for x in [*given, initial]]
        out, finals = op(leaves[:5], trees, initial=leaves[5], impl=impl.option)
        assert out.shape == (rows, 2, 3)
        assert not out.any()
        assert finals.shape == (len(trees[0]), 2, 4, 3)
        if impl is not REFERENCE:
            *grads, to_initial = torch.autograd.grad(finals.sum() + out.sum(), leaves)
            assert not any(grad.any() for grad in grads)
            assert to_initial.eq(float(trees[1] == [-2])).all()
        if trees[1] == [-2]:
            assert torch.equal(finals, initial)


@pytest.mark.parametrize("delta", [True, False])
def test_a_decay_of_zero_forgets(impl, delta):
    """At g = -inf the rest of a segment has the bits of a start from zeros, and no gradient passes."""
    given = inputs(20, 1, 2, 6, 5, torch.float32)
    given[3][10] = -torch.inf
    leaves = [x.requires_grad_() for x in given]
    out, finals = op(leaves, ([20], [-1]), delta=delta, impl=impl.option)
    rest, end = op([x[10:].detach() for x in given], ([10], [-1]), delta=delta, impl=impl.option)
    assert torch.equal(out[10:], rest)
    assert torch.equal(finals, end)
    grads = torch.autograd.grad(out[10:].sum() + finals.sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert not any(grad[:10].any() for grad in grads)
    assert not grads[3][10].any()


@implementations(REFERENCE, NATIVE)
def test_extreme_values(impl):
    """Decays that underflow and states of 1e30 stay finite; NaN stays in its head and sequence."""
    given = inputs(12, 1, 2, 6, 5, torch.float32)
    given[3][::2] = -1e4
    given[2] *= 1e30
    (out, finals), grads = run(lambda *x: op(x, ([6, 6], [-1, -1]), impl=impl.option), given)
    assert all(x.isfinite().all() for x in (out, finals, *grads[2:3]))
    given[2][2, 0, 0] = torch.nan
    poisoned, _ = op(given, ([6, 6], [-1, -1]), impl=impl.option)
    assert poisoned[2:6, 0, 0].isnan().sum() == 4 - int(poisoned.isfinite()[2:6, 0, 0].sum())
    assert torch.equal(poisoned[6:], out[6:])
    assert torch.equal(poisoned[:, 1], out[:, 1])


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


def test_gradient_only_where_it_is_wanted():
    given = inputs(70, 1, 2, 6, 5, torch.float64)
    for wanted in range(5):
        leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(given)]
        out, _ = op(leaves, ([70], [-1]))
        (got,) = torch.autograd.grad(out.sum(), leaves[wanted])
        out, _ = op(leaves, ([70], [-1]), impl="reference")
        assert error(got, torch.autograd.grad(out.sum(), leaves[wanted])[0]) < 1e-13
    with torch.no_grad():
        assert not op(leaves, ([70], [-1]))[0].requires_grad


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


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(delta, full):
    q, k, v, g, beta = (x.requires_grad_() for x in inputs(70, 1, 2, 4, 3, torch.float32))
    initial = seeded(1, 2, 4, 3, dtype=torch.float32).requires_grad_() if full else None
    trees = tensors(([66, 2, 0], [-2 if full else -1, 0, -1]))
    ops = torch.ops.toolkit
    given = (q, k, v, g, beta if full else None, *trees, initial, 0.3, delta)
    torch.library.opcheck(ops.linear_recurrence.default, (*given, True))
    flat = [x.detach() if isinstance(x, torch.Tensor) else x for x in given[:8]]
    out, finals, kept = ops.linear_recurrence(*flat, 0.3, delta, True)
    arguments = (torch.ones_like(out), torch.ones_like(finals) if full else None, *flat, finals, kept, 0.3, delta)
    torch.library.opcheck(ops.linear_recurrence_backward.default, arguments)
    index = torch.tensor([1, 0, -1])
    stores = torch.tensor([65, 67])
    arguments = (*flat[:6], index, stores, stores - 65, seeded(3, 2, 4, 3, dtype=torch.float32), 0.3, delta)
    torch.library.opcheck(ops.linear_recurrence_paged.default, arguments)


def test_compiled_in_one_graph():
    given = [x.requires_grad_() for x in inputs(20, 1, 2, 4, 3, torch.float32)]
    trees = tensors(([9, 11], [-1, 0]))

    def loss(*x):
        out, finals = linear_recurrence(*x, *trees, None, 0.3)
        return out.square().sum() + finals.sum()

    wanted = torch.autograd.grad(loss(*given), given)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, torch.autograd.grad(compiled(*given), given), wanted))


def test_bad_input_is_named():
    q, k, v, g, beta = inputs(5, 2, 4, 6, 3, torch.float32)
    offsets, parents = torch.tensor([0, 2, 5]), torch.tensor([-1, 0])
    with pytest.raises(ToolkitError, match=r"heads of v must be a multiple of those of k, 2, got 3"):
        linear_recurrence(q, k, v[:, :3], g, beta, offsets, parents)
    with pytest.raises(ToolkitError, match=r"dtypes .* must be equal"):
        linear_recurrence(q, k.double(), v, g, beta, offsets, parents)
    with pytest.raises(ToolkitError, match=r"q, k, v must have shapes"):
        linear_recurrence(q, k[:3], v, g, beta, offsets, parents)
    with pytest.raises(ToolkitError, match=r"beta must be floating point \[5, 4\], got .* \[5, 2\]"):
        linear_recurrence(q, k, v, g, beta[:, :2], offsets, parents)
    with pytest.raises(ToolkitError, match=r"parents must be int64 \[2\], got torch.int32"):
        linear_recurrence(q, k, v, g, beta, offsets, parents.int())
    with pytest.raises(ToolkitError, match=r"initial must have shape \['N', 4, 6, 3\] and dtype torch.float32"):
        linear_recurrence(q, k, v, g, beta, offsets, parents, torch.zeros(1, 4, 6, 2))
    frames = torch.zeros(2, 4, 3, 6).mT
    with pytest.raises(ToolkitError, match="contiguous last dimension"):
        paged(q, k, v, g, beta, offsets, parents, parents[:0], parents[:0], frames)


@needs_native
def test_indices_out_of_range_are_named_and_nothing_is_written():
    given = inputs(5, 2, 4, 6, 3, torch.float32)
    for lengths, parents, message in (
        ([2, 4], [-1, 0], r"query_offsets\[2\] is 6; there are 5 rows"),
        ([2, -1], [-1, 0], r"query_offsets\[2\] is 1; must not be less than the one before, 2"),
        ([2, 3], [-1, 1], r"parents\[1\] must be an earlier segment, -1, .*, got 1"),
        ([2, 3], [-1, -2], r"parents\[1\] must be .* the 0 states of initial, got -2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(given, (lengths, parents))
    states = torch.zeros(2, 4, 6, 3)
    offsets = torch.tensor([0, 2, 5])
    for sources, rows, frames, message in (
        ([0, 2], [1], [0], r"sources\[1\] is 2; there are 2 frames"),
        ([0, 1], [1], [2], r"save_frames\[0\] is 2; there are 2 frames"),
        ([0, 1], [3, 1], [0, 1], r"save_rows\[1\] is 1; ascending rows below 5"),
        ([0, 1], [5], [0], r"save_rows\[0\] is 5; ascending rows below 5"),
    ):
        indices = (torch.tensor(x) for x in (sources, rows, frames))
        with pytest.raises(RuntimeError, match=message):
            paged(*given, offsets, *indices, states)
    assert not states.any()
