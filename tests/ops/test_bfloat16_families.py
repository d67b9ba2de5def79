"""bfloat16 GEMMs: by pairs (vdpbf16ps) as near to float64 as by widening, and batch-invariant; the switch between them.

The tests of every op run in the family of the process; here both run beside each other, each in its own process.
"""

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.rowwise import seeded
from toolkit.ops import native
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.experts import experts
from toolkit.ops.grouped_linear import grouped_linear
from toolkit.ops.linear import linear, linear_group
from toolkit.ops.linear_cross_entropy import linear_cross_entropy
from toolkit.ops.linear_logprob import linear_logprob

PAIRS = native.family(torch.bfloat16) == "vdpbf16ps"
needs_pairs = pytest.mark.skipif(not PAIRS, reason="needs a processor with AVX512-BF16")
pytestmark = pytest.mark.usefixtures("one_thread")
# (rows, N, K): few and many rows, several blocks of K and of rows, last pairs and panels that are cut
SIZES = [(1, 48, 576), (5, 33, 257), (9, 65, 1100), (130, 96, 512), (700, 40, 63), (1, 1, 1), (2, 3, 31)]


def products() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each op's outputs and gradients in bfloat16, beside those of the same numbers in float64."""
    found = {}

    def compare(name, call, tensors):
        results = []
        for dtype in (torch.bfloat16, torch.float64):
            given = [t.to(dtype).requires_grad_() for t in tensors]
            out = call(*given)
            upstream = seeded(*out.shape, dtype=torch.bfloat16, seed=9).to(out.dtype)
            results.append([out.detach(), *torch.autograd.grad(out, given, upstream)])
        for at, pair in enumerate(zip(*results, strict=True)):
            found[f"{name} {at}"] = pair

    for rows, outputs, depth in SIZES:
        x, w, b = (
            seeded(*s, dtype=torch.bfloat16, seed=i)
            for i, s in enumerate([(rows, depth), (outputs, depth), (outputs,)])
        )
        compare(f"linear {rows} {outputs} {depth}", linear, (x, w, b))
    hidden, head = (seeded(*s, dtype=torch.bfloat16, seed=i) for i, s in enumerate([(450, 65), (2300, 65)]))
    targets = torch.randint(2300, (450,), generator=torch.Generator().manual_seed(1))
    compare("logprob", lambda x, w: linear_logprob(x, w, targets).logprob, (hidden, head / 4))
    compare("cross entropy", lambda x, w: linear_cross_entropy(x, w, targets), (hidden, head / 4))
    plan = dispatch_plan(torch.randint(5, (90, 2), generator=torch.Generator().manual_seed(2)), 5)
    tokens, up, down = (
        seeded(*s, dtype=torch.bfloat16, seed=i) for i, s in enumerate([(90, 63), (5, 94, 63), (5, 63, 47)])
    )
    compare("grouped", lambda x, w: grouped_linear(x, w, None, plan, gather=True), (tokens, up))
    topk = seeded(90, 2, dtype=torch.bfloat16, seed=7).sigmoid()
    compare(
        "experts",
        lambda x, t, u, d: experts(x, t, u, d, plan, activation="silu"),
        (tokens, topk, up / 8, down / 8),
    )
    return found


def errors(found: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Root mean square error of each result over the exact one's."""
    return {
        name: ((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=1e-30)).item()
        for name, (got, exact) in found.items()
    }


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@needs_pairs
def test_pairs_are_as_near_to_float64_as_widening(tmp_path):
    path = tmp_path / "upcast.pt"
    code = (
        "import torch; torch.set_num_threads(1); from tests.ops import test_bfloat16_families as t; "
        f"assert t.native.family(torch.bfloat16) == 'vector'; torch.save(t.errors(t.products()), {str(path)!r})"
    )
    result = run(code, TOOLKIT_BFLOAT16="widen")
    assert result.returncode == 0, result.stderr
    by_upcast, by_pairs = torch.load(path), errors(products())
    assert by_upcast.keys() == by_pairs.keys()
    assert len(by_upcast) > 30
    for name, error in by_pairs.items():
        # Results are rounded to 8 bits; gradients of logits and between an expert's GEMMs are rounded on the way too.
        assert error <= 1.5 * by_upcast[name] + 2e-5, (name, error, by_upcast[name])
        assert error < 8e-3, (name, error)


def test_families_by_name():
    assert native.family(torch.float32) in ("vector", "reference")
    assert native.family(torch.bfloat16) in ("vdpbf16ps", "vector", "reference")


@pytest.mark.skipif(native.load() != "avx512", reason="only there is a choice")
def test_a_wrong_setting_is_refused():
    code = "import torch; from toolkit.ops import native; native.family(torch.bfloat16)"
    result = run(code, TOOLKIT_BFLOAT16="yes")
    assert result.returncode == 1
    assert "TOOLKIT_BFLOAT16 must be unset or 'widen', got 'yes'." in result.stderr


@pytest.mark.parametrize("depth", [1, 31, 63, 257, 1025])
def test_rows_with_a_last_pair_that_is_cut_stand_alone(depth):
    """The pair that is half empty must not take the next row's first number, least of all a NaN."""
    x, w = seeded(40, depth, dtype=torch.bfloat16), seeded(33, depth, dtype=torch.bfloat16, seed=1)
    full = linear(x, w)
    for rows in (1, 2, 8, 9, 25):
        assert torch.equal(linear(x[:rows], w), full[:rows])
    dirty = x.clone()
    dirty[1::2] = float("nan")
    assert torch.equal(linear(dirty, w)[::2], full[::2])
    joined = torch.full((40, depth + 1), float("nan"), dtype=torch.bfloat16)
    joined[:, :depth] = x
    assert torch.equal(linear(joined[:, :depth], w), full)
    last = x.clone()
    last[3, -1] = float("inf")
    assert bool(linear(last, w)[3].isinf().all())  # and not infinity times a padding of 0


@pytest.mark.parametrize("rows", [1, 3, 31, 512, 513, 1025])
def test_gradients_over_an_odd_number_of_rows(rows):
    """Pairs of neighbouring rows, of which the last is cut; rows in blocks."""
    x, w = (
        seeded(rows, 40, dtype=torch.bfloat16).requires_grad_(),
        seeded(17, 40, dtype=torch.bfloat16).requires_grad_(),
    )
    grad = seeded(rows, 17, dtype=torch.bfloat16, seed=3)
    dx, dw = torch.autograd.grad(linear(x, w), (x, w), grad)
    exact_x, exact_w = grad.double() @ w.detach().double(), grad.double().T @ x.detach().double()
    scale = grad.double().abs().T @ x.detach().double().abs()
    assert bool(((dw.double() - exact_w).abs() <= 2.0**-8 * exact_w.abs() + 1e-6 * scale).all())
    torch.testing.assert_close(dx.double(), exact_x, rtol=2.0**-7, atol=2e-2)


def test_a_group_and_threads_change_no_bit():
    x = seeded(70, 130, dtype=torch.bfloat16)
    weights = [seeded(n, 130, dtype=torch.bfloat16, seed=n) for n in (48, 7, 96)]
    wanted = [linear(x, w) for w in weights]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for got, want in zip(linear_group(x, weights, [None] * 3), wanted, strict=True):
            assert torch.equal(got, want)


@needs_pairs
def test_numbers_below_the_normal_ones_count_as_zero():
    tiny = torch.full((1, 2), 2.0**-130, dtype=torch.bfloat16)
    large = torch.full((1, 2), 2.0**100, dtype=torch.bfloat16)
    assert linear(tiny, large).item() == 0.0
    smallest = torch.full((1, 2), 2.0**-126, dtype=torch.bfloat16)
    assert linear(smallest, large).item() == 2.0**-25
