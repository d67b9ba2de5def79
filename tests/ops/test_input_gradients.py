"""The gradient that a sequence's rows get does not depend on the other sequences of the batch, bit for bit.

Every op runs forward and backward on one sequence alone and on the same sequence first, last and between others; the
gradients of its rows must be equal, for any number of threads.
"""

from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import only_triton
from tests.helpers.rowwise import integers, seeded, threads
from toolkit.ops import native
from toolkit.ops.activation import activation
from toolkit.ops.attention import attention
from toolkit.ops.causal_conv import causal_conv
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.experts import experts
from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.grouped_linear import combine, grouped_linear
from toolkit.ops.index_loss import index_loss
from toolkit.ops.layer_norm import layer_norm
from toolkit.ops.linear import linear
from toolkit.ops.linear_cross_entropy import linear_cross_entropy
from toolkit.ops.linear_logprob import linear_logprob
from toolkit.ops.linear_recurrence import linear_recurrence
from toolkit.ops.lora_linear import lora_linear
from toolkit.ops.rms_norm import add_rms_norm, rms_norm
from toolkit.ops.rotary import rotary
from toolkit.ops.route import route
from toolkit.ops.sparse_attention import sparse_attention
from toolkit.ops.take_rows import take_rows
from toolkit.ops.token_logprob import token_logprob

pytestmark = pytest.mark.skipif(native.load() is None, reason="a promise of the native kernels")
LENGTHS = (1, 2, 5, 37)
FURTHER = (*LENGTHS, 3, 7, 16, 150)
OTHERS = ((5, 11), (64, 12), (1, 13), (70, 14))  # (length, seed)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """An op on a batch.

    Fields:
        rows: (length, seed, dtype) to the rows of one sequence, [length, ...] each. Gradients of the floating-point
            ones are compared.
        call: (lengths, dtype, *rows of the batch) to one output or several, [T, ...] each or a single number.
    """

    rows: Callable[[int, int, torch.dtype], list[Tensor]]
    call: Callable[..., Any]


def gradients(case: Case, sequences: list[tuple[int, int]], dtype: torch.dtype, which: int) -> list[Tensor]:
    """The gradients of the rows of sequence ``which``."""
    lengths = [length for length, _ in sequences]
    parts = [case.rows(length, seed, dtype) for length, seed in sequences]
    batch = [torch.cat(column) for column in zip(*parts, strict=True)]
    leaves = [x.requires_grad_() for x in batch if x.is_floating_point()]
    given = case.call(lengths, dtype, *batch)
    outputs = list(given) if isinstance(given, tuple) else [given]
    upstream = [
        torch.cat([seeded(length, *y.shape[1:], dtype=y.dtype, seed=100 * seed + i) for length, seed in sequences])
        if y.dim()
        else torch.tensor(0.7, dtype=y.dtype)
        for i, y in enumerate(outputs)
    ]
    found = torch.autograd.grad(outputs, leaves, upstream)
    first = sum(lengths[:which])
    return [grad[first : first + lengths[which]] for grad in found]


def check(case: Case, dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS) -> None:
    others = list(OTHERS)
    for length in lengths:
        one = (length, 1)
        with threads(1):
            alone = gradients(case, [one], dtype, 0)
        assert all(bool(x.isfinite().all()) for x in alone)
        assert length < 5 or all(bool(x.any()) for x in alone)
        for at, count in ((0, 1), (2, 2), (len(others), 1)):
            with threads(count):
                among = gradients(case, [*others[:at], one, *others[at:]], dtype, at)
            for i, (got, expected) in enumerate(zip(among, alone, strict=True)):
                assert torch.equal(got, expected), (length, at, count, i, float((got - expected).abs().max()))


def normal(*shapes: tuple[int, ...], scale: float = 1.0) -> Callable[[int, int, torch.dtype], list[Tensor]]:
    """Rows of these shapes."""

    def rows(length: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
        return [
            seeded(length, *shape, dtype=dtype, scale=scale, seed=1000 * seed + at) for at, shape in enumerate(shapes)
        ]

    return rows


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])


@cache
def weights(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Leaves, as in training. No gradient of them is asked for."""
    return [
        (seeded(*shape, dtype=dtype, seed=77 + at) / shape[-1] ** 0.5).requires_grad_()
        for at, shape in enumerate(shapes)
    ]


def linear_case(inner: int, outputs: int, turned: bool = False) -> Case:
    def call(lengths: list[int], dtype: torch.dtype, x: Tensor) -> Tensor:
        weight, bias = weights(dtype, (inner, outputs) if turned else (outputs, inner), (outputs,))
        return linear(x, weight.t() if turned else weight, bias)

    return Case(normal((inner,)), call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("inner", "outputs"), [(7, 3), (1, 40), (100, 77), (64, 512), (513, 100), (4097, 33), (33, 4099)]
)
def test_linear(inner, outputs, dtype):
    check(linear_case(inner, outputs), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_with_a_transposed_weight(dtype):
    """Bitwise identical to a copy of it."""
    check(linear_case(300, 65, turned=True), dtype)
    x, grad = seeded(40, 300, dtype=dtype), seeded(40, 65, dtype=dtype, seed=3)
    weight = seeded(300, 65, dtype=dtype, seed=4)
    found = []
    for matrix in (weight.t(), weight.t().contiguous()):
        leaf = x.clone().requires_grad_()
        linear(leaf, matrix).backward(grad)
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.sweep
@pytest.mark.parametrize(("inner", "outputs"), [(512, 1376), (1376, 512), (512, 8192), (4096, 300), (1030, 2049)])
def test_linear_of_models_sizes(inner, outputs):
    check(linear_case(inner, outputs), torch.float32, FURTHER)


def test_weights_gradients_do_not_depend_on_threads():
    """Rows are added in blocks whose size goes by their number."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, weight, bias = (seeded(*shape, dtype=dtype).requires_grad_() for shape in ((2048, 40), (300, 40), (300,)))
        grad = seeded(2048, 300, dtype=dtype, seed=3)
        found = []
        for count in (1, 2, 3):
            with threads(count):
                found.append(torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), grad))
        for other in found[1:]:
            assert all(torch.equal(*pair) for pair in zip(found[0], other))


@only_triton
@pytest.mark.usefixtures("impl")
def test_triton_gradient_of_rows():
    """Of the default dispatch, as on CUDA."""
    x, weight, grad = (seeded(*shape, dtype=torch.float32) for shape in ((70, 40), (33, 40), (70, 33)))

    def of(rows):
        leaf = x[rows].clone().requires_grad_()
        return torch.autograd.grad(linear(leaf, weight), leaf, grad[rows])[0]

    full = of(slice(0, 70))
    for first, end in ((0, 1), (3, 5), (30, 37), (69, 70)):
        assert torch.equal(of(slice(first, end)), full[first:end])


def test_the_backward_op_is_sound():
    grad, x, weight = (seeded(*shape, dtype=torch.float32) for shape in ((2, 3, 4), (2, 3, 5), (4, 5)))
    for needs in ((True, True, True), (True, False, False), (False, True, True)):
        torch.library.opcheck(torch.ops.toolkit.linear_backward.default, (grad, x, weight, *needs))
    with pytest.raises(RuntimeError, match=r"linear_backward: grad must have shape \[2, 3, 4\]"):
        torch.ops.toolkit.linear_backward(grad[:1], x, weight, True, True, True)


# The head.
def head_rows(inner: int, vocabulary: int) -> Callable[[int, int, torch.dtype], list[Tensor]]:
    def rows(length: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
        targets = integers(0, vocabulary, length, seed=seed)
        targets[3::4] = -100
        return [seeded(length, inner, dtype=dtype, seed=seed), targets]

    return rows


def logprob_case(inner: int, vocabulary: int, **options: Any) -> Case:
    def call(lengths: list[int], dtype: torch.dtype, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        (weight,) = weights(dtype, (vocabulary, inner))
        found = linear_logprob(hidden, weight, targets, **options)
        return found.logprob, found.lse, found.entropy, found.mean

    return Case(head_rows(inner, vocabulary), call)


def logprob_alone_case(inner: int, vocabulary: int) -> Case:
    """Without a gradient of a row whose target does not count."""

    def call(lengths: list[int], dtype: torch.dtype, hidden: Tensor, targets: Tensor) -> Tensor:
        (weight,) = weights(dtype, (vocabulary, inner))
        return linear_logprob(hidden, weight, targets).logprob

    return Case(head_rows(inner, vocabulary), call)


def cross_entropy_case(inner: int, vocabulary: int) -> Case:
    def call(lengths: list[int], dtype: torch.dtype, hidden: Tensor, targets: Tensor) -> Tensor:
        weight, bias = weights(dtype, (vocabulary, inner), (vocabulary,))
        return linear_cross_entropy(hidden, weight, targets, bias=bias)

    return Case(head_rows(inner, vocabulary), call)


def token_case(vocabulary: int) -> Case:
    def rows(length: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
        return [seeded(length, vocabulary, dtype=dtype, seed=seed), integers(0, vocabulary, length, seed=seed)]

    return Case(rows, lambda lengths, dtype, logits, targets: token_logprob(logits, targets))


# Row-wise ops.
def norm_case(width: int, kind: str) -> Case:
    def call(lengths: list[int], dtype: torch.dtype, x: Tensor, other: Tensor) -> Any:
        scale, shift = weights(dtype, (width,), (width,))
        if kind == "rms":
            return rms_norm(x, scale, 1e-6, 1.0) + other
        if kind == "add_rms":
            return add_rms_norm(x, other, scale, 1e-6)
        return layer_norm(x, scale, shift, 1e-5) + other

    return Case(normal((width,), (width,)), call)


def rotary_call(lengths: list[int], dtype: torch.dtype, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.cat([torch.arange(length) for length in lengths])
    angle = positions[:, None].float() * 10000 ** -(torch.arange(10) / 10)
    cos, sin = (f(torch.cat([angle, angle], -1)).to(dtype) for f in (torch.cos, torch.sin))
    return rotary(x, cos, sin), rotary(y, cos, sin, True)


def lora_case(inner: int, outputs: int, rank: int) -> Case:
    def rows(length: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
        return [seeded(length, inner, dtype=dtype, seed=seed), integers(-1, 3, length, seed=seed)]

    def call(lengths: list[int], dtype: torch.dtype, x: Tensor, adapters: Tensor) -> Tensor:
        ranks = rank, 2 * rank + 1, 1
        shapes = [(r, inner) for r in ranks] + [(outputs, r) for r in ranks]
        weight, scale, bias, *factors = weights(dtype, (outputs, inner), (outputs,), (outputs,), *shapes)
        return lora_linear(
            x, weight, bias, factors[:3], factors[3:], [2.0, 0.5, 1.0], adapters, column_scales=[None, scale, None]
        )

    return Case(rows, call)


# MoE layers.
def routed_case(scoring_func: str, **options: Any) -> Case:
    return Case(normal((24,)), lambda lengths, dtype, logits: route(logits, 3, scoring_func, **options)[0])


def expert_rows(hidden: int, count: int) -> Callable[[int, int, torch.dtype], list[Tensor]]:
    def rows(length: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
        ids = seeded(length, count, seed=seed).argsort(-1)[:, :3]
        return [seeded(length, hidden, dtype=dtype, seed=seed), seeded(length, 3, dtype=dtype, seed=seed + 1), ids]

    return rows


def experts_case(hidden: int, inner: int, count: int, score_position: str, transposed: bool) -> Case:
    def call(lengths: list[int], dtype: torch.dtype, x: Tensor, factors: Tensor, ids: Tensor) -> Tensor:
        shapes = [(count, 2 * inner, hidden), (count, hidden, inner)]
        up, down = weights(dtype, *((e, b, a) if transposed else (e, a, b) for e, a, b in shapes))
        plan = dispatch_plan(ids, count)
        return experts(x, factors, up, down, plan, "silu", score_position=score_position, transposed=transposed)

    return Case(expert_rows(hidden, count), call)


def grouped_case(hidden: int, outputs: int, count: int) -> Case:
    def call(lengths: list[int], dtype: torch.dtype, x: Tensor, factors: Tensor, ids: Tensor) -> Tensor:
        (weight,) = weights(dtype, (count, outputs, hidden))
        plan = dispatch_plan(ids, count)
        return combine(grouped_linear(x, weight, None, plan, gather=True), plan.rows, factors)

    return Case(expert_rows(hidden, count), call)


# Tokens that see the others of their sequence.
def attention_case(depth: int, value_depth: int, sinks: bool = False, **options: Any) -> Case:
    def call(lengths: list[int], dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts = offsets(lengths)
        (sink,) = weights(dtype, (6,))
        more = {**options, "sinks": sink} if sinks else options
        return attention(q, k, v, starts, starts[:-1].contiguous(), starts.diff(), **more)[0]

    return Case(normal((6, depth), (2, depth), (2, value_depth)), call)


def conv_call(lengths: list[int], dtype: torch.dtype, x: Tensor) -> Tensor:
    weight, bias = weights(dtype, (33, 4), (33,))
    past = torch.full((len(lengths), 3), -1)
    return causal_conv(x, weight, bias, offsets(lengths), past, None, "silu")


def recurrence_case(keys: int, values: int, gate: str, delta: bool) -> Case:
    heads, shared = (40, 1) if gate == "rates" else (4, 2)
    decays = (heads, keys) if gate == "keys" else (heads,)
    plain = normal((shared, keys), (shared, keys), (heads, values), decays, (heads,))

    def rows(length: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, g, beta = plain(length, seed, dtype)  # torch's sigmoid of a batch is not batch-invariant
        return [q, k / keys**0.5, v, g.sigmoid() if gate == "rates" else -g.sigmoid(), beta.sigmoid()]

    def call(lengths: list[int], dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        parents = torch.full((len(lengths),), -1)
        rates = -weights(torch.float32, (heads, keys))[0].exp() if gate == "rates" else None
        return linear_recurrence(q, k, v, g, beta, offsets(lengths), parents, None, 0.5, delta, rates=rates)[0]

    return Case(rows, call)


def listed(lengths: list[int], width: int) -> Tensor:
    """[T, width] rows: for each token some of its sequence's up to it, scattered, as many as there are."""
    lists = torch.full((sum(lengths), width), -1)
    first = 0
    for length in lengths:
        for t in range(length):
            own = (torch.arange(t + 1) * 7 % (t + 1)).unique()[:width] + first
            lists[first + t, : len(own)] = own
        first += length
    return lists


def sparse_call(lengths: list[int], dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sparse_attention(q, k, v, listed(lengths, min(24, sum(lengths))))[0]


def index_call(lengths: list[int], dtype: torch.dtype, q: Tensor, k: Tensor, factors: Tensor) -> Tensor:
    rows = listed(lengths, 24)  # of one width: the order of its sums goes by it
    target = (rows >= 0).to(torch.promote_types(dtype, torch.float32))
    return index_loss(q, k, factors, rows, target / target.sum(-1, keepdim=True))


def taken_call(lengths: list[int], dtype: torch.dtype, x: Tensor) -> Tensor:
    rows, first = [], 0
    for length in lengths:
        rows.append(torch.arange(length) // 2 * 2 + first)
        first += length
    return x + take_rows(x, torch.cat(rows))


CASES = {
    "linear_logprob": logprob_case(65, 4500),
    "linear_logprob_small": logprob_case(33, 100, scale=1.5, softcap=20.0, temperature=0.7),
    "linear_logprob_alone": logprob_alone_case(130, 2100),
    "linear_cross_entropy": cross_entropy_case(65, 4500),
    "linear_cross_entropy_small": cross_entropy_case(300, 50),
    "token_logprob": token_case(2100),
    "rms_norm": norm_case(65, "rms"),
    "add_rms_norm": norm_case(300, "add_rms"),
    "layer_norm": norm_case(301, "layer"),
    "activation": Case(normal((67,)), lambda lengths, dtype, x: activation(x, "gelu_tanh")),
    "gated_activation": Case(normal((67,), (67,)), lambda lengths, dtype, x, y: gated_activation(x, y, "silu")),
    "rotary": Case(normal((3, 24), (2, 20)), rotary_call),
    "lora_linear": lora_case(130, 75, 9),
    "lora_linear_long": lora_case(1030, 600, 16),
    "route_softmax": routed_case("softmax", norm_topk_prob=True),
    "route_sigmoid": routed_case("sigmoid", n_group=4, topk_group=2, norm_topk_prob=True),
    "experts": experts_case(130, 75, 12, "activation", False),
    "experts_transposed": experts_case(70, 300, 12, "combine", True),
    "experts_input": experts_case(70, 33, 12, "input", False),
    "grouped_linear": grouped_case(300, 75, 12),
    "attention": attention_case(32, 24),
    "attention_window": attention_case(72, 72, sinks=True, window=9, softcap=20.0),
    "causal_conv": Case(normal((33,)), conv_call),
    "linear_recurrence": recurrence_case(24, 20, "heads", True),
    "linear_recurrence_keys": recurrence_case(33, 20, "keys", True),
    "linear_recurrence_plain": recurrence_case(16, 40, "heads", False),
    "linear_recurrence_rates": recurrence_case(16, 1, "rates", False),
    "sparse_attention": Case(normal((6, 32), (2, 32), (2, 24)), sparse_call),
    "index_loss": Case(normal((4, 16), (16,), (4,)), index_call),
    "take_rows": Case(normal((19,)), taken_call),
}


@pytest.mark.parametrize("name", CASES)
def test_other_ops(name):
    check(CASES[name], torch.float32)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_other_ops_in_every_dtype(name, dtype):
    check(CASES[name], dtype, FURTHER)
