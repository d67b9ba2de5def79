"""linear_recurrence a chunk of tokens at a time, in Triton, against float64 sequences token by token."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.implementations import CUDA, TRITON, impl_and, only_interpreter
from tests.helpers.recurrence import PrefixTrees, inputs, random_trees, tensors, unshared
from tests.helpers.rowwise import check_oracle, error, run, seeded
from toolkit.ops.linear_recurrence import linear_recurrence
from toolkit.ops.linear_recurrence import linear_recurrence_paged as paged
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext

# Around the interpreter's chunk of 16 tokens, some of a single one or none, over parents and given states.
TREES: PrefixTrees = ([17, 0, 16, 1, 15], [-1, 0, 1, 0, -3])
ROWS = sum(TREES[0])
chunked = torch.ops.toolkit.linear_recurrence_chunked
# On a device the kernels have no tiles for float32.
FIRST, HALF = (torch.bfloat16, torch.float16) if CUDA else (torch.float32, torch.float16)
# (dtype, delta, beta given, key heads, value heads, K, V)
CASES = [
    (FIRST, True, True, 1, 1, 5, 7),
    (FIRST, True, False, 1, 2, 16, 19),
    (FIRST, False, True, 1, 1, 20, 7),
    (HALF, True, True, 2, 2, 5, 7),
]
NEAR = {torch.float32: (2e-6, 4e-6), torch.float16: (2**-10, 2**-9), torch.bfloat16: (2**-7, 2**-6)}


class Called(TorchDispatchMode):
    """The names of the recurrences that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "linear_recurrence" in func.name():
            self.names.append(func.name().removeprefix("toolkit::"))
        return func(*args, **(kwargs or {}))


def given_rows(key_heads, heads, depth, width, dtype=None, seed=0):
    """Rows of TREES and two of padding; decays of exp(-50), one after the other and alone."""
    given = inputs(ROWS + 2, key_heads, heads, depth, width, dtype, seed)
    given[3][7] = -50.0
    given[3][18:22, 0] = -50.0
    return given


@impl_and("dtype, delta, weighted, key_heads, heads, depth, width", CASES, CASES[:1], [TRITON])
def test_results_and_gradients_against_tokens_in_float64(impl, dtype, delta, weighted, key_heads, heads, depth, width):
    given = given_rows(key_heads, heads, depth, width, dtype)
    initial = seeded(2, heads, depth, width, dtype=torch.float32, seed=9)
    index = tensors(TREES)

    def ours(q, k, v, g, *rest):
        beta = rest[0] if weighted else None
        return chunked(q, k, v, g, beta, *index, rest[-1], 0.3, delta)

    def exact(q, k, v, g, *rest):
        return unshared(q, k, v, g, rest[0] if weighted else None, rest[-1], TREES, 0.3, delta)

    check_oracle(ours, exact, [*(given if weighted else given[:4]), initial], NEAR[dtype])


@pytest.mark.sweep
@only_interpreter
def test_views_of_rows_give_the_bits_of_rows(impl):
    joined = seeded(20, 1, 64, dtype=torch.float32)
    k = F.normalize(joined[..., 8:14], dim=-1).expand(20, 2, 6)[:, :1]
    given = [joined[..., 2:8], k, joined[..., 14:21], -joined[..., 30].abs(), joined[..., 31].sigmoid()]
    index = tensors(([17, 3], [-1, 0]))
    (one, to_one), (other, to_other) = (
        run(lambda *x: chunked(*x, *index, None, 0.3, True), rows) for rows in (given, [x.contiguous() for x in given])
    )
    assert all(map(torch.equal, [*one, *to_one], [*other, *to_other]))


@only_interpreter
@pytest.mark.parametrize("delta", [True, pytest.param(False, marks=pytest.mark.sweep)])
def test_a_decay_of_zero_forgets_exactly(impl, delta):
    """At g = -inf nothing is NaN and no gradient passes; what lies before changes no bit of what comes after."""
    given = inputs(24, 1, 1, 6, 5, torch.float32)
    given[3][[5, 21]] = -torch.inf
    index = tensors(([24], [-1]))
    leaves = [x.requires_grad_() for x in given]
    out, finals = chunked(*leaves, *index, None, 0.3, delta)
    other = [torch.cat([seeded(21, *x.shape[1:], dtype=x.dtype, seed=3).abs() * -0.1, x[21:].detach()]) for x in given]
    again, ends = chunked(*other, *index, None, 0.3, delta)
    assert torch.equal(out[21:], again[21:])
    assert torch.equal(finals, ends)
    grads = torch.autograd.grad(out[21:].sum() + finals.sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert not any(grad[:21].any() for grad in grads)
    assert not grads[3][21].any()


@only_interpreter
def test_keys_that_repeat_do_not_blow_up(impl):
    """L is all ones below the diagonal: powers of it reach 6,435 in a chunk of 16 tokens, its inverse stays at one."""
    q, _, v, g, beta = inputs(40, 1, 1, 6, 5, torch.float32)
    k = F.normalize(seeded(1, 1, 6, dtype=torch.float32, seed=2), dim=-1).expand(40, 1, 6).contiguous()
    index = tensors(([40], [-1]))
    check_oracle(
        lambda *x: chunked(*x, torch.zeros_like(g), torch.ones_like(beta), *index, None, 1.0, True),
        lambda *x: unshared(*x, g.new_zeros(g.shape).double(), beta.double() * 0 + 1, None, ([40], [-1]), 1.0, True),
        [q, k, v],
        NEAR[torch.float32],
    )


@only_interpreter
@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.sweep) for n in range(2)])
def test_paged_states_of_any_rows(impl, seed):
    """Every segment loads and stores where the plan says: in the middle of a chunk, twice at a row, nowhere."""
    trees = random_trees(seed + 1, segments=5, longest=40)
    lengths, count = trees[0], sum(trees[0])
    given = inputs(count + 1, 1, 1, 6, 19, torch.float32, seed=seed)
    offsets, _ = tensors(trees)
    states = seeded(16, 1, 6, 19, dtype=torch.float32)
    before = states.clone()
    sources = torch.tensor([0, -1, 1, 99, 2])
    rows = [
        int(offsets[s]) + at for s, n in enumerate(lengths) for at in sorted({n // 3, n // 2, n - 1}) if 0 <= at < n
    ]
    rows = sorted([*rows, *rows[:2]])
    frames = torch.arange(3, 3 + len(rows)) % 16
    frames[0] = -1
    frames[frames < 3] = 99
    call = torch.ops.toolkit.linear_recurrence_paged_chunked
    out = call(*given, offsets, sources, torch.tensor(rows, dtype=torch.int64), frames, states, 0.3, True)
    wanted = before.clone()
    for s, length in enumerate(lengths):
        first = int(offsets[s])
        exact = [x[first : first + length].double() for x in given]
        origin = -2 if 0 <= sources[s] < 16 else -1
        start = before[sources[s]][None].double() if origin == -2 else None
        expected, _ = unshared(*exact, start, ([length], [origin]), 0.3, True) if length else (exact[2], None)
        assert error(out[first : first + length], expected) < 2e-6
        for row, frame in zip(rows, frames.tolist()):
            if first <= row < first + length and 0 <= frame < 16:
                part = [x[: row + 1 - first] for x in exact]
                wanted[frame] = unshared(*part, start, ([row + 1 - first], [origin]), 0.3, True)[1][0]
    assert error(states, wanted) < 2e-6
    assert not out[count:].any()


def test_what_takes_chunks():
    """Shapes and the number of tokens decide; on a CPU the op of chunks takes tokens, with the same result."""
    plan = tensors(([40], [-1]))
    few = tensors(([4] * 10, [-1] * 10))
    rows = inputs(40, 1, 1, 6, 5, torch.float32)
    keyed = [*rows[:3], rows[3][..., None].expand(40, 1, 6), rows[4]]
    for given, index, taken in ((rows, plan, True), (rows, few, False), (keyed, plan, False)):
        with Called() as called, torch.no_grad():
            out, _ = linear_recurrence(*given, *index, None, 0.3, chunked=True)
        assert called.names[0] == ("linear_recurrence_chunked" if taken else "linear_recurrence")
        assert torch.equal(out, linear_recurrence(*given, *index, None, 0.3)[0])
    states, none = torch.zeros(1, 1, 6, 5), torch.zeros(0, dtype=torch.int64)
    with Called() as called:
        paged(*rows, plan[0], plan[1], none, none, states, 0.3, chunked=True)
    assert called.names[0] == "linear_recurrence_paged_chunked"


def test_a_cpu_takes_tokens_for_chunks():
    given = inputs(40, 1, 2, 6, 5, torch.float32)
    initial = seeded(1, 2, 6, 5, dtype=torch.float32)
    index = tensors(([30, 10], [-2, 0]))
    results = [
        run(lambda *x, flag=flag: linear_recurrence(*x[:5], *index, x[5], 0.3, chunked=flag), [*given, initial])
        for flag in (True, False)
    ]
    assert all(map(torch.equal, [*results[0][0], *results[0][1]], [*results[1][0], *results[1][1]]))


def test_a_context_passes_the_mode_on():
    batch = RaggedBatch.from_sequences([list(range(20))])
    rows = inputs(20, 1, 1, 6, 5, torch.float32)
    for flag, name in ((False, "linear_recurrence"), (True, "linear_recurrence_chunked")):
        context = DenseContext(batch)
        context.chunked = flag
        with Called() as called, torch.no_grad():
            context.scan(0, *rows, scale=1.0, delta=True)
        assert called.names[0] == name


@pytest.mark.sweep
def test_opcheck():
    given = [x.requires_grad_() for x in inputs(20, 1, 2, 4, 3, torch.float32)]
    index = tensors(([18, 2], [-2, 0]))
    initial = seeded(1, 2, 4, 3, dtype=torch.float32).requires_grad_()
    ops = torch.ops.toolkit
    torch.library.opcheck(ops.linear_recurrence_chunked.default, (*given, *index, initial, 0.3, True))
    flat = [x.detach() for x in (*given, *index, initial)]
    out, finals = chunked(*flat, 0.3, True)
    torch.library.opcheck(ops.linear_recurrence_chunked_backward.default, (out, None, *flat, finals, 0.3, True))
    stores = torch.tensor([17, 19])
    arguments = (*flat[:6], stores - 18, stores, stores - 17, seeded(3, 2, 4, 3, dtype=torch.float32), 0.3, True)
    torch.library.opcheck(ops.linear_recurrence_paged_chunked.default, arguments)
