"""linear_recurrence against unshared float64 sequences and transformers' own rules; its result over cuts and trees."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.implementations import NATIVE, REFERENCE, TRITON, impl_and, impl_and_dtype, implementations
from tests.helpers.recurrence import PrefixTrees, inputs, random_trees, tensors, unshared
from tests.helpers.rowwise import check_oracle, error, run, seeded
from toolkit.errors import ToolkitError
from toolkit.ops.linear_recurrence import linear_recurrence
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


@impl_and("seed", range(4), [1, 2])
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
