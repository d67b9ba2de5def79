"""causal_conv against F.conv1d of unshared float64 sequences; its result over cuts, prefix trees and pages."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.implementations import (
    NATIVE,
    REFERENCE,
    TRITON,
    impl_and,
    impl_and_dtype,
    impl_dtype_and,
    implementations,
    only_triton,
)
from tests.helpers.interpreter import far_apart
from tests.helpers.recurrence import PrefixTrees, cuts, past_rows, poisoned, random_trees, sequences, tensors
from tests.helpers.rowwise import check_oracle, check_repeatable, error, run, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.activation import activation
from toolkit.ops.causal_conv import causal_conv
from toolkit.ops.causal_conv import causal_conv_paged as paged
from toolkit.ops.registry import has_native

needs_native = pytest.mark.skipif(not has_native("causal_conv"), reason="the native CPU library is not built")
# One rounding of the result; in the gradient to the weight of a 16-bit dtype, of each row's share before it.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
TREES: PrefixTrees = ([9, 0, 1, 2, 3, 1, 0, 4], [-1, 0, 1, 2, -3, -2, 5, -2])  # 20 rows


def op(x, weight, bias, tails, trees, kind=None, option=None):
    return causal_conv(
        x, weight, bias, tensors(trees)[0], past_rows(trees, weight.shape[1] - 1), tails, kind, impl=option
    )


def unshared(x, weight, bias, tails, trees, kind):
    """Every segment's sequence from its beginning through F.conv1d."""
    held = weight.shape[1] - 1
    y = []
    for s, (origin, rows) in enumerate(sequences(trees)):
        before = x.new_zeros(held, x.shape[1]) if origin == -1 else tails[-2 - origin]
        whole = torch.cat([before, x[rows]])
        z = F.conv1d(whole.T[None], weight[:, None], bias, groups=x.shape[1])[0].T if rows else whole[:0]
        y.append(z[len(rows) - trees[0][s] :])
    y.append(x.new_zeros(x.shape[0] - sum(trees[0]), x.shape[1]))
    whole = torch.cat(y) if tails is None else torch.cat(y) + 0 * tails.sum()  # in its graph, also where none is read
    return F.silu(whole) if kind else whole


@impl_and_dtype()
@pytest.mark.parametrize("kind", [None, "silu"])
def test_trees_against_unshared_sequences(impl, dtype, kind):
    for width, channels in ((2, 1), (4, 37), (8, 5)):
        x, weight, bias = seeded(22, channels), seeded(channels, width, seed=1, scale=0.5), seeded(channels, seed=2)
        tails = seeded(2, width - 1, channels, seed=3)
        given = [y.to(dtype) for y in (x, weight, bias, tails)]
        check_oracle(
            lambda *t: op(*t, TREES, kind, impl.option), lambda *t: unshared(*t, TREES, kind), given, TOLERANCE[dtype]
        )
        check_oracle(
            lambda x, w, t: op(x, w, None, t, TREES, kind, impl.option),
            lambda x, w, t: unshared(x, w, None, t, TREES, kind),
            [given[0], given[1], given[3]],
            TOLERANCE[dtype],
        )


@pytest.mark.parametrize("seed", range(6))
def test_random_segment_trees(impl, seed):
    trees = random_trees(seed, segments=15, longest=6, given=2)
    x, weight, bias = seeded(sum(trees[0]) + seed % 2, 6), seeded(6, 2 + seed, seed=1), seeded(6, seed=2)
    tails = seeded(2, 1 + seed, 6, seed=3)
    check_oracle(
        lambda *t: op(*t, trees, "silu", impl.option),
        lambda *t: unshared(*t, trees, "silu"),
        [x, weight, bias, tails],
        impl.near(2e-14, 2e-6),
    )


@implementations(REFERENCE, NATIVE)
def test_dtypes_may_differ(impl):
    """Parameters and tails in float32 under 16-bit rows, as mixed models have them; gradients in their own dtype."""
    x, tails = seeded(22, 6, dtype=torch.bfloat16), seeded(2, 3, 6, dtype=torch.bfloat16, seed=3)
    weight, bias = seeded(6, 4, dtype=torch.float32, seed=1), seeded(6, dtype=torch.float32, seed=2)
    for held in (tails, tails.float()):
        y, grads = run(lambda *t: op(*t, TREES, "silu", impl.option), [x, weight, bias, held])
        assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32, held.dtype]
        wanted, exact = run(lambda *t: unshared(*t, TREES, "silu"), [t.double() for t in (x, weight, bias, tails)])
        assert error(y[0], wanted[0]) < 4e-3
        upstream = seeded(22, 6, dtype=torch.bfloat16, seed=7)
        exact = torch.autograd.grad(
            unshared(*(leaves := [t.double().requires_grad_() for t in (x, weight, bias, tails)]), TREES, "silu"),
            leaves,
            upstream.double(),
        )
        for got, one in zip(grads, exact):
            assert error(got, one) < (4e-3 if got.dtype == torch.bfloat16 else 1e-6)


@impl_dtype_and("width", [2, 4], [4], [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bits_do_not_depend_on_cuts_trees_or_pages(impl, dtype, width):
    """One sequence and a branch of it: whole, cut at random into segments, and in paged calls."""
    rows, branch, fork = (40, 12, 17) if impl is TRITON else (60, 12, 23)
    channels, held = 19, width - 1
    x, weight = seeded(rows + branch, channels, dtype=dtype), seeded(channels, width, dtype=dtype, seed=1)
    bias = seeded(channels, dtype=dtype, seed=2)
    whole = op(x[:rows], weight, bias, None, ([rows], [-1]), "silu", impl.option)
    other = op(torch.cat([x[:fork], x[rows:]]), weight, bias, None, ([fork + branch], [-1]), "silu", impl.option)
    wanted = torch.cat([whole, other[fork:]])
    none = torch.empty(0, dtype=torch.int64)
    for seed in range(3 if impl is TRITON else 6):
        first = cuts(fork, 2 + seed, seed)
        chunks = [*first, *((a + fork, b + fork) for a, b in cuts(rows - fork, 3 + 3 * seed, seed))]
        lengths = [b - a for a, b in chunks]
        trunk, tail = len(lengths), cuts(branch, 3, seed)
        parents = [*range(-1, trunk - 1), len(first) - 1, *range(trunk, trunk + 3)]
        trees = ([*lengths, *(b - a for a, b in tail)], parents)
        with threads(1 + seed % 2):
            assert torch.equal(op(x, weight, bias, None, trees, "silu", impl.option), wanted)

        # Cut into calls: a snapshot at the fork goes to frame 1, the sequence itself lives in frame 2.
        tails, parts = torch.full((4, held, channels), torch.nan, dtype=dtype), []
        for i, (a, b) in enumerate(p for p in chunks if p[0] < p[1]):
            save = [(fork - 1 - a, 1)] * (a < fork <= b) + [(b - 1 - a, 2)]
            if impl is TRITON:  # frames that are not there are skipped
                save += [(b - 1 - a, -1), (b - 1 - a, 99)]
            stores, source = torch.tensor(save).unbind(1), torch.tensor([2 if i else -1])
            offsets = torch.tensor([0, b - a])
            parts.append(paged(x[a:b], weight, bias, offsets, source, *stores, tails, "silu", impl=impl.option))
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(tails[2], x[rows - held : rows])
        assert torch.equal(tails[1], x[fork - held : fork])
        rest = paged(
            x[rows:],
            weight,
            bias,
            torch.tensor([0, branch]),
            torch.tensor([1]),
            none,
            none,
            tails,
            "silu",
            impl=impl.option,
        )
        assert torch.equal(rest, other[fork:])
        assert tails[[0, 3]].isnan().all()


def test_decode_in_place_beside_any_batch_neighbours(impl):
    """Every sequence on its own frame, for any others in the batch, with padding rows after them."""
    x, weight = seeded(42, 19, dtype=torch.float32), seeded(19, 4, dtype=torch.float32, seed=1)
    start = seeded(9, 3, 19, dtype=torch.float32, seed=7)
    alone, wanted = start.clone(), []
    for row in range(42):
        frame, one = torch.tensor([row % 6]), torch.tensor([0])
        offsets = torch.tensor([0, 1])
        wanted.append(paged(x[row, None], weight, None, offsets, frame, one, frame, alone, impl=impl.option))
    tails = torch.full((9, 2, 3, 24), torch.nan)[:, 1, :, :19].copy_(start)
    for step in range(7):
        order = torch.arange(6).roll(step)
        rows = torch.cat([order + 6 * step, torch.tensor([0, 1])])
        stores = torch.arange(6)
        y = paged(x[rows], weight, None, torch.arange(7), order, stores, order, tails, impl=impl.option)
        assert torch.equal(y[:6], torch.cat(wanted)[rows[:6]])
        assert not y[6:].any()
    assert torch.equal(tails, alone)
    assert torch.equal(tails[:6], x[24:].view(3, 6, 19).transpose(0, 1))


@impl_and_dtype([torch.float32, torch.bfloat16, torch.float16])
def test_paged_frames_that_are_skipped_repeated_or_of_short_segments(impl, dtype):
    x, weight = seeded(9, 5, dtype=dtype), seeded(5, 4, dtype=dtype, seed=1)
    offsets, sources = torch.tensor([0, 4, 4, 8]), torch.tensor([-1, 1, 0])
    save_rows, save_frames = torch.tensor([0, 1, 3, 3, 4, 5, 7]), torch.tensor([4, -1, 2, 3, 5, -7, 0])
    for held in (dtype, torch.float32):
        before = seeded(7, 3, 5, seed=3).to(dtype).to(held)
        tails = torch.full((7, 2, 3, 8), torch.nan, dtype=held)[:, 1, :, :5].copy_(before)  # half of a larger buffer
        y = paged(x, weight, None, offsets, sources, save_rows, save_frames, tails, "silu", impl=impl.option)
        assert torch.equal(y, op(x, weight, None, before[:2], ([4, 0, 4], [-1, -3, -2]), "silu", impl.option))
        assert not y[8].any()
        short = torch.cat([torch.zeros(2, 5), x[:1]])
        third = torch.cat([before[0, 1:], x[4:5].to(held)])
        wanted = [x[5:8], before[1], x[1:4], x[1:4], short, third, before[6]]
        assert torch.equal(tails, torch.stack([t.to(held) for t in wanted]))


def test_activation_has_the_bits_of_the_op(impl):
    x, weight = 4 * seeded(30, 33, dtype=torch.float32), seeded(33, 4, dtype=torch.float32, seed=1)
    plain, silu = (op(x, weight, None, None, ([30], [-1]), kind, impl.option) for kind in (None, "silu"))
    assert torch.equal(silu, activation(plain, "silu", impl=impl.option))


@impl_and("kind", [None, "silu"], ["silu"], (NATIVE, TRITON))
def test_gradient_bits_are_the_same_on_any_number_of_threads(impl, kind):
    trees = random_trees(3, segments=6 if impl is TRITON else 40, longest=90, given=2)
    x, weight = seeded(sum(trees[0]), 70, dtype=torch.float32), seeded(70, 4, dtype=torch.float32, seed=1)
    bias, tails = seeded(70, dtype=torch.float32, seed=2), seeded(2, 3, 70, dtype=torch.float32, seed=3)
    check_repeatable(lambda *t: op(*t, trees, kind), [x, weight, bias, tails])


@needs_native
def test_results_are_whole():
    """Fresh memory full of NaN: nothing is left unwritten, forward or backward, padding included."""
    trees = random_trees(5, segments=9, longest=30, given=2)
    x, weight = seeded(sum(trees[0]) + 3, 19, dtype=torch.float32), seeded(19, 4, dtype=torch.float32, seed=1)
    given = [x, weight, seeded(19, dtype=torch.float32, seed=2), seeded(2, 3, 19, dtype=torch.float32, seed=3)]
    clean = run(lambda *t: op(*t, trees, "silu"), given)
    with poisoned():
        dirty = run(lambda *t: op(*t, trees, "silu"), given)
    for got, wanted in zip([*dirty[0], *dirty[1]], [*clean[0], *clean[1]]):
        assert wanted.isfinite().all()
        assert torch.equal(got, wanted)


def test_strided_inputs(impl):
    joined, weight, bias = seeded(20, 40), seeded(8, 7, seed=1)[:, ::2], seeded(16, seed=2)[::2]
    tails = seeded(3, 2, 8, seed=3).transpose(0, 1)
    for x in (joined[:, 8:16], joined[:, :32:4], seeded(8, 20, seed=4).T):
        for weight_of in (weight, seeded(4, 8, seed=5).T):
            given = [x, weight_of, bias, tails]
            y, grads = run(lambda *t: op(*t, TREES, "silu", impl.option), given)
            z, wanted = run(lambda *t: op(*t, TREES, "silu", "reference"), [t.contiguous() for t in given])
            assert y[0].is_contiguous()
            assert max(map(error, [*y, *grads], [*z, *wanted])) < impl.near(1e-14, 2e-6)


def test_no_rows_and_no_segments(impl):
    weight, bias, tails = seeded(5, 3, seed=1), seeded(5, seed=2), seeded(1, 2, 5, seed=3)
    for rows, trees in ((0, ([], [])), (0, ([0, 0], [-1, 0])), (3, ([], [])), (3, ([0], [-2]))):
        y, grads = run(lambda *t, f=trees: op(*t, f, None, impl.option), [seeded(rows, 5), weight, bias, tails])
        assert y[0].shape == (rows, 5)
        assert not any(t.any() for t in (*y, *grads))


def test_extreme_values(impl):
    """Sums that overflow the 16-bit format or reach the limits of silu; NaN and inf stay where they are read."""
    x = torch.tensor([1e30, -1e30, 1e4, -1e4, 0.0, 1.0, torch.nan, 1.0, 1.0, 1.0, torch.inf, 1.0, 1.0])[:, None]
    y = op(x, torch.ones(1, 2), None, None, ([13], [-1]), "silu", impl.option)[:, 0]
    assert torch.equal(y[:6].isfinite(), torch.ones(6, dtype=torch.bool))
    assert y[0] == 1e30
    assert y[3].eq(0)  # 1e4 - 1e4
    assert y.isnan().nonzero().flatten().tolist() == [6, 7]
    assert y.isinf().nonzero().flatten().tolist() == [10, 11]


@implementations(NATIVE, TRITON)
def test_offsets_past_two_to_the_31(impl):
    """Rows, and frames, further apart than 32 bits can count."""
    far = 2**31 + 64
    x = torch.empty(far + 48, dtype=torch.float32).as_strided((2, 48), (far, 1)).copy_(seeded(2, 48))
    weight = seeded(48, 2, dtype=torch.float32, seed=1)
    got, wanted = (run(lambda *t: op(*t, None, None, ([2], [-1]), "silu"), [t, weight]) for t in (x, x.contiguous()))
    assert all(map(torch.equal, [*got[0], *got[1]], [*wanted[0], *wanted[1]]))
    tails = torch.empty(far + 48, dtype=torch.float32).as_strided((2, 1, 48), (far, 48, 1))
    tails.fill_(0.0)
    one = torch.tensor([1])
    paged(x, weight, None, torch.tensor([0, 2]), one, one, one, tails)
    assert torch.equal(tails[1], x[1:])


@only_triton
def test_trees_of_many_tiles(impl):
    from toolkit.ops.triton_rows import part_of_row, parts

    trees = random_trees(0, segments=12, longest=90, given=2)
    x, weight, bias, tails = (
        seeded(sum(trees[0]) + 1, 70),
        seeded(70, 4, seed=1, scale=0.5),
        seeded(70),
        seeded(2, 3, 70),
    )
    assert parts(len(x), part_of_row(70, 4), x)[1] > 1
    given = [x, weight, bias, tails]
    check_oracle(lambda *t: op(*t, trees, "silu"), lambda *t: unshared(*t, trees, "silu"), given, (1e-6, 2e-6))


@implementations(NATIVE, TRITON)
def test_strides_do_not_matter(impl):
    joined, weight, bias = (seeded(*s, dtype=torch.float32, seed=i) for i, s in enumerate([(20, 40), (8, 7), (16,)]))
    weight, bias = weight[:, ::2], bias[::2]
    tails = seeded(3, 2, 8, dtype=torch.float32, seed=3).transpose(0, 1)
    packed = joined[:, 8:16].contiguous()
    index = tensors(TREES)[0], past_rows(TREES, 3), tails, "silu"
    backward = torch.ops.toolkit.causal_conv_backward
    results = [
        [op(x, weight, bias, tails, TREES, "silu"), *backward(x, x, weight, bias, *index)]
        for x in (packed, joined[:, 8:16], packed.t().contiguous().t(), far_apart(packed))
    ]
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    frames = far_apart(seeded(3, 3, 8, dtype=torch.float32))
    held, last, source = frames[2:].clone(), torch.tensor([19]), torch.tensor([2])
    y = paged(packed, weight, bias, torch.tensor([0, 20]), source, last, source, frames)
    assert torch.equal(y, op(packed, weight, bias, held, ([20], [-2])))
    assert torch.equal(frames[2], packed[17:])


@pytest.mark.parametrize("full", [True, False])
def test_opcheck(full):
    x, weight = (seeded(*shape, dtype=torch.float32).requires_grad_() for shape in ((22, 6), (6, 4)))
    bias = seeded(6, dtype=torch.float32).requires_grad_() if full else None
    tails = seeded(2, 3, 6, dtype=torch.float32).requires_grad_() if full else None
    trees = TREES if full else ([20], [-1])
    indices = tensors(trees)[0], past_rows(trees, 3)
    ops, kind = torch.ops.toolkit, "silu" if full else None
    torch.library.opcheck(ops.causal_conv.default, (x, weight, bias, *indices, tails, kind))
    flat = [None if t is None else t.detach() for t in (x, x, weight, bias, *indices, tails)]
    torch.library.opcheck(ops.causal_conv_backward.default, (*flat, kind))
    stores, frames = torch.tensor([1, 7]), torch.tensor([0, 1])
    paged = (*flat[1:4], torch.tensor([0, 4, 8]), frames - 1, stores, frames, torch.zeros(2, 3, 6), kind)
    torch.library.opcheck(ops.causal_conv_paged.default, paged)


def test_compiled_in_one_graph():
    x, weight = (seeded(*shape, dtype=torch.float32).requires_grad_() for shape in ((20, 6), (6, 4)))
    offsets, past = tensors(TREES)[0], past_rows(([9, 0, 1, 2, 3, 1, 0, 4], [-1, 0, 1, 2, -1, -1, 5, -1]), 3)

    def loss(x, weight):
        return causal_conv(x, weight, None, offsets, past, None, "silu").square().sum()

    wanted = torch.autograd.grad(loss(x, weight), (x, weight))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, torch.autograd.grad(compiled(x, weight), (x, weight)), wanted))


@only_triton
def test_a_dtype_that_no_triton_kernel_takes_is_named(impl):
    with pytest.raises(ToolkitError, match="float64"):
        op(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 2), None, None, ([2], [-1]))


def test_bad_input_is_named():
    x, weight, bias = torch.ones(5, 6), torch.ones(6, 4), torch.ones(6)
    offsets, past = torch.tensor([0, 2, 5]), torch.full((2, 3), -1)
    with pytest.raises(ToolkitError, match=r"weight must have shape \[6, W\] for x .*, 2 <= W <= 8, got \[6, 9\]"):
        causal_conv(x, torch.ones(6, 9), bias, offsets, past)
    with pytest.raises(ToolkitError, match=r"bias must have shape \[6\], got \[5\]"):
        causal_conv(x, weight, bias[:5], offsets, past)
    with pytest.raises(ToolkitError, match=r"activation must be one of None, silu, got 'gelu'"):
        causal_conv(x, weight, bias, offsets, past, None, "gelu")
    with pytest.raises(ToolkitError, match=r"past must be int64 of shape \[2, 3\], got torch.int64 of shape \[2, 2\]"):
        causal_conv(x, weight, bias, offsets, past[:, :2])
    with pytest.raises(ToolkitError, match=r"tails .* \['N', 3, 6\] and dtype torch.float32 .* got \[2, 3, 5\]"):
        causal_conv(x, weight, bias, offsets, past, torch.ones(2, 3, 5))
    with pytest.raises(ToolkitError, match=r"dtype must be float32, float64, bfloat16 or float16, got torch.int64"):
        causal_conv(x.long(), weight, bias, offsets, past)
    none = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ToolkitError, match="contiguous last dimension"):
        paged(x, weight, bias, offsets, past[:, 0], none, none, torch.ones(2, 6, 3).mT)


@needs_native
def test_indices_out_of_range_are_named_and_nothing_is_written():
    x, weight, tails = torch.ones(5, 6), torch.ones(6, 3), torch.zeros(2, 2, 6)
    for offsets, past, message in (
        ([0, 2, 6], [[-1, -1]] * 2, r"query_offsets\[2\] is 6; there are 5 rows"),
        ([0, 3, 2], [[-1, -1]] * 2, r"query_offsets\[2\] is 2; must not be less than the one before, 3"),
        ([0, 2, 4], [[-1, -1], [0, 4]], r"past\[1, 1\] must be a row below 4, -1, or down to -5 .*, got 4"),
        ([0, 2, 4], [[-6, -1], [0, 1]], r"past\[0, 0\] must be .* the 4 rows of tails, got -6"),
    ):
        with pytest.raises(RuntimeError, match=message):
            causal_conv(x, weight, None, torch.tensor(offsets), torch.tensor(past), tails)
    for sources, rows, frames, message in (
        ([0, 2], [1], [0], r"sources\[1\] is 2; there are 2 frames"),
        ([0, 1], [1], [2], r"save_frames\[0\] is 2; there are 2 frames"),
        ([0, 1], [3, 1], [0, 1], r"save_rows\[1\] is 1; ascending rows below 5"),
    ):
        indices = (torch.tensor(t) for t in (sources, rows, frames))
        with pytest.raises(RuntimeError, match=message):
            paged(x, weight, None, torch.tensor([0, 2, 5]), *indices, tails)
    assert not tails.any()
