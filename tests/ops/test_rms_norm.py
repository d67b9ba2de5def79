import pytest
import torch
from torch import Tensor

from tests.helpers.rowwise import DTYPES, IMPLS, check_oracle, check_repeatable, check_rows, error, run, seeded
from toolkit.errors import ToolkitError
from toolkit.ops import native
from toolkit.ops.rms_norm import add_rms_norm, rms_norm

EPS = 1e-6


def oracle(x: Tensor, weight: Tensor | None = None, offset: float = 0.0) -> Tensor:
    y = x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS)
    return y if weight is None else y * (offset + weight)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (3, 60), (37, 513), (2, 3, 64), (0, 16), (9,), (2, 4096)])
@pytest.mark.parametrize("offset", [0.0, 1.0, None])
def test_values_and_gradients(impl, dtype, shape, offset):
    x = seeded(*shape, dtype=dtype)
    if offset is None:
        check_oracle(lambda x: rms_norm(x, None, EPS, impl=impl), oracle, [x])
    else:
        weight = seeded(shape[-1], dtype=dtype, seed=1)
        check_oracle(
            lambda x, w: rms_norm(x, w, EPS, offset, impl=impl),
            lambda x, w: oracle(x, w, offset),
            [x, weight],
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0, None])
def test_residual(impl, dtype, offset):
    for shape in [(1, 7), (37, 60), (2, 3, 64), (0, 16), (9,), (2, 4096)]:
        x, residual = seeded(*shape, dtype=dtype), seeded(*shape, dtype=dtype, seed=1)
        weight = None if offset is None else seeded(shape[-1], dtype=dtype, seed=2)
        given = [] if weight is None else [weight]
        shift = offset or 0.0

        def ours(x, r, w=None, shift=shift):
            return add_rms_norm(x, r, w, EPS, shift, impl=impl)

        def separate(x, r, w=None, shift=shift):
            total = x + r
            return rms_norm(total, w, EPS, shift, impl=impl), total

        def exact(x, r, w=None, shift=shift):
            return oracle(x + r, w, shift), x + r

        # The sum is rounded before it is normed: once more than the tolerance of one rounding allows for.
        tolerance = None if dtype.itemsize > 2 else {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
        check_oracle(ours, exact, [x, residual, *given], tolerance)
        (y, total), (dx, dr, *dw) = run(ours, [x, residual, *given])
        (z, other), (_, _, *expected) = run(separate, [x, residual, *given])
        assert torch.equal(total, other)
        assert torch.equal(y, z)
        assert torch.equal(dx, dr)
        assert all(map(torch.equal, dw, expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_residual_rows_strides_and_each_result_alone(impl):
    x, residual = (seeded(50, 2 * 60, dtype=torch.float32, seed=seed) for seed in (0, 1))
    weight = seeded(60, dtype=torch.float32, seed=2)
    halves = [x[:, 60:], residual[:, :60]]
    check_rows(lambda x, r: add_rms_norm(x, r, weight, EPS, impl=impl), halves)
    check_repeatable(lambda x, r, w: add_rms_norm(x, r, w, EPS, impl=impl), [*halves, weight])
    got, wanted = (add_rms_norm(*t, weight, EPS, impl=impl) for t in (halves, [h.contiguous() for h in halves]))
    assert all(map(torch.equal, got, wanted))
    assert got[0].is_contiguous()
    assert got[1].is_contiguous()
    for which in (0, 1):
        check_oracle(
            lambda x, r, i=which: add_rms_norm(x, r, None, EPS, impl=impl)[i],
            lambda x, r, i=which: (oracle(x + r), x + r)[i],
            halves,
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_one_element(impl):
    inputs = [seeded(5, 1), seeded(1, seed=1)]  # in float64: the gradient is all but zero, by cancellation
    check_oracle(lambda x, w: rms_norm(x, w, EPS, 1.0, impl=impl), lambda x, w: oracle(x, w, 1.0), inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [1, 60, 64, 513, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_do_not_depend_on_other_rows(impl, width, dtype):
    weight = seeded(width, dtype=dtype, seed=1)
    check_rows(lambda x: rms_norm(x, weight, EPS, 1.0, impl=impl), [seeded(70, width, dtype=dtype)])


def test_gradient_rows_do_not_depend_on_other_rows():
    weight = seeded(60, dtype=torch.float32, seed=1)
    op = torch.ops.toolkit.rms_norm_backward
    inputs = [seeded(50, 60, dtype=torch.float32, seed=seed) for seed in (2, 3)]
    check_rows(lambda g, x: op(g, x, weight, EPS, 0.0)[0], inputs)


@pytest.mark.parametrize("rows", [1, 16, 17, 1500])
def test_weight_gradient_is_the_same_on_any_number_of_threads(rows):
    inputs = [seeded(rows, 64, dtype=torch.float32), seeded(64, dtype=torch.float32, seed=1)]
    check_repeatable(lambda x, w: rms_norm(x, w, EPS), inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl):
    base, weight = seeded(3, 5, 40), seeded(32, seed=1)[::2]
    for x in (
        base[..., :16],
        base[:, 1:4, 8:24],
        base.transpose(0, 1)[..., 1:17],
        base[..., 1:33:2],
        base[:1, :1, :16],
    ):
        y, grads = run(lambda x, w: rms_norm(x, w, EPS, impl=impl), [x, weight])
        z, expected = run(lambda x, w: rms_norm(x, w, EPS, impl="reference"), [x.contiguous(), weight.contiguous()])
        assert y[0].is_contiguous()
        assert max(map(error, [*y, *grads], [*z, *expected])) < 1e-13


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_values(impl):
    x = torch.tensor([[0.0] * 5, [1e-20] * 5, [1e15, -1e15, 0.0, 1.0, 1e15], [1e-3, 0.0, 0.0, 0.0, 0.0]])
    assert error(rms_norm(x, None, EPS, impl=impl), oracle(x.double())) < 2e-7
    poisoned = x.clone()
    poisoned[1, 2] = torch.nan
    y = rms_norm(poisoned, None, EPS, impl=impl)
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


@pytest.mark.skipif(native.load() not in ("avx2", "avx512"), reason="holds for the kernels with fused multiply-add")
def test_float32_error_is_no_larger_than_eager_torch():
    x, weight = seeded(64, 4096, dtype=torch.float32), seeded(4096, dtype=torch.float32, seed=1)
    wanted = oracle(x.double(), weight.double())
    eager = torch.nn.functional.rms_norm(x, (4096,), weight, EPS)
    assert (rms_norm(x, weight, EPS) - wanted).square().mean() <= 1.05 * (eager - wanted).square().mean()


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_input_is_named(impl):
    with pytest.raises(ToolkitError, match=r"weight has shape \[3\]; .* needs \[4\]"):
        rms_norm(torch.ones(2, 4), torch.ones(3), EPS, impl=impl)
    with pytest.raises((RuntimeError, ValueError), match=r"dtype is .*; allowed are float32"):
        rms_norm(torch.ones(2, 4, dtype=torch.int64), None, EPS, impl=impl)
    for other in (torch.ones(2, 3), torch.ones(2, 4, dtype=torch.float64)):
        with pytest.raises(ToolkitError, match=r"residual has shape .* x needs \[2, 4\] and torch.float32 of it"):
            add_rms_norm(torch.ones(2, 4), other, None, EPS, impl=impl)


@pytest.mark.parametrize("weight", [None, seeded(8, dtype=torch.float32, seed=1).requires_grad_()])
def test_opcheck(weight):
    x = seeded(3, 8, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.toolkit.rms_norm.default, (x, weight, EPS, 1.0))
    detached = None if weight is None else weight.detach()
    torch.library.opcheck(torch.ops.toolkit.rms_norm_backward.default, (x.detach(), x.detach(), detached, EPS, 1.0))
    arguments = (x.detach(), x.detach(), x.detach(), detached, EPS, 1.0)
    torch.library.opcheck(torch.ops.toolkit.add_rms_norm_backward.default, arguments)
    residual = seeded(3, 8, dtype=torch.float32, seed=2).requires_grad_()
    torch.library.opcheck(torch.ops.toolkit.add_rms_norm.default, (x, residual, weight, EPS, 1.0))
