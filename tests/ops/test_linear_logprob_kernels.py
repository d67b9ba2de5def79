"""linear_logprob: memory, threads, rows without gradient, and what only a kernel does."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import (
    NATIVE,
    SMALL,
    TRITON,
    impl_and_dtype,
    implementations,
    only_triton,
)
from tests.helpers.interpreter import far_apart
from tests.helpers.linear_logprob import call, problem
from tests.helpers.rowwise import check_repeatable, error, integers, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.linear_logprob import linear_logprob, tiles


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """In the interpreter: several splits and chunks at small sizes."""
    if SMALL:
        monkeypatch.setattr(tiles, "SPLIT", 32)
        monkeypatch.setattr(tiles, "CHUNK", 48)


@implementations(NATIVE)  # the reference holds the logits
@pytest.mark.usefixtures("impl")
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


@implementations(NATIVE)
@pytest.mark.usefixtures("impl")
def test_any_number_of_threads():
    tensors, targets, _ = problem(150, 40, 3000, torch.float32, "bias")
    with threads(1):
        wanted = call(tensors, targets, top_k=3)
    with threads(2):
        assert all(map(torch.equal, wanted, call(tensors, targets, top_k=3)))
    check_repeatable(lambda h, w, b: call([h, w, b], targets).entropy, tensors)


@impl_and_dtype()
def test_statistics_are_float32_or_float64(impl, dtype):
    hidden, weight = torch.ones(1, 2, dtype=dtype), torch.ones(3, 2, dtype=dtype)
    result = linear_logprob(hidden, weight, torch.tensor([1]), impl=impl.option)
    assert result.lse.dtype == torch.promote_types(dtype, torch.float32)


def backward(tensors: list[Tensor], targets: Tensor, outputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients to hidden, weight and bias from the op itself."""
    hidden, weight, bias = tensors
    of_logprob, *others = grads
    return torch.ops.toolkit.linear_logprob_backward(
        of_logprob[:, None], *others, hidden, weight, bias, targets[:, None], None, outputs[1], outputs[2], 1.0, 0.0,
        True, True, True,
    )  # fmt: skip


@implementations(NATIVE, TRITON)  # torch chooses the order of the reference's sums
def test_gradient_rows_do_not_depend_on_other_rows_and_rows_without_gradient_are_left_out(impl):
    """Hidden states of the latter may even be NaN: nothing of them is read."""
    tensors, targets, _ = problem(40, 20, 50, torch.float32, "bias")
    outputs = call(tensors, targets)[:4]
    zero = torch.zeros(40)
    some = torch.where(integers(0, 3, 40, seed=6) == 0, 0.0, seeded(40, dtype=torch.float32, seed=7))
    grads = [some, zero, zero, zero]
    counted = (targets >= 0) & (grads[0] != 0)
    dx, dw, db = backward(tensors, targets, outputs, grads)
    part = [tensors[0][counted], *tensors[1:]]
    few = backward(part, targets[counted], [o[counted] for o in outputs], [g[counted] for g in grads])
    assert torch.equal(dx[counted], few[0])
    assert not dx[~counted].any()
    assert max(error(dw, few[1]), error(db, few[2])) < 1e-6
    tensors[0][~counted] = math.nan
    for got, wanted in zip(backward(tensors, targets, outputs, grads), (dx, dw, db)):
        assert torch.equal(got, wanted)
    nothing = backward(tensors, targets, outputs, [g * 0 for g in grads])
    assert not any(g.any() for g in nothing)


# The Triton launcher: its order among equal logits, and its limits.
@only_triton
@pytest.mark.usefixtures("impl")
def test_the_order_of_infinities_and_nan():
    from toolkit.ops.linear_logprob.triton import largest

    tied = torch.tensor([[0.0, -0.0, 2.0, -1.5, 2.0, -math.inf, -1.5, math.inf, math.nan]])
    values, ids = largest(tied, 9)
    assert ids.tolist() == [[8, 7, 2, 4, 0, 1, 3, 6, 5]]
    assert values[0, 0].isnan()
    assert torch.equal(values[0, 1:], tied[0, ids[0, 1:]])


@only_triton
@pytest.mark.usefixtures("impl")
def test_rows_beyond_two_to_the_31_elements():
    tensors, _, _ = problem(3, 16, 40, torch.float16, "bias")
    targets = torch.tensor([1, 39, -100])
    outputs = call(tensors, targets, top_k=2)
    grads = [seeded(3, dtype=torch.float32, seed=at) for at in range(4)]
    far = [far_apart(tensors[0]), tensors[1].t().contiguous().t(), tensors[2]]
    for got, wanted in zip(call(far, targets, top_k=2), outputs):
        assert torch.equal(got, wanted)
    for got, wanted in zip(backward(far, targets, outputs, grads), backward(tensors, targets, outputs, grads)):
        assert torch.equal(got, wanted)


@only_triton
@pytest.mark.usefixtures("impl")
def test_bad_input_is_one_sentence():
    (hidden, weight), targets, _ = problem(3, 16, 40, torch.float32)
    for arguments, words in [
        ((hidden.double(), weight.double(), None), "float64"),
        ((hidden, weight.half(), None), "must be equal"),
        ((hidden[:, :3], weight, None), r"got \[3, 3\] and \[40, 16\]"),
        ((hidden, weight, torch.zeros(3)), r"bias must have shape .* got \[3\]"),
    ]:
        with pytest.raises(ToolkitError, match=words):
            torch.ops.toolkit.linear_logprob(*arguments, targets[:, None], None, 1.0, 0.0, 0)
