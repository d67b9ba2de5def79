"""linear_recurrence with a decay for each key, as gates [T, H, K] or as rates: oracles, bits, gradients of rates."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.implementations import NATIVE, REFERENCE, TRITON, implementations, only_triton, parameter
from tests.helpers.interpreter import gradients
from tests.helpers.recurrence import cuts, keyed_inputs, poisoned, random_trees, tensors, unshared
from tests.helpers.rowwise import check_oracle, check_repeatable, error, run, seeded, threads
from tests.ops.test_linear_recurrence import TOLERANCE, TREES, needs_native
from toolkit.errors import ToolkitError
from toolkit.ops.linear_recurrence import linear_recurrence
from toolkit.ops.linear_recurrence import linear_recurrence_paged as paged
from toolkit.testing.oracle import lifted_to_double

forward, backward = torch.ops.toolkit.linear_recurrence, torch.ops.toolkit.linear_recurrence_backward
SHORT = ([3, 0, 2, 1, 1, 2], [-1, 0, 1, 0, -3, -2])  # 9 rows: the interpreter takes a token at a time
rated_or_not = pytest.mark.parametrize("rated", [True, False], ids=["rates", "keys"])
# What a model has: rates with single numbers and no delta rule, gates of keys with rows of values and the delta rule.
MODELS = {(True, 1), (False, 5)}


def gates_and_widths(*chosen):
    """A test by ``impl``, ``dtype``, ``rated`` and ``width`` over (implementation, dtypes).

    In the interpreter those that no model has are a sweep.
    """
    found = []
    for one, dtypes in chosen:
        for dtype, rated, width in itertools.product(dtypes, (True, False), (1, 5)):
            marks = [pytest.mark.sweep] * (one is TRITON and ((rated, width) not in MODELS or dtype != torch.float32))
            kind = f"{one.name}-{dtype}-{'rates' if rated else 'keys'}-{width}".replace("torch.", "")
            own = parameter(one, dtype, rated, width)
            found.append(pytest.param(*own.values, marks=[*own.marks, *marks], id=kind))
    return pytest.mark.parametrize(("impl", "dtype", "rated", "width"), found, indirect=["impl"])


def op(given, rates, trees, delta=True, initial=None, impl=None):
    return linear_recurrence(*given, *tensors(trees), initial, 0.3, delta, rates=rates, impl=impl)


def both(trees, delta, impl, rated):
    """The op and its oracle as functions of q, k, v, g, beta, initial and, if ``rated``, rates."""

    def ours(*x):
        return op(x[:5], x[6] if rated else None, trees, delta, x[5], impl.option)

    def exact(*x):
        return unshared(*x[:6], trees, 0.3, delta, x[6] if rated else None)

    return ours, exact


@gates_and_widths(*((one, one.dtypes) for one in (REFERENCE, NATIVE, TRITON)))
def test_trees_against_unshared_sequences(impl, dtype, rated, width):
    """Values of one number and of several, heads that share keys, more heads than a block and than a vector."""
    upcast = torch.float64 if dtype == torch.float64 else torch.float32
    bound = {torch.float32: (2e-6, 3e-6), torch.float16: (2**-10, 1.5 * 2**-10)} if impl is TRITON else TOLERANCE
    trees = TREES if impl is NATIVE else SHORT
    shapes = ((1, 37, 16), (2, 6, 5)) if width == 1 and impl is NATIVE else ((2, 4, 5),)
    for key_heads, heads, depth in shapes:
        given, rates = keyed_inputs(sum(trees[0]) + 2, key_heads, heads, depth, width, rated, dtype)
        initial = 0.5 * seeded(2, heads, depth, width, dtype=upcast, seed=9)
        arguments = [*given, initial] if rates is None else [*given, initial, rates]
        for delta in (True, False) if impl is NATIVE else ((rated, width) not in MODELS or not rated,):
            check_oracle(*both(trees, delta, impl, rated), arguments, bound.get(dtype, TOLERANCE[dtype]))


@needs_native
@rated_or_not
@pytest.mark.parametrize("width", [1, 5])
def test_more_tokens_than_a_chunk(rated, width):
    """Kept states; random trees, several of which start from one state; rates sum over all of them."""
    for seed in range(2):
        trees = random_trees(seed, segments=6, longest=150, given=2)
        given, rates = keyed_inputs(sum(trees[0]) + seed, 1, 4, 6, width, rated, torch.float64, seed)
        initial = seeded(2, 4, 6, width, seed=9)
        arguments = [*given, initial] if rates is None else [*given, initial, rates]
        check_oracle(*both(trees, seed % 2 == 0, NATIVE, rated), arguments, 1e-13)


@gates_and_widths(
    (REFERENCE, [torch.float32]), (NATIVE, [torch.float32, torch.float64, torch.bfloat16]), (TRITON, [torch.float32])
)
def test_bits_do_not_depend_on_cuts_trees_or_pages(impl, dtype, rated, width):
    """One sequence and a branch of it: whole, cut at random into segments, and in paged calls."""
    rows, branch, fork = (90, 20, 40) if impl is NATIVE else (6, 2, 3)
    key_heads, *heads = (2, 70 if width == 1 else 4, 10, 39 if width > 1 else 1) if impl is NATIVE else (1, 2, 5, width)
    given, rates = keyed_inputs(rows + branch, key_heads, *heads, rated, dtype)
    upcast, delta = torch.float64 if dtype == torch.float64 else torch.float32, dtype == torch.float32
    alone = [torch.cat([x[:fork], x[rows:]]) for x in given]
    whole, final = op([x[:rows] for x in given], rates, ([rows], [-1]), delta, impl=impl.option)
    other, other_final = op(alone, rates, ([fork + branch], [-1]), delta, impl=impl.option)
    wanted, ends = torch.cat([whole, other[fork:]]), torch.cat([final, other_final])
    for seed in range(3) if impl is NATIVE else (1,):
        chunks = [*cuts(fork, 2, seed), *((a + fork, b + fork) for a, b in cuts(rows - fork, 3, seed))]
        lengths = [b - a for a, b in chunks]
        trunk, tail = len(lengths), cuts(branch, 1, seed)
        trees = [*lengths, *(b - a for a, b in tail)], [*range(-1, trunk - 1), 2, trunk]
        with threads(1 + seed % 2):
            out, finals = op(given, rates, trees, delta, impl=impl.option)
        assert torch.equal(out, wanted)
        assert torch.equal(finals[[trunk - 1, -1]], ends)

        pool = torch.full((4, 2, *heads), torch.nan, dtype=upcast)  # one of two halves of a larger buffer
        states, parts = pool[:, 1], []
        for i, (a, b) in enumerate(p for p in chunks if p[0] < p[1]):
            save = torch.tensor([(row - a, frame) for row, frame in [(fork - 1, 1)] * (a < fork <= b) + [(b - 1, 2)]])
            plan = torch.tensor([0, b - a]), torch.tensor([2 if i else -1]), *save.unbind(1)
            chunk = [x[a:b] for x in given]
            parts.append(paged(*chunk, *plan, states, 0.3, delta, rates=rates, impl=impl.option))
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(states[2], final[0])
        none = torch.empty(0, dtype=torch.int64)
        plan, end = (torch.tensor([0, branch]), torch.tensor([1]), none, none), [x[rows:] for x in given]
        rest = paged(*end, *plan, states, 0.3, delta, rates=rates, impl=impl.option)
        assert torch.equal(rest, other[fork:])
        assert states[[0, 3]].isnan().all()
        assert pool[:, 0].isnan().all()


@implementations(REFERENCE, NATIVE)
@rated_or_not
def test_a_head_does_not_depend_on_the_others(impl, rated):
    """Any heads of one key head, alone or beside others, from the middle of a vector on."""
    given, rates = keyed_inputs(9, 1, 70, 5, 1, rated, torch.float32)
    out, finals = op(given, rates, ([9], [-1]), False, impl=impl.option)
    for first, last in ((0, 1), (3, 50), (33, 70)):
        some = [*given[:2], *(x[:, first:last] for x in given[2:])]
        part, end = op(some, None if rates is None else rates[first:last], ([9], [-1]), False, impl=impl.option)
        near = 0.0 if impl is NATIVE else 1e-6  # eager exp's bits depend on the place in a tensor
        assert error(part, out[:, first:last]) <= near
        assert error(end, finals[:, first:last]) <= near


@needs_native
@rated_or_not
@pytest.mark.parametrize("width", [1, 35])
def test_gradient_bits_are_the_same_on_any_number_of_threads(rated, width):
    trees = random_trees(3, segments=6, longest=90, given=2)
    given, rates = keyed_inputs(sum(trees[0]), 2, 70 if width == 1 else 4, 17, width, rated, torch.float32)
    arguments = [*given, seeded(2, given[2].shape[1], 17, width, dtype=torch.float32)]
    ours, _ = both(trees, True, NATIVE, rated)
    check_repeatable(ours, arguments if rates is None else [*arguments, rates])


@needs_native
@rated_or_not
def test_results_are_whole(rated):
    """Fresh memory full of NaN: nothing is left unwritten, padding and kept states included."""
    trees = random_trees(5, segments=9, longest=150, given=2)
    for width in (1, 3):
        given, rates = keyed_inputs(sum(trees[0]) + 3, 1, 9, 5, width, rated, torch.float32)
        arguments = [*given, seeded(2, 9, 5, width, dtype=torch.float32)] + [rates] * rated
        ours, _ = both(trees, True, NATIVE, rated)
        clean = run(ours, arguments)
        with poisoned():
            dirty = run(ours, arguments)
        assert all(x.isfinite().all() for x in (*clean[0], *clean[1]))
        assert all(map(torch.equal, [*dirty[0], *dirty[1]], [*clean[0], *clean[1]]))


def test_strided_inputs(impl):
    joined = seeded(5, 2, 40)
    for width in (1, 4) if impl is NATIVE else (1,):
        given = [joined[..., 2:8], joined[..., 8:14], joined[..., 14 : 14 + width], -joined[..., 20:26].abs()]
        for rates in (None, -seeded(6, 2).exp().T):
            rows = [*given[:3], given[3] if rates is None else -given[3][..., 0], joined[..., 31].sigmoid()]
            y, grads = run(lambda *x, r=rates: op(x, r, ([2, 3], [-1, 0]), impl=impl.option), rows)
            packed = [x.contiguous() for x in rows]
            z, wanted = run(lambda *x, r=rates: op(x, r, ([2, 3], [-1, 0]), impl="reference"), packed)
            assert max(map(error, [*y, *grads], [*z, *wanted])) < impl.near(1e-13)


def test_a_decay_of_zero_forgets_a_key(impl):
    """At g = -inf a key's row of the state starts from zeros, and no gradient passes."""
    for width in (1, 3) if impl is NATIVE else (1,):
        given, _ = keyed_inputs(8, 1, 2, 6, width, False, torch.float32)
        given[3][4, :, 2:] = -torch.inf
        given[3][4, 0] = -torch.inf
        leaves = [x.requires_grad_() for x in given]
        out, finals = op(leaves, None, ([8], [-1]), impl=impl.option)
        rest, end = op([x[4:].detach() for x in given], None, ([4], [-1]), impl=impl.option)
        assert torch.equal(out[4:, 0], rest[:, 0])
        assert torch.equal(finals[0, 0], end[0, 0])
        assert not torch.equal(finals[0, 1], end[0, 1])
        grads = torch.autograd.grad(out[4:, 0].sum() + finals[:, 0].sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)
        assert not any(grad[:4].any() for grad in grads)


def test_no_rows_and_no_segments(impl):
    for rows, trees in ((0, ([], [])), (0, ([0, 0], [-1, 0])), (3, ([], [])), (3, ([0], [-2]))):
        for rated in (True, False):
            given, rates = keyed_inputs(rows, 1, 2, 4, 1, rated, torch.float32)
            leaves = [x.requires_grad_() for x in [*given, seeded(1, 2, 4, 1, dtype=torch.float32)] + [rates] * rated]
            out, finals = op(leaves[:5], rates, trees, initial=leaves[5], impl=impl.option)
            assert not out.any()
            assert finals.shape == (len(trees[0]), 2, 4, 1)
            if impl is not REFERENCE:
                grads = torch.autograd.grad(finals.sum() + out.sum(), leaves)
                assert not any(grad.any() for i, grad in enumerate(grads) if i != 5)
                assert grads[5].eq(float(trees[1] == [-2])).all()


@needs_native
@pytest.mark.parametrize(
    ("name", "rows"),
    [("recurrent_kimi_delta_attention", 9), pytest.param("chunk_kimi_delta_attention", 66, marks=pytest.mark.sweep)],
)
def test_transformers_kimi_delta_attention(name, rows):
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    given, _ = keyed_inputs(rows, 2, 2, 8, 8, False, torch.float64)

    def theirs(q, k, v, g, beta, initial):
        with lifted_to_double():
            arguments = [x[None] for x in (q, k, v, g, beta)]
            out, final = getattr(modeling, name)(*arguments, initial_state=initial, output_final_state=True)
        return out[0], final

    def ours(*x):
        return linear_recurrence(*x[:5], *tensors(([rows], [-2])), x[5], 8**-0.5)

    check_oracle(ours, theirs, [*given, seeded(1, 2, 8, 8, seed=9)], 1e-12)


@needs_native
def test_transformers_selective_scan():
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    channels, states, rows = 7, 5, 40
    x, b, c = seeded(rows, channels), seeded(rows, states, seed=1), seeded(rows, states, seed=2)
    dt, a = F.softplus(seeded(rows, channels, seed=3)), -seeded(channels, states, seed=4).exp()

    def theirs(x, dt, a, b, c):
        with lifted_to_double():
            arguments = (y.T[None] for y in (x, dt)), (y.T[None] for y in (b, c))
            out, final = modeling.mamba_selective_scan(*arguments[0], a, *arguments[1], return_last_state=True)
        return out[0].T, final[..., None]

    def ours(x, dt, a, b, c):
        out, final = linear_recurrence(
            c[:, None], b[:, None], x[..., None], dt, dt, *tensors(([rows], [-1])), delta=False, rates=a
        )  # fmt: skip
        return out[..., 0], final

    check_oracle(ours, theirs, [x, dt, a, b, c], 1e-12)


@only_triton
@pytest.mark.parametrize(
    ("rated", "width"),
    [(True, 1), *(pytest.param(*x, marks=pytest.mark.sweep) for x in ((False, 1), (True, 17), (False, 17)))],
)
def test_more_tokens_than_a_chunk_and_more_tasks_than_programs(impl, rated, width, monkeypatch):
    from toolkit.ops.linear_recurrence import triton as triton_forward
    from toolkit.ops.linear_recurrence import triton_backward

    for module in (triton_forward, triton_backward):  # the interpreter is too slow for chunks of 64
        monkeypatch.setattr(module, "CHUNK", 4)
    monkeypatch.setattr(triton_backward, "SPAN", 2)
    trees = ([7, 4, 0], [-1, -1, 0])
    given, rates = keyed_inputs(12, 1, 18 if width == 1 else 1, 3, width, rated, torch.float32)
    out, finals, kept = forward(*given, *tensors(trees), None, 0.3, True, True, rates)
    upstream = seeded(*out.shape, seed=11), seeded(*finals.shape, seed=12)
    got = list(backward(*upstream, *given, *tensors(trees), None, finals, kept, 0.3, True, rates))
    arguments = given if rates is None else [*given, rates]
    wanted = gradients(lambda *x: unshared(*x[:5], None, trees, 0.3, True, *x[5:]), arguments, list(upstream))
    for x, one in zip(got[:5] + got[6:], wanted):
        assert error(x, one) <= 3e-6


@pytest.mark.sweep
@rated_or_not
def test_opcheck(rated):
    given, rates = keyed_inputs(70, 1, 2, 4, 1, rated, torch.float32)
    trees = tensors(([66, 2, 0], [-2, 0, -1]))
    initial = seeded(1, 2, 4, 1, dtype=torch.float32)
    ops = torch.ops.toolkit
    leaves = [x.requires_grad_() for x in given]
    if rated:
        rates.requires_grad_()
    torch.library.opcheck(
        ops.linear_recurrence.default, (*leaves, *trees, initial.requires_grad_(), 0.3, False, True, rates)
    )
    flat = [x.detach() for x in given]
    rates = None if rates is None else rates.detach()
    arguments = (*flat, *trees, initial.detach(), 0.3, False)
    out, finals, kept = ops.linear_recurrence(*arguments, True, rates)
    kinds = torch.ones_like(out), torch.ones_like(finals), *arguments[:8], finals, kept, 0.3, False, rates
    torch.library.opcheck(ops.linear_recurrence_backward.default, kinds)
    stores = torch.tensor([65, 67])
    paged_arguments = (
        *flat, trees[0], torch.tensor([1, 0, -1]), stores, stores - 65, seeded(3, 2, 4, 1, dtype=torch.float32), 0.3,
        False, rates,
    )  # fmt: skip
    torch.library.opcheck(ops.linear_recurrence_paged.default, paged_arguments)


def test_bad_input_is_named():
    given, rates = keyed_inputs(5, 2, 4, 6, 3, True, torch.float32)
    trees = tensors(([2, 3], [-1, 0]))
    with pytest.raises(
        ToolkitError, match=r"rates must be floating point \[4, 6\], got torch.float32 of shape \[4, 5\]"
    ):
        linear_recurrence(*given, *trees, rates=rates[:, :5])
    given[3] = given[3][..., None].repeat(1, 1, 5)
    with pytest.raises(
        ToolkitError, match=r"g must be floating point \[5, 4, 6\], got torch.float32 of shape \[5, 4, 5\]"
    ):
        linear_recurrence(*given, *trees)
    with pytest.raises(
        ToolkitError, match=r"g must be floating point \[5, 4\], got torch.float32 of shape \[5, 4, 5\]"
    ):
        linear_recurrence(*given, *trees, rates=rates)
