import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm as eager

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
from toolkit.ops.layer_norm import layer_norm

EPS = 1e-5
SHAPES = [(1, 7), (3, 60), (37, 513), (2, 3, 64), (0, 16), (9,), (2, 4096), (67, 7), (3, 0), (2, 2050), (3, 9000)]


def oracle(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    y = centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + EPS)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@impl_and_dtype()
@pytest.mark.parametrize("parameters", ["", "w", "b", "wb"])
def test_values_and_gradients(impl, dtype, parameters):
    def split(values: tuple[Tensor, ...]) -> list[Tensor | None]:
        found = dict(zip(parameters, values))
        return [found.get("w"), found.get("b")]

    for shape in SHAPES:
        given = [seeded(shape[-1], dtype=dtype, seed=1 + i) for i in range(len(parameters))]
        check_oracle(
            lambda x, *p: layer_norm(x, *split(p), EPS, impl=impl.option),
            lambda x, *p: oracle(x, *split(p)),
            [seeded(*shape, dtype=dtype) + 0.5, *given],
        )


def test_rows_of_one_element(impl):
    """A bias is all that is left of them, and no other gradient."""
    dtype = impl.dtypes[0]
    x, weight, bias = seeded(5, 1, dtype=dtype), seeded(1, dtype=dtype, seed=1), seeded(1, dtype=dtype, seed=2)
    check_oracle(lambda x, w, b: layer_norm(x, w, b, EPS, impl=impl.option), oracle, [x, weight, bias])
    (y,), (dx, dweight, _) = run(lambda x, w, b: layer_norm(x, w, b, EPS, impl=impl.option), [x, weight, bias])
    assert torch.equal(y, bias.expand(5, 1))
    assert not dx.any()
    assert not dweight.any()


@impl_dtype_and(
    "width", [1, 60, 64, 513, 700, 2048, 4500], [1, 513, 4500], [torch.float32, torch.float64, torch.bfloat16]
)
def test_rows_do_not_depend_on_other_rows(impl, width, dtype):
    weight, bias = seeded(width, dtype=dtype, seed=1), seeded(width, dtype=dtype, seed=2)
    check_rows(
        lambda x: layer_norm(x, weight, bias, EPS, impl=impl.option),
        [seeded(19 if width > 2048 else 70, width, dtype=dtype)],
    )


@implementations(NATIVE, TRITON)
@pytest.mark.parametrize("width", [1, 60, 700, 4500])
def test_gradient_rows_do_not_depend_on_other_rows(impl, width):
    weight = seeded(width, dtype=torch.float32, seed=1)
    op = torch.ops.toolkit.layer_norm_backward
    inputs = [seeded(50 if width == 60 else 19, width, dtype=torch.float32, seed=seed) for seed in (2, 3)]
    check_rows(lambda g, x: op(g, x, weight, None, EPS)[0], inputs)


SIZES = [(1, 64), (16, 64), (17, 64), (1500, 64), (70, 600), (40, 4300)]


@impl_and("rows, width", SIZES, [(17, 64), (70, 600)], (NATIVE, TRITON))
def test_parameter_gradients_are_the_same_on_every_run_and_any_number_of_threads(impl, rows, width):
    rows = min(rows, 130) if impl is TRITON else rows  # 1500 are for threads
    shapes = [(rows, width), (width,), (width,)]
    inputs = [seeded(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(shapes)]
    check_repeatable(lambda x, w, b: layer_norm(x, w, b, EPS), inputs)
    check_oracle(lambda x, w, b: layer_norm(x, w, b, EPS), oracle, inputs, 3e-6)


@only_triton
def test_programs_walk_several_tiles_of_rows(impl):
    """At the sizes at which ``test_parameter_gradients_...`` sums over rows."""
    from toolkit.ops.triton_rows import parts, whole_row

    for rows, width in ((70, 600), (40, 4300)):
        assert parts(rows, whole_row(min(width, 4096), 4), seeded(1))[1] > 1


def test_strided_inputs(impl):
    dtype = impl.dtypes[0]
    base, weight = seeded(3, 5, 40, dtype=dtype), seeded(32, dtype=dtype, seed=1)[::2]
    for x in (base[..., :16], base[:, 1:4, 8:24], base.transpose(0, 1)[..., 1:17], base[..., 1:33:2]):
        y, grads = run(lambda x, w: layer_norm(x, w, None, EPS, impl=impl.option), [x, weight])
        z, expected = run(lambda x, w: eager(x, (16,), w, None, EPS), [x.contiguous(), weight.contiguous()])
        assert y[0].is_contiguous()
        assert max(map(error, [*y, *grads], [*z, *expected])) < (1e-13 if dtype == torch.float64 else 2e-6)


@implementations(NATIVE, TRITON)
def test_strides_do_not_matter(impl):
    x, weight = seeded(3, 5, 40, dtype=torch.float16), seeded(32, dtype=torch.float16, seed=1)[::2]
    for view in (x[..., :16], x[:, 1:4, 8:24], x.transpose(0, 1)[..., 1:17], x[..., 1:33:2]):
        same = view.contiguous()
        assert torch.equal(layer_norm(view, weight, None, EPS), layer_norm(same, weight, None, EPS))
        grad = seeded(1, 1, 1, dtype=torch.float16).expand(same.shape)
        op = torch.ops.toolkit.layer_norm_backward
        got, wanted = op(grad, view, weight, weight, EPS), op(grad.contiguous(), same, weight, weight, EPS)
        assert all(map(torch.equal, got, wanted))


@implementations(NATIVE, TRITON)
def test_offsets_past_two_to_the_31(impl):
    x, grad = (seeded(5, 40, dtype=torch.float16, seed=seed) for seed in (0, 1))
    far, weight = far_apart(x), seeded(40, dtype=torch.float16, seed=2)
    assert torch.equal(layer_norm(far, weight, None, EPS), layer_norm(x, weight, None, EPS))
    op = torch.ops.toolkit.layer_norm_backward
    got, wanted = (op(grad, t, weight, weight, EPS) for t in (far, x))
    assert all(map(torch.equal, got, wanted))


def test_extreme_values(impl):
    x = torch.tensor([[0.0] * 5, [7.0] * 5, [1e15, -1e15, 0.0, 1.0, 1e15], [1e4 + 1, 1e4, 1e4, 1e4, 1e4]])
    assert error(layer_norm(x, None, None, EPS, impl=impl.option), oracle(x.double())) < 1e-3
    assert error(layer_norm(x[:3], None, None, EPS, impl=impl.option), oracle(x[:3].double())) < (
        3e-7 if impl is TRITON else 2e-7
    )
    poisoned = x.clone()
    poisoned[1, 2] = torch.nan
    y = layer_norm(poisoned, None, None, EPS, impl=impl.option)
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


@pytest.mark.skipif(native.load() not in ("avx2", "avx512"), reason="holds for the kernels with fused multiply-add")
def test_float32_error_is_no_larger_than_eager_torch():
    x, weight, bias = (seeded(*s, dtype=torch.float32, seed=i) for i, s in enumerate([(64, 4096), (4096,), (4096,)]))
    x = x + 3
    wanted = oracle(x.double(), weight.double(), bias.double())
    theirs = eager(x, (4096,), weight, bias, EPS)
    assert (layer_norm(x, weight, bias, EPS) - wanted).square().mean() <= 1.05 * (theirs - wanted).square().mean()


def test_bad_input_is_named(impl):
    with pytest.raises(ToolkitError, match=r"bias must have shape \[4\] .* got \[3\]"):
        layer_norm(torch.ones(2, 4), None, torch.ones(3), EPS, impl=impl.option)
    dtype_error = r"dtype must be float32, .*, got "
    with pytest.raises((RuntimeError, ValueError), match=dtype_error):
        layer_norm(torch.ones(2, 4, dtype=torch.int64), None, None, EPS, impl=impl.option)


@only_triton
def test_limits_of_the_triton_kernels_are_named(impl):
    from toolkit.ops.triton_rows import MAX_WIDTH

    with pytest.raises(ToolkitError, match=f"<= {MAX_WIDTH}"):
        layer_norm(torch.zeros(1, MAX_WIDTH + 1), None, None, EPS)
    with pytest.raises(ToolkitError, match="float64"):
        layer_norm(torch.zeros(1, 4, dtype=torch.float64), None, None, EPS)


@pytest.mark.parametrize("affine", [False, True])
def test_opcheck(affine):
    x = seeded(3, 8, dtype=torch.float32)
    p = [seeded(8, dtype=torch.float32, seed=i) if affine else None for i in (1, 2)]
    torch.library.opcheck(torch.ops.toolkit.layer_norm_backward.default, (x, x, *p, EPS))
    leaves = [None if q is None else q.requires_grad_() for q in p]
    torch.library.opcheck(torch.ops.toolkit.layer_norm.default, (x.requires_grad_(), *leaves, EPS))
