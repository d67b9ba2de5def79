"""linear_logprob against dense float64 softmax: values, every gradient, bits, memory."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.helpers.implementations import only_triton
from tests.helpers.rowwise import DTYPES, check_repeatable, check_rows, error, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.linear import linear
from toolkit.ops.linear_logprob import linear_logprob, tiles
from toolkit.ops.registry import has_native
from toolkit.ops.token_logprob import token_logprob

IMPLS = ["reference", "cpu"] if has_native("linear_logprob") else ["reference"]
every_impl = pytest.mark.parametrize("impl", IMPLS)
BOUND = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}

VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 2.0, "scale": 1.5},
    "tempered": {"temperature": 0.7},
    "temperatures": {"temperature": "rows"},
    "all": {"bias": True, "scale": 0.5, "softcap": 3.0, "temperature": "rows"},
}


def problem(
    rows: int, depth: int, vocabulary: int, dtype: torch.dtype = torch.float64, variant: str = "plain", choices: int = 0
) -> tuple[list[Tensor], Tensor, dict]:
    """(hidden, weight[, bias]), targets (about a fifth ignored) and the keywords of a variant."""
    options = dict(VARIANTS[variant])
    tensors = [
        seeded(rows, depth, dtype=dtype),
        seeded(vocabulary, depth, dtype=dtype, scale=1.5 * max(depth, 1) ** -0.5, seed=1),
    ]
    if options.pop("bias", False):
        tensors.append(seeded(vocabulary, dtype=dtype, seed=2))
    if options.get("temperature") == "rows":
        options["temperature"] = torch.rand(rows, generator=torch.Generator().manual_seed(5)) + 0.5
    generator = torch.Generator().manual_seed(3)
    shape = (rows, choices) if choices else (rows,)
    targets = torch.randint(vocabulary, shape, generator=generator)
    return tensors, torch.where(torch.rand(shape, generator=generator) < 0.2, -100, targets), options


def oracle(tensors: list[Tensor], targets: Tensor, scale=1.0, softcap=0.0, temperature=1.0) -> tuple[Tensor, ...]:
    """The four statistics from dense logits and torch's own log_softmax."""
    z = torch.nn.functional.linear(*tensors) * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(z)[:, None] if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(z, -1)
    several = targets if targets.dim() > 1 else targets[:, None]
    own = log_p.gather(-1, several.clamp_min(0)).view(targets.shape)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.where(targets < 0, 0.0, own), torch.logsumexp(z, -1), entropy, z.mean(-1)


def run(f, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The four statistics and the gradients of one weighting of them."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = list(f(leaves))[:4]
    weights = [seeded(*y.shape, dtype=y.dtype, seed=10 + i) for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, leaves, weights))


def call(tensors: list[Tensor], targets: Tensor, impl: str | None = None, **options):
    bias = tensors[2] if len(tensors) > 2 else None
    return linear_logprob(tensors[0], tensors[1], targets, bias=bias, impl=impl, **options)


@every_impl
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rows", "depth", "vocabulary"), [(1, 1, 1), (7, 33, 60), (13, 64, 2049), (101, 16, 5001)])
def test_values_and_gradients(impl, variant, dtype, rows, depth, vocabulary):
    tensors, targets, options = problem(rows, depth, vocabulary, dtype, variant)
    outputs, gradients = run(lambda t: call(t, targets, impl, **options), tensors)
    upcast = [x.double() for x in tensors]
    wanted, expected = run(lambda t: oracle(t, targets, **options), upcast)
    if dtype == torch.float32:  # the same cotangents
        cotangents = [seeded(*y.shape, dtype=dtype, seed=10 + i).double() for i, y in enumerate(outputs)]
        leaves = [x.requires_grad_() for x in upcast]
        expected = torch.autograd.grad(oracle(leaves, targets, **options), leaves, cotangents)
    for got, want in zip([*outputs, *gradients], [*wanted, *expected], strict=True):
        assert got.dtype == dtype
        assert error(got, want.detach()) < BOUND[dtype]


@every_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(impl, dtype):
    """Inputs of 16 bits: within the rounding of the logits; the statistics come in float32."""
    tensors, targets, options = problem(9, 40, 300, dtype, "bias")
    outputs, gradients = run(lambda t: call(t, targets, impl, **options), tensors)
    leaves = [x.double().requires_grad_() for x in tensors]
    wanted = oracle(leaves, targets)
    cotangents = [seeded(*y.shape, dtype=torch.float32, seed=10 + i).double() for i, y in enumerate(wanted)]
    expected = torch.autograd.grad(wanted, leaves, cotangents)
    for got, want in zip(outputs, wanted):
        assert got.dtype == torch.float32
        assert error(got, want.detach()) < BOUND[dtype]
    for got, want in zip(gradients, expected):
        assert got.dtype == dtype
        assert error(got, want) < BOUND[dtype]


@every_impl
@pytest.mark.parametrize("choices", [1, 3, 20])
def test_several_targets_a_row(impl, choices):
    tensors, targets, options = problem(6, 20, 100, variant="all", choices=choices)
    targets[0] = targets[0, 0].clamp_min(0)  # the same target several times
    outputs, gradients = run(lambda t: call(t, targets, impl, **options), tensors)
    wanted, expected = run(lambda t: oracle(t, targets, **options), tensors)
    assert outputs[0].shape == targets.shape
    assert max(map(error, [*outputs, *gradients], [*wanted, *expected])) < 1e-12


@every_impl
@pytest.mark.parametrize("which", range(4))
def test_each_statistic_alone_passes_its_gradient(impl, which):
    tensors, targets, options = problem(9, 20, 2100, variant="all")
    results = []
    for f in (lambda t: call(t, targets, impl, **options), lambda t: oracle(t, targets, **options)):
        leaves = [x.detach().requires_grad_() for x in tensors]
        results.append(torch.autograd.grad(f(leaves)[which].sum(), leaves))
    assert max(map(error, *results)) < 1e-12


@every_impl
def test_only_the_gradients_asked_for(impl):
    for wanted in range(1, 8):
        tensors, targets, _ = problem(5, 7, 30, variant="bias")
        for i, x in enumerate(tensors):
            x.requires_grad_(bool(wanted >> i & 1))
        call(tensors, targets, impl).logprob.sum().backward()
        assert [x.grad is not None for x in tensors] == [bool(wanted >> i & 1) for i in range(3)]


@every_impl
@pytest.mark.parametrize("targets", [[4, -100, -100], [-100, -100, -100]])
def test_ignored_rows_have_zero_logprob_and_gradient(impl, targets):
    tensors, _, _ = problem(3, 8, 50, torch.float32)
    hidden, weight = (x.requires_grad_() for x in tensors)
    logprob = linear_logprob(hidden, weight, torch.tensor(targets), impl=impl).logprob
    assert logprob.tolist()[1:] == [0.0, 0.0]
    logprob.sum().backward()
    assert [bool(row.any()) for row in hidden.grad] == [target >= 0 for target in targets]
    assert bool(weight.grad.any()) == (targets[0] >= 0)
    assert weight.grad.isfinite().all()


@every_impl
@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 0, 9)])
def test_nothing_to_sum(impl, shape):
    tensors, targets, _ = problem(*shape, dtype=torch.float32, variant="bias")
    outputs, gradients = run(lambda t: call(t, targets, impl), tensors)
    wanted, _ = run(lambda t: oracle(t, targets), [x.double() for x in tensors])
    assert max(map(error, outputs, wanted)) < 1e-6
    assert [x.shape for x in gradients] == [x.shape for x in tensors]
    if not shape[0]:
        assert not any(x.any() for x in gradients)


@every_impl
@pytest.mark.parametrize(("depth", "vocabulary"), [(33, 60), (64, 4100), (600, 2500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_the_head_and_its_softmax(impl, depth, vocabulary, dtype):
    """What the engine computes for a token from logits, training computes without them."""
    tensors, targets, _ = problem(130, depth, vocabulary, dtype, "bias")
    fused = call(tensors, targets, impl)
    logprob, lse = token_logprob(linear(*tensors, impl=impl), targets, impl=impl)
    assert torch.equal(fused.logprob, logprob)
    assert torch.equal(fused.lse, lse)


@every_impl
@pytest.mark.parametrize("variant", ["bias", "all"])
@pytest.mark.parametrize("vocabulary", [60, 5001])
def test_rows_do_not_depend_on_other_rows(impl, variant, vocabulary):
    tensors, targets, options = problem(230, 33, vocabulary, torch.float32, variant)
    temperature = options.pop("temperature", torch.ones(230))

    def statistics(hidden, targets, temperature):
        return tuple(call([hidden, *tensors[1:]], targets, impl, temperature=temperature, top_k=5, **options))

    check_rows(statistics, [tensors[0], targets, temperature])


@every_impl
def test_gradients_are_the_same_from_run_to_run(impl):
    tensors, targets, _ = problem(150, 40, 3000, torch.float32, "bias")
    leaves = [x.requires_grad_() for x in tensors]
    first = torch.autograd.grad(call(leaves, targets, impl).logprob.sum(), leaves)
    for _ in range(3):
        again = torch.autograd.grad(call(leaves, targets, impl).logprob.sum(), leaves)
        assert all(map(torch.equal, first, again))


@every_impl
@pytest.mark.parametrize("rows", [1, 5, 900])
@pytest.mark.parametrize("top_k", [1, 7, 60])
def test_top_k_tokens(impl, rows, top_k):
    tensors, targets, _ = problem(rows, 12, 4300, torch.float32)
    tensors[1][100:200] = tensors[1][50]  # equal logits: the lower id first
    tensors[1][3000] = tensors[1][50]
    result = call(tensors, targets, impl, top_k=top_k)
    log_p = linear(*tensors, impl=impl)
    wanted = torch.sort(log_p, dim=-1, descending=True, stable=True)
    assert torch.equal(result.top_ids, wanted.indices[:, :top_k])
    assert torch.equal(result.top_logprobs, wanted.values[:, :top_k] - result.lse[:, None])
    assert not result.top_logprobs.requires_grad


@every_impl
def test_extreme_values(impl):
    hidden = torch.eye(6)
    columns = torch.randn(6, 3000, generator=torch.Generator().manual_seed(0))
    columns[0] *= 1e4
    columns[1, :2500] = -1e30  # a block without probability
    columns[2] = 0.0
    columns[4, 7] = torch.nan
    columns[5, 2999] = torch.inf
    targets = torch.tensor([5, 2600, 3, 4, 6, 8])
    result = linear_logprob(hidden[:3], columns[:3, :].T.contiguous() @ torch.eye(3, 6), targets[:3], impl=impl)
    wanted = oracle([torch.eye(3).double(), columns[:3].T.double()], targets[:3])
    assert max(map(error, result[:3], wanted[:3])) < 1e-6
    assert result.entropy[2] == pytest.approx(math.log(3000), rel=1e-6)
    weight = torch.nan_to_num(columns.T, nan=0.0, posinf=0.0).contiguous()
    poisoned = linear_logprob(torch.tensor([[1.0] * 6, [torch.nan] * 6]), weight, targets[:2], impl=impl)
    assert poisoned.logprob[0].isfinite()
    assert all(value[1].isnan() for value in poisoned[:4])


@every_impl
def test_impossible_tokens(impl):
    """A bias of -inf takes tokens out: probability 0, no gradient, finite statistics but the mean."""
    tensors, _, _ = problem(4, 8, 40, torch.float32, "bias")
    tensors[2][10:30] = -torch.inf
    leaves = [x.requires_grad_() for x in tensors]
    result = call(leaves, torch.tensor([1, 2, 3, 35]), impl)
    kept = [*range(10), *range(30, 40)]
    small = [tensors[0], tensors[1][kept], tensors[2][kept]]
    wanted = oracle([x.detach().double() for x in small], torch.tensor([1, 2, 3, 15]))
    assert max(map(error, (x.detach() for x in result[:3]), wanted[:3])) < 1e-6
    gradients = torch.autograd.grad(result.logprob.sum() + result.entropy.sum(), leaves)
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[1][10:30].any()


@every_impl
def test_strided_inputs(impl):
    base, weight = seeded(4, 6, 40), seeded(100, 40, seed=1)
    targets = torch.arange(24).view(4, 6)
    for hidden, w, y in (
        (base[..., :20], weight[:, 20:], targets),
        (base.transpose(0, 1)[..., ::2], weight[::2, ::2], targets.T),
        (base[..., :20], weight.T.contiguous().T[:, :20], targets),
    ):
        got = linear_logprob(hidden, w, y, impl=impl)
        wanted = oracle([hidden.reshape(24, 20), w], y.reshape(24))
        assert max(error(a.reshape(24), b) for a, b in zip(got[:4], wanted)) < 1e-12
        assert got.lse.shape == y.shape


@every_impl
def test_under_checkpointing(impl):
    results = []
    for use in (False, True):
        tensors, targets, _ = problem(9, 20, 300)
        hidden, weight = (x.requires_grad_() for x in tensors)
        f = lambda h, w, y=targets: linear_logprob(h, w, y, impl=impl).logprob  # noqa: E731
        (checkpoint(f, hidden, weight, use_reentrant=False) if use else f(hidden, weight)).sum().backward()
        results.append((hidden.grad, weight.grad))
    assert all(map(torch.equal, *results))


@every_impl
def test_bad_input_is_named(impl):
    hidden, weight = torch.ones(2, 3), torch.ones(5, 3)
    with pytest.raises(ToolkitError, match=r"targets must have shape \[2\] or .* hidden of shape \[2, 3\], got \[3\]"):
        linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.int64), impl=impl)
    with pytest.raises(ToolkitError, match="top_k must be >= 0 and <= the vocabulary size 5, got 6"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), top_k=6, impl=impl)
    with pytest.raises(ToolkitError, match=r"temperature must be > 0, got 0.0"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), temperature=0.0, impl=impl)
    for wrong in (5, -1, -200):
        with pytest.raises(IndexError, match=rf"targets must be -100 or a token id from 0 to 4, got {wrong}\."):
            linear_logprob(hidden, weight, torch.tensor([0, wrong]), impl=impl)


@pytest.mark.parametrize("variant", ["plain", "all"])
def test_opcheck(variant):
    tensors, targets, options = problem(3, 4, 9, torch.float32, variant, choices=2)
    bias = tensors[2].requires_grad_() if len(tensors) > 2 else None
    temperature = options.get("temperature")
    scale, softcap = options.get("scale", 1.0), options.get("softcap", 0.0)
    hidden, weight = (x.requires_grad_() for x in tensors[:2])
    arguments = (hidden, weight, bias, targets, temperature, scale, softcap, 2)
    torch.library.opcheck(torch.ops.toolkit.linear_logprob.default, arguments)
    detached = [None if x is None else x.detach() for x in (hidden, weight, bias)]
    logprob, lse, entropy, mean, *_ = torch.ops.toolkit.linear_logprob(
        *detached, targets, temperature, scale, softcap, 0
    )
    gradients = (logprob, lse, entropy, mean, *detached, targets, temperature, lse, entropy, scale, softcap)
    torch.library.opcheck(torch.ops.toolkit.linear_logprob_backward.default, (*gradients, True, True, bias is not None))


@pytest.mark.skipif("cpu" not in IMPLS, reason="the reference holds the logits")
def test_logits_are_never_held():
    """1,024 tokens x 32,768 words forward and backward: above the gradients, less than a tenth of the logits."""
    script = """
import torch
from benchmarks.common import peak_rss
from toolkit.ops.linear_logprob import linear_logprob
torch.set_num_threads(2)
def step(rows):
    hidden, y = torch.randn(rows, 256, requires_grad=True), torch.randint(32768, (rows,))
    weight.grad = None
    linear_logprob(hidden, weight, y).logprob.sum().backward()
weight = torch.randn(32768, 256, requires_grad=True)
step(8)  # the weight's gradient, the code and the threads' scratch
before = peak_rss()
step(1024)
print(peak_rss() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1024 * 32768 * 4 / 10


def test_any_number_of_threads():
    tensors, targets, _ = problem(150, 40, 3000, torch.float32, "bias")
    with threads(1):
        wanted = call(tensors, targets, top_k=3)
    with threads(2):
        assert all(map(torch.equal, wanted, call(tensors, targets, top_k=3)))
    check_repeatable(lambda h, w, b: call([h, w, b], targets).entropy, tensors)


def test_dtypes_are_named():
    for dtype in DTYPES:
        assert linear_logprob(
            torch.ones(1, 2, dtype=dtype), torch.ones(3, 2, dtype=dtype), torch.tensor([1])
        ).lse.dtype in (
            torch.float32,
            torch.float64,
        )


# The Triton launchers: their tiles, splits and limits.
launch_linear_logprob = torch.ops.toolkit.linear_logprob
linear_logprob_backward = torch.ops.toolkit.linear_logprob_backward


@pytest.fixture
def small_and_poisoned(monkeypatch):
    """Several splits and chunks at small sizes; what is not written stays NaN."""
    monkeypatch.setattr(tiles, "SPLIT", 32)
    monkeypatch.setattr(tiles, "CHUNK", 48)


VARIANTS_of_triton = {
    "plain": (False, False, 1.0, 0.0),
    "bias": (True, False, 1.0, 0.0),
    "capped": (False, False, 1.5, 2.0),
    "everything": (True, True, 0.5, 3.0),
}


def problem_of_triton(rows, depth, vocabulary, variant="plain", dtype=torch.float32, choices=1):
    """hidden, weight, bias, targets (some ignored), temperature, scale, softcap."""
    g = torch.Generator().manual_seed(rows + depth)
    biased, tempered, scale, softcap = VARIANTS_of_triton[variant]
    hidden, weight = torch.randn(rows, depth, generator=g), torch.randn(vocabulary, depth, generator=g)
    bias = torch.randn(vocabulary, generator=g).to(dtype) if biased else None
    targets = torch.randint(-vocabulary // 4, vocabulary, (rows, choices), generator=g)
    heat = torch.rand(rows, generator=g, dtype=torch.float64) + 0.5 if tempered else None
    return [hidden.to(dtype), (1.5 * weight * depth**-0.5).to(dtype), bias, targets, heat, scale, softcap]


def dense(hidden, weight, bias, targets, heat, scale, softcap):
    z = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    if heat is not None:
        z = z / heat[:, None]
    log_p = torch.log_softmax(z, -1)
    own = torch.where(targets < 0, 0.0, log_p.gather(-1, targets.clamp_min(0)))
    return own, torch.logsumexp(z, -1), -(log_p.exp() * log_p).sum(-1), z.mean(-1)


def cotangents(rows, choices, seed=5):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, choices, generator=g), *(torch.randn(rows, generator=g) for _ in range(3))]


def backward(arguments, outputs, grads, needs=(True, True, True)):
    hidden, weight, bias, targets, heat, scale, softcap = arguments
    statistics = (targets, heat, outputs[1], outputs[2], scale, softcap)
    return linear_logprob_backward(*grads, hidden, weight, bias, *statistics, *needs)


def assert_near(value, exact, limit):
    assert value.shape == exact.shape
    if exact.numel():
        assert float((value.double() - exact).abs().max()) <= limit * max(float(exact.abs().max()), 0.1)


@only_triton
@pytest.mark.usefixtures("impl", "small_and_poisoned")
@pytest.mark.parametrize("variant", VARIANTS_of_triton)
@pytest.mark.parametrize(
    ("rows", "depth", "vocabulary", "choices"), [(1, 1, 1, 1), (3, 33, 45, 2), (21, 40, 70, 1), (0, 8, 9, 1)]
)
def test_values_and_every_gradient_match_fp64(variant, rows, depth, vocabulary, choices):
    arguments = problem_of_triton(rows, depth, vocabulary, variant, choices=choices)
    leaves = [t.double().requires_grad_() if t is not None else None for t in arguments[:3]]
    expected = dense(*leaves, *arguments[3:])
    outputs = launch_linear_logprob(*arguments, 0)
    for value, exact in zip(outputs, expected):
        assert value.dtype == torch.float32
        assert_near(value, exact.detach(), 3e-6)
    grads = cotangents(rows, choices)
    given = [leaf for leaf in leaves if leaf is not None]
    exact = torch.autograd.grad(expected, given, [g.double() for g in grads])
    got = backward(arguments, outputs, grads)
    again = backward(arguments, outputs, grads)
    assert all(torch.equal(*pair) for pair in zip(got, again))
    for value, wanted in zip(got, exact):
        assert_near(value, wanted, 3e-6)
    assert got[2].numel() == (0 if arguments[2] is None else vocabulary)


@only_triton
@pytest.mark.usefixtures("impl", "small_and_poisoned")
def test_half_precision():
    arguments = problem_of_triton(9, 40, 60, "bias", torch.float16)
    leaves = [t.double().requires_grad_() for t in arguments[:3]]
    expected = dense(*leaves, *arguments[3:])
    outputs = launch_linear_logprob(*arguments, 0)
    for value, exact in zip(outputs, expected):
        assert value.dtype == torch.float32
        assert_near(value, exact.detach(), 2e-3)
    grads = cotangents(9, 1)
    for value, exact in zip(
        backward(arguments, outputs, grads), torch.autograd.grad(expected, leaves, [g.double() for g in grads])
    ):
        assert value.dtype == torch.float16
        assert_near(value, exact, 3e-3)


@only_triton
@pytest.mark.usefixtures("impl", "small_and_poisoned")
def test_a_row_keeps_its_bits():
    arguments = problem_of_triton(40, 33, 70, "everything")
    hidden, weight, bias, targets, heat, scale, softcap = arguments
    whole = launch_linear_logprob(*arguments, 3)
    grads = cotangents(40, 1)
    dx = backward(arguments, whole, grads, (True, False, False))[0]
    for size in (1, 17, 30):
        rows = torch.randperm(40)[:size]
        part = [hidden[rows], weight, bias, targets[rows], heat[rows], scale, softcap]
        outputs = launch_linear_logprob(*part, 3)
        assert all(torch.equal(value, full[rows]) for value, full in zip(outputs, whole))
        assert torch.equal(backward(part, outputs, [g[rows] for g in grads], (True, False, False))[0], dx[rows])


@only_triton
@pytest.mark.usefixtures("impl", "small_and_poisoned")
def test_rows_without_gradient_are_left_out():
    """Their hidden states may even be NaN: nothing of them is read."""
    arguments = problem_of_triton(40, 20, 50)
    hidden, _, _, targets, *_ = arguments
    outputs = launch_linear_logprob(*arguments, 0)
    masked = torch.rand(40) < 0.7
    targets[masked] = -100
    zero = torch.zeros(40)
    grads = [torch.randn(40, 1), zero, zero, zero]
    keep = ~masked & (targets[:, 0] >= 0)
    dx, dw, _ = backward(arguments, outputs, grads)
    part = [hidden[keep], arguments[1], None, targets[keep], *arguments[4:]]
    outputs_part = [o[keep] for o in outputs[:4]]
    dx_part, dw_part, _ = backward(part, outputs_part, [g[keep] for g in grads])
    assert torch.equal(dx[keep], dx_part)
    assert bool((dx[~keep] == 0).all())
    assert torch.equal(dw, dw_part)
    hidden[~keep] = math.nan
    assert all(torch.equal(*pair) for pair in zip(backward(arguments, outputs, grads), (dx, dw, dx.new_empty(0))))
    nothing = backward(arguments, outputs, [g * 0 for g in grads])
    assert all(bool((g == 0).all()) for g in nothing)


@only_triton
@pytest.mark.usefixtures("impl", "small_and_poisoned")
def test_top_logits_and_their_order_among_equals():
    from toolkit.ops.linear_logprob.triton import largest

    arguments = problem_of_triton(30, 16, 70, "everything")
    values, ids = launch_linear_logprob(*arguments, 5)[4:]
    hidden, weight, bias, _, heat, scale, softcap = arguments
    z = torch.tanh((hidden @ weight.T + bias) * scale / softcap) * softcap / heat[:, None].float()
    order = torch.sort(z, descending=True, stable=True)
    torch.testing.assert_close(values, order.values[:, :5], rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, order.indices[:, :5])
    tied = torch.tensor([[0.0, -0.0, 2.0, -1.5, 2.0, -math.inf, -1.5, math.inf, math.nan]])
    values, ids = largest(tied, 9)
    assert ids.tolist() == [[8, 7, 2, 4, 0, 1, 3, 6, 5]]
    assert values[0, 0].isnan()
    assert torch.equal(values[0, 1:], tied[0, ids[0, 1:]])


@only_triton
@pytest.mark.usefixtures("impl", "small_and_poisoned")
def test_extreme_logits():
    """Identity weights put the logits in the test's hand."""
    rows = torch.zeros(5, 64)
    rows[0, 3] = 1e30
    rows[1] = -math.inf
    rows[1, 40] = 2.0
    rows[2] = -math.inf
    rows[3, 50] = math.nan
    rows[4] = -1e30
    weight, targets = torch.eye(64), torch.tensor([[3], [40], [0], [1], [63]])
    rows = torch.nan_to_num(rows, nan=math.nan, neginf=-3e38)  # 0 * inf would be NaN in the product
    bias = torch.zeros(64)
    logprob, lse, entropy, _, _, _ = launch_linear_logprob(rows, weight, bias, targets, None, 1.0, 0.0, 0)
    assert torch.equal(logprob[[0, 1], 0], torch.zeros(2))
    assert torch.equal(lse[:2], torch.tensor([1e30, 2.0]))
    assert torch.equal(entropy[:2], torch.zeros(2))
    torch.testing.assert_close(logprob[4, 0], torch.tensor(-math.log(64)))
    torch.testing.assert_close(entropy[4], torch.tensor(math.log(64)))
    assert bool(lse[3].isnan())
    # Minus infinity itself, from the bias: tokens that are not allowed.
    bias[:40] = -math.inf
    rows, targets = torch.randn(3, 64), torch.tensor([[40], [3], [63]])
    arguments = [rows, weight, bias, targets, None, 1.0, 0.0]
    outputs = launch_linear_logprob(*arguments, 0)
    expected = dense(*(t.double() for t in (rows[:, 40:], weight[40:, 40:])), None, targets - 40, None, 1.0, 0.0)
    assert_near(outputs[0][[0, 2]], expected[0][[0, 2]], 2e-6)
    assert outputs[0][1, 0] == -math.inf
    assert_near(outputs[1], expected[1], 2e-6)
    assert_near(outputs[2], expected[2], 2e-6)
    zero = torch.zeros(3)
    dx, _, _ = backward(arguments, outputs, [torch.ones(3, 1), zero, torch.ones(3), zero])
    assert bool(dx[[0, 2]].isfinite().all())


@only_triton
@pytest.mark.usefixtures("impl", "small_and_poisoned")
def test_strides_far_rows_and_targets_beyond_the_vocabulary():
    arguments = problem_of_triton(3, 16, 40, dtype=torch.float16)
    arguments[3] = torch.tensor([[1], [40], [-5]])
    outputs = launch_linear_logprob(*arguments, 2)
    assert bool(outputs[0][1].isnan())
    assert outputs[0][2] == 0
    grads = cotangents(3, 1)
    gradients = backward(arguments, outputs, grads)
    memory = torch.empty(2 * (1 << 30) + 64, dtype=torch.float16)  # reserved, touched in three rows only
    far = [memory.as_strided((3, 16), (1 << 30, 1)).copy_(arguments[0]), arguments[1].t().contiguous().t()]
    again = launch_linear_logprob(*far, *arguments[2:], 2)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(again, outputs))
    assert all(torch.equal(*pair) for pair in zip(backward(far + arguments[2:], outputs, grads), gradients))


@only_triton
@pytest.mark.usefixtures("impl", "small_and_poisoned")
def test_bad_input_is_one_sentence():
    hidden, weight, _, targets, heat, scale, softcap = problem_of_triton(3, 16, 40)
    for arguments, words in [
        ((hidden.double(), weight.double(), None), "float64"),
        ((hidden, weight.half(), None), "must be equal"),
        ((hidden[:, :3], weight, None), r"got \[3, 3\] and \[40, 16\]"),
        ((hidden, weight, torch.zeros(3)), r"bias must have shape .* got \[3\]"),
    ]:
        with pytest.raises(ToolkitError, match=words):
            launch_linear_logprob(*arguments, targets, heat, scale, softcap, 0)
