import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import (
    NATIVE,
    TRITON,
    impl_and,
    impl_and_dtype,
    impl_dtype_and,
    implementations,
    only_triton,
)
from tests.helpers.interpreter import far_apart
from tests.helpers.rowwise import check_oracle, check_repeatable, check_rows, error, run, seeded
from toolkit.errors import ToolkitError
from toolkit.ops import native
from toolkit.ops.rms_norm import add_rms_norm, rms_norm

EPS = 1e-6
SHAPES = [
    (1, 7), (3, 60), (37, 513), (2, 3, 64), (0, 16), (9,), (2, 4096), (67, 7), (1, 1), (5, 1), (3, 0), (2, 2050),
    (3, 9000),
]  # fmt: skip


def oracle(x: Tensor, weight: Tensor | None = None, offset: float = 0.0) -> Tensor:
    y = x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS)
    return y if weight is None else y * (offset + weight)


@impl_and_dtype()
@pytest.mark.parametrize("offset", [0.0, 1.0, None])
def test_values_and_gradients(impl, dtype, offset):
    for shape in SHAPES:
        if shape[-1] == 1 and dtype != torch.float64:
            continue  # the gradient is what cancellation leaves: see test_rows_of_one_element
        x = seeded(*shape, dtype=dtype)
        if offset is None:
            check_oracle(lambda x: rms_norm(x, None, EPS, impl=impl.option), oracle, [x], None, dtype)
        else:
            weight = seeded(shape[-1], dtype=dtype, seed=1)
            check_oracle(
                lambda x, w: rms_norm(x, w, EPS, offset, impl=impl.option),
                lambda x, w: oracle(x, w, offset),
                [x, weight],
                None,
                dtype,
            )


@impl_and_dtype()
@pytest.mark.parametrize("offset", [0.0, 1.0, None])
def test_residual(impl, dtype, offset):
    for shape in SHAPES:
        x, residual = seeded(*shape, dtype=dtype), seeded(*shape, dtype=dtype, seed=1)
        weight = None if offset is None else seeded(shape[-1], dtype=dtype, seed=2)
        given = [] if weight is None else [weight]
        shift = offset or 0.0

        def ours(x, r, w=None, shift=shift):
            return add_rms_norm(x, r, w, EPS, shift, impl=impl.option)

        def separate(x, r, w=None, shift=shift):
            total = x + r
            return rms_norm(total, w, EPS, shift, impl=impl.option), total

        def exact(x, r, w=None, shift=shift):
            return oracle(x + r, w, shift), x + r

        if shape[-1] > 1 or dtype == torch.float64:
            # The sum is rounded before it is normed: once more than the tolerance of one rounding allows for.
            tolerance = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}.get(dtype)
            check_oracle(ours, exact, [x, residual, *given], tolerance, dtype)
        (y, total), (dx, dr, *dw) = run(ours, [x, residual, *given])
        (z, other), (_, _, *expected) = run(separate, [x, residual, *given])
        assert torch.equal(total, other)
        assert torch.equal(y, z)
        assert torch.equal(dx, dr)
        assert all(map(torch.equal, dw, expected))


def test_residual_rows_strides_and_each_result_alone(impl):
    x, residual = (seeded(50, 2 * 60, dtype=torch.float32, seed=seed) for seed in (0, 1))
    weight = seeded(60, dtype=torch.float32, seed=2)
    halves = [x[:, 60:], residual[:, :60]]
    check_rows(lambda x, r: add_rms_norm(x, r, weight, EPS, impl=impl.option), halves)
    check_repeatable(lambda x, r, w: add_rms_norm(x, r, w, EPS, impl=impl.option), [*halves, weight])
    got, wanted = (add_rms_norm(*t, weight, EPS, impl=impl.option) for t in (halves, [h.contiguous() for h in halves]))
    assert all(map(torch.equal, got, wanted))
    assert got[0].is_contiguous()
    assert got[1].is_contiguous()
    for which in (0, 1):
        check_oracle(
            lambda x, r, i=which: add_rms_norm(x, r, None, EPS, impl=impl.option)[i],
            lambda x, r, i=which: (oracle(x + r), x + r)[i],
            halves,
        )


def test_rows_of_one_element(impl):
    """In float64 where there is one: the gradient is all but zero, by cancellation."""
    x, weight = seeded(5, 1, dtype=impl.dtypes[0]), seeded(1, dtype=impl.dtypes[0], seed=1)
    if impl.dtypes[0] == torch.float64:
        check_oracle(
            lambda x, w: rms_norm(x, w, EPS, 1.0, impl=impl.option), lambda x, w: oracle(x, w, 1.0), [x, weight]
        )
    else:
        assert error(rms_norm(x, weight, EPS, 1.0, impl=impl.option), oracle(x.double(), weight.double(), 1.0)) < 1e-6


@impl_dtype_and(
    "width", [1, 60, 64, 513, 700, 2048, 4500], [1, 513, 4500], [torch.float32, torch.float64, torch.bfloat16]
)
def test_rows_do_not_depend_on_other_rows(impl, width, dtype):
    weight = seeded(width, dtype=dtype, seed=1)
    x = seeded(19 if width > 2048 else 70, width, dtype=dtype)
    check_rows(lambda x: rms_norm(x, weight, EPS, 1.0, impl=impl.option), [x])


@implementations(NATIVE, TRITON)
@pytest.mark.parametrize("width", [1, 60, 700, 4500])
def test_gradient_rows_do_not_depend_on_other_rows(impl, width):
    weight = seeded(width, dtype=torch.float32, seed=1)
    op, with_sum = torch.ops.toolkit.rms_norm_backward, torch.ops.toolkit.add_rms_norm_backward
    inputs = [seeded(50 if width == 60 else 19, width, dtype=torch.float32, seed=seed) for seed in (2, 3, 4)]
    check_rows(lambda g, x: op(g, x, weight, EPS, 0.0)[0], inputs[:2])
    check_rows(lambda *t: with_sum(*t, weight, EPS, 0.0)[0], inputs)


@implementations(NATIVE, TRITON)
def test_the_gradient_of_the_sum_is_added_before_it_is_rounded_once(impl):
    grad, more, total = (seeded(37, 60, dtype=torch.float32, seed=seed) for seed in range(3))
    weight = seeded(60, dtype=torch.float32, seed=3)
    dx, dweight = torch.ops.toolkit.add_rms_norm_backward(grad, more, total, weight, EPS, 1.0)
    alone, same = torch.ops.toolkit.rms_norm_backward(grad, total, weight, EPS, 1.0)
    assert torch.equal(dweight, same)
    assert torch.equal(dx, alone + more)


SIZES = [(1, 64), (16, 64), (17, 64), (1500, 64), (70, 600), (40, 4300)]


@impl_and("rows, width", SIZES, [(17, 64), (70, 600)], (NATIVE, TRITON))
def test_weight_gradient_is_the_same_on_every_run_and_any_number_of_threads(impl, rows, width):
    rows = min(rows, 130) if impl is TRITON else rows  # 1500 are for threads
    inputs = [seeded(rows, width, dtype=torch.float32), seeded(width, dtype=torch.float32, seed=1)]
    check_repeatable(lambda x, w: rms_norm(x, w, EPS), inputs)
    check_oracle(lambda x, w: rms_norm(x, w, EPS), oracle, inputs, 3e-6)


def test_strided_inputs(impl):
    dtype = impl.dtypes[0]
    base, weight = seeded(3, 5, 40, dtype=dtype), seeded(32, dtype=dtype, seed=1)[::2]
    for x in (
        base[..., :16],
        base[:, 1:4, 8:24],
        base.transpose(0, 1)[..., 1:17],
        base[..., 1:33:2],
        base[:1, :1, :16],
    ):
        y, grads = run(lambda x, w: rms_norm(x, w, EPS, impl=impl.option), [x, weight])
        z, expected = run(lambda x, w: rms_norm(x, w, EPS, impl="reference"), [x.contiguous(), weight.contiguous()])
        assert y[0].is_contiguous()
        assert max(map(error, [*y, *grads], [*z, *expected])) < (1e-13 if dtype == torch.float64 else 1e-6)
        again, same = run(lambda x, w: rms_norm(x, w, EPS, impl=impl.option), [x.contiguous(), weight.contiguous()])
        if impl is TRITON:
            assert all(map(torch.equal, [*again, *same], [*y, *grads]))


@implementations(NATIVE, TRITON)
def test_strided_gradients(impl):
    x, weight = seeded(9, 48, dtype=torch.float16, scale=200.0), seeded(48, dtype=torch.float16, seed=1)
    grad = seeded(1, 1, dtype=torch.float16).expand(9, 48)
    for strided in (x, x.t().contiguous().t()):
        got, wanted = (
            torch.ops.toolkit.rms_norm_backward(g, v, weight, EPS, 0.0)
            for g, v in ((grad, strided), (grad.contiguous(), x))
        )
        assert all(map(torch.equal, got, wanted))


def test_extreme_values(impl):
    x = torch.tensor([[0.0] * 5, [1e-20] * 5, [1e15, -1e15, 0.0, 1.0, 1e15], [1e-3, 0.0, 0.0, 0.0, 0.0], [1.0] * 5])
    bound = 3e-7 if impl is TRITON else 2e-7
    assert error(rms_norm(x, None, EPS, impl=impl.option), oracle(x.double())) < bound
    poisoned = x.clone()
    poisoned[1, 2] = torch.nan
    y = rms_norm(poisoned, None, EPS, impl=impl.option)
    assert y[1].isnan().all()
    assert y[[0, 2, 3, 4]].isfinite().all()


@implementations(NATIVE, TRITON)
def test_offsets_past_two_to_the_31(impl):
    x, grad = (seeded(5, 40, dtype=torch.float16, seed=seed) for seed in (0, 1))
    far, weight = far_apart(x), seeded(40, dtype=torch.float16, seed=2)
    got, wanted = (add_rms_norm(x, t, weight, EPS) for t in (far, x))
    assert all(map(torch.equal, got, wanted))
    op = torch.ops.toolkit.add_rms_norm_backward
    got, wanted = (op(grad, t, t, weight, EPS, 0.0) for t in (far, x))
    assert all(map(torch.equal, got, wanted))


@pytest.mark.skipif(native.load() not in ("avx2", "avx512"), reason="holds for the kernels with fused multiply-add")
def test_float32_error_is_no_larger_than_eager_torch():
    x, weight = seeded(64, 4096, dtype=torch.float32), seeded(4096, dtype=torch.float32, seed=1)
    wanted = oracle(x.double(), weight.double())
    eager = torch.nn.functional.rms_norm(x, (4096,), weight, EPS)
    assert (rms_norm(x, weight, EPS) - wanted).square().mean() <= 1.05 * (eager - wanted).square().mean()


def test_bad_input_is_named(impl):
    with pytest.raises(ToolkitError, match=r"weight must have shape \[4\] .* got \[3\]"):
        rms_norm(torch.ones(2, 4), torch.ones(3), EPS, impl=impl.option)
    dtype_error = r"dtype must be float32, .*, got "
    with pytest.raises((RuntimeError, ValueError), match=dtype_error):
        rms_norm(torch.ones(2, 4, dtype=torch.int64), None, EPS, impl=impl.option)
    for other in (torch.ones(2, 3), torch.ones(2, 4, dtype=torch.float64)):
        with pytest.raises(ToolkitError, match=r"residual must have .* of x, \[2, 4\] and torch.float32, got"):
            add_rms_norm(torch.ones(2, 4), other, None, EPS, impl=impl.option)


@only_triton
def test_limits_of_the_triton_kernels_are_named(impl):
    from toolkit.ops.triton_rows import MAX_WIDTH

    with pytest.raises(ToolkitError, match=f"<= {MAX_WIDTH}"):
        rms_norm(torch.zeros(1, MAX_WIDTH + 1), None, EPS)
    with pytest.raises(ToolkitError, match="float64"):
        rms_norm(torch.zeros(1, 4, dtype=torch.float64), None, EPS)


@only_triton
def test_programs_walk_several_tiles_of_rows(impl):
    """At the sizes at which ``test_weight_gradient_...`` sums over rows."""
    from toolkit.ops.triton_rows import parts, whole_row

    for rows, width in ((70, 600), (40, 4300)):
        assert parts(rows, whole_row(min(width, 4096), 4), seeded(1))[1] > 1


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
