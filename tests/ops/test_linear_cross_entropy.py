"""linear_cross_entropy against dense float64 cross-entropy: value, every gradient, bits, what autograd does with it."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.helpers.implementations import (
    IMPLEMENTATIONS,
    NATIVE,
    REFERENCE,
    SMALL,
    TRITON,
    Implementation,
    impl_and_dtype,
    implementations,
    parameter,
)
from tests.helpers.rowwise import THREADS, error, integers, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.modules.head import causal_lm_loss
from toolkit.ops.linear_cross_entropy import linear_cross_entropy
from toolkit.ops.linear_logprob import deferred, linear_logprob, tiles
from toolkit.ops.linear_logprob.deferred import DeferredLogits, summed_cross_entropy, token_logprobs

BOUND = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}
SIZES = [(1, 1, 1), (7, 33, 60), (13, 64, 2049), (500, 16, 4101), (1000, 40, 50)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """In the interpreter: several splits, chunks and parts at small sizes."""
    if SMALL:
        monkeypatch.setattr(tiles, "SPLIT", 32)
        monkeypatch.setattr(tiles, "CHUNK", 48)
        monkeypatch.setattr(tiles, "PART", 16)


def problem(
    rows: int, depth: int, vocabulary: int, dtype: torch.dtype | None = None, bias: bool = True
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(hidden, weight[, bias]), targets (about a fifth ignored) and weights of rows (about a fifth 0)."""
    tensors = [
        seeded(rows, depth, dtype=dtype),
        seeded(vocabulary, depth, dtype=dtype, scale=1.5 * max(depth, 1) ** -0.5, seed=1),
    ]
    if bias:
        tensors.append(seeded(vocabulary, dtype=dtype, seed=2))
    targets = integers(0, vocabulary, rows, seed=3)
    targets = torch.where(integers(0, 5, rows, seed=4) == 0, -100, targets)
    return tensors, targets, (seeded(rows, dtype=torch.float32, seed=5) + 0.8).clamp_min(0.0)


def oracle(tensors: list[Tensor], targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """From dense logits and torch's own cross_entropy."""
    losses = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(*tensors), targets, ignore_index=-100, reduction="none"
    )
    return (losses if weights is None else losses * weights.to(losses)).sum()


def call(
    tensors: list[Tensor], targets: Tensor, weights: Tensor | None = None, impl: Implementation = NATIVE
) -> Tensor:
    bias = tensors[2] if len(tensors) > 2 else None
    return linear_cross_entropy(tensors[0], tensors[1], targets, bias=bias, row_weights=weights, impl=impl.option)


def run(f, tensors: list[Tensor], factor: float = 1.0) -> list[Tensor]:
    """The loss and the gradients of it times ``factor``."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    loss = f(leaves)
    return [loss.detach(), *torch.autograd.grad(loss * factor, leaves)]


@pytest.mark.parametrize(
    ("impl", "dtype", "size"),
    [
        parameter(one, dtype, size)
        for one in IMPLEMENTATIONS
        for dtype in one.dtypes
        for size in ([*SIZES[:2], (0, 40, 70), (21, 40, 70)] if SMALL and one is TRITON else SIZES)
    ],
    indirect=["impl"],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradients(impl, dtype, size, weighted):
    rows, depth, vocabulary = size
    tensors, targets, weights = problem(rows, depth, vocabulary, dtype)
    weights = weights if weighted else None
    got = run(lambda t: call(t, targets, weights, impl), tensors, 0.37)
    wanted = run(lambda t: oracle(t, targets, weights), [x.double() for x in tensors], 0.37)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [x.dtype for x in got[1:]] == [dtype] * 3
    assert max(map(error, got, wanted)) < BOUND[dtype]


@implementations(REFERENCE, NATIVE)
def test_gradcheck(impl):
    tensors, targets, weights = problem(5, 4, 9)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *t: call(list(t), targets, weights, impl), leaves)


@impl_and_dtype([torch.float32, torch.bfloat16], [REFERENCE, NATIVE])  # on a GPU the GEMMs are cuBLAS's
@pytest.mark.parametrize(("rows", "vocabulary"), [(70, 60), (900, 2500)])
def test_value_has_the_bits_of_linear_logprob(impl, dtype, rows, vocabulary):
    tensors, targets, _ = problem(rows, 33, vocabulary, dtype)
    wanted = -linear_logprob(tensors[0], tensors[1], targets, bias=tensors[2], impl=impl.option).logprob.sum()
    for wants in (False, True):
        leaves = [x.detach().requires_grad_(wants) for x in tensors]
        assert torch.equal(call(leaves, targets, impl=impl), wanted)


@impl_and_dtype([torch.float32, torch.float64, torch.bfloat16], [NATIVE, TRITON])
def test_every_run_and_any_number_of_threads_has_the_same_bits(impl, dtype):
    size = (60, 40, 70) if SMALL and impl is TRITON else (900, 40, 4300)
    tensors, targets, weights = problem(*size, dtype)
    with threads(1):
        wanted = run(lambda t: call(t, targets, weights, impl), tensors)
    for n in (1, *THREADS):
        with threads(n):
            assert all(map(torch.equal, wanted, run(lambda t: call(t, targets, weights, impl), tensors)))


def test_only_the_gradients_asked_for(impl):
    tensors, targets, _ = problem(5, 7, 30)
    expected = run(lambda t: call(t, targets, impl=impl), tensors)[1:]
    for wanted in range(1, 8):
        leaves = [x.detach().clone().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(tensors)]
        call(leaves, targets, impl=impl).backward()
        for i, (leaf, exact) in enumerate(zip(leaves, expected)):
            assert (leaf.grad is not None) == bool(wanted >> i & 1)
            assert leaf.grad is None or torch.equal(leaf.grad, exact)


@pytest.mark.usefixtures("impl")
def test_unwanted_gradients_are_not_computed():
    tensors, targets, _ = problem(5, 7, 30)
    kept = torch.ops.toolkit.linear_cross_entropy(*tensors, targets, None, False, True, False)[1:]
    assert [x.numel() for x in kept] == [0, 30 * 7, 0]
    leaves = [x.requires_grad_() for x in tensors]
    with torch.no_grad():
        assert not call(leaves, targets).requires_grad


@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 0, 9)])
def test_nothing_to_sum(impl, shape):
    tensors, targets, _ = problem(*shape, dtype=torch.float32)
    got = run(lambda t: call(t, targets, impl=impl), tensors)
    wanted = run(lambda t: oracle(t, targets), [x.double() for x in tensors])
    assert max(map(error, got, wanted)) < 1e-6


def test_rows_that_count_for_nothing(impl):
    """Their hidden states may even be NaN."""
    tensors, targets, weights = problem(50, 8, 30, torch.float32)
    counted = (targets >= 0) & (weights != 0)
    few = run(lambda t: call(t, targets[counted], weights[counted], impl), [tensors[0][counted], *tensors[1:]])
    tensors[0][~counted] = torch.nan
    if impl is not REFERENCE:
        got = run(lambda t: call(t, targets, weights, impl), tensors)
        assert not got[1][~counted].any()
        got[1] = got[1][counted]
        assert max(map(error, got, few)) < 1e-6
    leaves = [x.detach().nan_to_num().requires_grad_() for x in tensors]
    loss = call(leaves, torch.full_like(targets, -100), impl=impl)
    assert loss == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, leaves))


def test_extreme_values(impl):
    words = 250 if SMALL and impl is TRITON else 2500
    tensors, _, _ = problem(4, 8, words, torch.float32)
    tensors[2][100 : words - 100] = -torch.inf  # tokens that are not allowed; the last block has some left
    targets = torch.tensor([1, 2, 99, words - 50])
    kept = [*range(100), *range(words - 100, words)]
    wanted = run(
        lambda t: oracle([t[0], t[1][kept], t[2][kept]], torch.tensor([1, 2, 99, 150])), [x.double() for x in tensors]
    )
    got = run(lambda t: call(t, targets, impl=impl), tensors)
    assert max(map(error, got, wanted)) < 1e-6
    tensors[2][words - 100 :] = -torch.inf  # a block without any probability
    assert all(x.isfinite().all() for x in run(lambda t: call(t, targets[:3].repeat(2)[:4], impl=impl), tensors))
    tensors[0][1] = torch.nan
    loss, dh, dw, _ = run(lambda t: call(t, targets[:3].repeat(2)[:4], impl=impl), tensors)
    assert loss.isnan()
    assert dh.isnan().any(1).tolist() == [False, True, False, False]
    assert dw.isnan().all()
    tensors[0][1] = 30.0 * tensors[1][7]
    tensors[0][0] = 1e30 * tensors[1][7]  # probability 1, and the target has none
    loss, dh, *_ = run(lambda t: call(t, torch.tensor([1, 7, 7, 7]), impl=impl), tensors)
    assert loss > 1e28
    assert dh.isfinite().all()


def test_strided_inputs(impl):
    base, weight = seeded(4, 6, 40, dtype=impl.dtypes[0]), seeded(100, 40, dtype=impl.dtypes[0], seed=1)
    targets = torch.arange(24).view(4, 6)
    for hidden, w, y in (
        (base[..., :20], weight[:, 20:], targets),
        (base.transpose(0, 1)[..., ::2], weight[::2, ::2], targets.T),
        (base[..., :20], weight.T.contiguous().T[:, :20], targets),
    ):
        got = run(lambda t, y=y: linear_cross_entropy(t[0], t[1], y, impl=impl.option), [hidden, w])
        strided = [hidden.detach().requires_grad_(), w.detach().requires_grad_()]
        again = torch.autograd.grad(linear_cross_entropy(*strided, y, impl=impl.option), strided)
        wanted = run(lambda t, y=y: oracle([t[0].flatten(0, 1), t[1]], y.flatten()), [hidden.double(), w.double()])
        assert max(map(error, got, wanted)) < impl.near(1e-12)
        assert max(map(error, again, wanted[1:])) < impl.near(1e-12)


def test_walked_twice():
    """Neither a second backward nor a gradient that was handed out changes what is kept."""
    tensors, targets, _ = problem(9, 20, 300, torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    loss = call(leaves, targets)
    first = torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)
    for gradient in first:
        gradient.zero_()
    (loss / 4).backward(retain_graph=True)
    (loss * 0.5 + loss / 4).backward()
    wanted = run(lambda t: call(t, targets), tensors)[1:]
    for leaf, exact in zip(leaves, wanted):
        torch.testing.assert_close(leaf.grad, exact)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_accumulates_into_what_is_there_and_into_tied_weights():
    tensors, targets, _ = problem(9, 20, 300, torch.float64, bias=False)
    ids = torch.arange(9) * 7

    def tied(loss):
        weight = tensors[1].clone().requires_grad_()
        for scale in (0.5, 2.0):  # two micro-batches
            loss([scale * weight[ids] + tensors[0], weight]).backward()
        return weight.grad

    assert error(tied(lambda t: call(t, targets)), tied(lambda t: oracle(t, targets))) < 1e-12


def test_no_second_derivative():
    tensors, targets, _ = problem(3, 4, 9)
    leaves = [x.requires_grad_() for x in tensors]
    with pytest.raises(ToolkitError, match="create_graph=True is not supported"):
        torch.autograd.grad(call(leaves, targets), leaves, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    tensors, targets, _ = problem(9, 20, 300)
    leaves = [x.requires_grad_() for x in tensors]
    wanted = run(lambda t: call(t, targets), tensors)
    loss = checkpoint(lambda *t: call(list(t), targets), *leaves, use_reentrant=reentrant)
    loss.backward()
    assert all(map(torch.equal, [loss.detach(), *(x.grad for x in leaves)], wanted))


def test_compiles_whole():
    tensors, targets, weights = problem(9, 20, 300, torch.float32)
    compiled = torch.compile(lambda t: call(t, targets, weights) / 3, fullgraph=True, backend="aot_eager")
    got, wanted = run(compiled, tensors), run(lambda t: call(t, targets, weights) / 3, tensors)
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    tensors, targets, weights = problem(3, 4, 9, dtype)
    leaves = [x.requires_grad_() for x in tensors]
    op = torch.ops.toolkit.linear_cross_entropy.default
    torch.library.opcheck(op, (*leaves, targets, weights, True, True, True))
    torch.library.opcheck(op, (leaves[0], tensors[1].detach(), None, targets, None, True, False, False))


def test_bad_input_is_named(impl):
    hidden, weight = torch.ones(2, 3), torch.ones(5, 3)
    with pytest.raises(ToolkitError, match=r"targets must have shape \[2\] for hidden \[2, 3\], got \[3\]"):
        linear_cross_entropy(hidden, weight, torch.zeros(3, dtype=torch.int64), impl=impl.option)
    with pytest.raises(ToolkitError, match=r"row_weights must have shape \[2\] for hidden \[2, 3\], got \[1\]"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), row_weights=torch.ones(1), impl=impl.option)
    for wrong in (5, -1, -200):
        with pytest.raises(IndexError, match=rf"targets must be -100 or a token id from 0 to 4, got {wrong}\."):
            linear_cross_entropy(hidden, weight, torch.tensor([0, wrong]), impl=impl.option)
    with pytest.raises(ToolkitError, match=r"impl of op linear_cross_entropy must be one of reference.*got 'cuda'"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), impl="cuda")


@implementations(NATIVE)  # the reference holds the logits
@pytest.mark.usefixtures("impl")
def test_logits_are_never_held():
    """2,048 tokens x 16,384 words: above the gradients, a quarter of the logits."""
    script = """
import torch
from benchmarks.common import peak_rss
from toolkit.ops.linear_cross_entropy import linear_cross_entropy
torch.set_num_threads(1)
def step(rows):
    hidden, y = torch.randn(rows, 64, requires_grad=True), torch.randint(16384, (rows,))
    weight.grad = None
    linear_cross_entropy(hidden, weight, y).backward()
weight = torch.randn(16384, 64, requires_grad=True)
step(8)  # the weight's gradient, the code and the threads' scratch
before = peak_rss()
step(2048)
print(peak_rss() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2048 * 16384 * 4 / 4


# In the loss of a causal language model.


def labels() -> Tensor:
    return torch.where(torch.arange(12).view(2, 6) % 5 == 0, -100, torch.arange(12).view(2, 6))


@pytest.fixture
def calls(monkeypatch):
    """How often the loss took its gradient with its value."""
    seen = []

    def counting(*args, **kwargs):
        seen.append(1)
        return linear_cross_entropy(*args, **kwargs)

    monkeypatch.setattr(deferred, "linear_cross_entropy", counting)
    return seen


@implementations(NATIVE)  # the loss takes linear_logprob where no product is saved
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
def test_loss_keeps_its_bits(items, calls):
    tensors = [seeded(2, 6, 8, dtype=torch.float32), *problem(1, 8, 30, torch.float32)[0][1:]]

    def loss(t):
        return causal_lm_loss(DeferredLogits(*t), labels(), 30, num_items_in_batch=items)

    def before(t):
        targets = torch.nn.functional.pad(labels(), (0, 1), value=-100)[..., 1:]
        total = -token_logprobs(DeferredLogits(*t), targets)[0].sum()
        return total / ((targets >= 0).sum() if items is None else items)

    got, wanted = run(loss, tensors), run(before, tensors)
    assert calls == [1]
    assert torch.equal(got[0], wanted[0])
    assert max(map(error, got[1:], wanted[1:])) < 1e-6


def test_loss_without_counted_tokens(calls):
    tensors = [seeded(2, 6, 8, dtype=torch.float32), *problem(1, 8, 30, torch.float32)[0][1:]]
    nothing = torch.full_like(labels(), -100)
    assert causal_lm_loss(DeferredLogits(*tensors), nothing, 30).isnan()  # a mean of nothing, as cross_entropy's
    assert causal_lm_loss(DeferredLogits(*tensors), nothing, 30, num_items_in_batch=4) == 0.0


def test_logits_that_were_changed_or_read_go_the_other_way(calls):
    targets = labels()
    late = DeferredLogits(seeded(2, 6, 8, dtype=torch.float32), seeded(30, 8, dtype=torch.float32, seed=1), None)
    scaled, capped = late * 0.5, torch.tanh(late / 3.0) * 3.0
    late.argmax(-1)  # computes them
    for logits in (scaled, capped, late, late.compute()):
        assert torch.equal(summed_cross_entropy(logits, targets), -token_logprobs(logits, targets)[0].sum())
    assert calls == []


@pytest.mark.parametrize(("device", "native", "three"), [("cuda", False, 1), ("xpu", True, 0), ("cpu", False, 0)])
def test_three_gemms_where_a_device_has_the_kernel(device, native, three, calls, monkeypatch):
    """Logits that say that they are on a device, which need not be there."""

    class There(DeferredLogits):
        device = property(lambda self: torch.device(device))

    monkeypatch.setattr(deferred, "has_native", lambda op: native)
    tensors, targets, _ = problem(7, 8, 30, torch.float32)
    loss = summed_cross_entropy(There(*tensors), targets)
    assert calls == [1] * three
    torch.testing.assert_close(loss.double(), oracle([x.double() for x in tensors], targets))
    summed_cross_entropy(There(*tensors) * 0.5, targets)  # scaled logits have no such op
    assert calls == [1] * three
