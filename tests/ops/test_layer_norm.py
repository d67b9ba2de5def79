import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm as eager

from tests.helpers.rowwise import DTYPES, IMPLS, check_oracle, check_repeatable, check_rows, error, run, seeded
from toolkit.errors import ToolkitError
from toolkit.ops import native
from toolkit.ops.layer_norm import layer_norm

EPS = 1e-5


def oracle(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    y = centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + EPS)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (3, 60), (37, 513), (2, 3, 64), (0, 16), (9,), (2, 4096)])
@pytest.mark.parametrize("parameters", ["", "w", "b", "wb"])
def test_values_and_gradients(impl, dtype, shape, parameters):
    given = [seeded(shape[-1], dtype=dtype, seed=1 + i) for i in range(len(parameters))]

    def split(values: tuple[Tensor, ...]) -> list[Tensor | None]:
        found = dict(zip(parameters, values))
        return [found.get("w"), found.get("b")]

    x = seeded(*shape, dtype=dtype) + 0.5
    check_oracle(
        lambda x, *p: layer_norm(x, *split(p), EPS, impl=impl),
        lambda x, *p: oracle(x, *split(p)),
        [x, *given],
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_one_element(impl):
    inputs = [seeded(5, 1), seeded(1, seed=1), seeded(1, seed=2)]
    check_oracle(lambda x, w, b: layer_norm(x, w, b, EPS, impl=impl), oracle, inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [1, 60, 64, 513, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_do_not_depend_on_other_rows(impl, width, dtype):
    weight, bias = seeded(width, dtype=dtype, seed=1), seeded(width, dtype=dtype, seed=2)
    check_rows(lambda x: layer_norm(x, weight, bias, EPS, impl=impl), [seeded(70, width, dtype=dtype)])


def test_gradient_rows_do_not_depend_on_other_rows():
    weight = seeded(60, dtype=torch.float32, seed=1)
    op = torch.ops.toolkit.layer_norm_backward
    inputs = [seeded(50, 60, dtype=torch.float32, seed=seed) for seed in (2, 3)]
    check_rows(lambda g, x: op(g, x, weight, None, EPS)[0], inputs)


@pytest.mark.parametrize("rows", [1, 16, 17, 1500])
def test_parameter_gradients_are_the_same_on_any_number_of_threads(rows):
    inputs = [seeded(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate([(rows, 64), (64,), (64,)])]
    check_repeatable(lambda x, w, b: layer_norm(x, w, b, EPS), inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl):
    base, weight = seeded(3, 5, 40), seeded(32, seed=1)[::2]
    for x in (base[..., :16], base[:, 1:4, 8:24], base.transpose(0, 1)[..., 1:17], base[..., 1:33:2]):
        y, grads = run(lambda x, w: layer_norm(x, w, None, EPS, impl=impl), [x, weight])
        z, expected = run(lambda x, w: eager(x, (16,), w, None, EPS), [x.contiguous(), weight.contiguous()])
        assert y[0].is_contiguous()
        assert max(map(error, [*y, *grads], [*z, *expected])) < 1e-13


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_values(impl):
    x = torch.tensor([[0.0] * 5, [7.0] * 5, [1e15, -1e15, 0.0, 1.0, 1e15], [1e4 + 1, 1e4, 1e4, 1e4, 1e4]])
    assert error(layer_norm(x, None, None, EPS, impl=impl), oracle(x.double())) < 1e-3
    assert error(layer_norm(x[:3], None, None, EPS, impl=impl), oracle(x[:3].double())) < 2e-7
    poisoned = x.clone()
    poisoned[1, 2] = torch.nan
    y = layer_norm(poisoned, None, None, EPS, impl=impl)
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


@pytest.mark.skipif(native.load() not in ("avx2", "avx512"), reason="holds for the kernels with fused multiply-add")
def test_float32_error_is_no_larger_than_eager_torch():
    x, weight, bias = (seeded(*s, dtype=torch.float32, seed=i) for i, s in enumerate([(64, 4096), (4096,), (4096,)]))
    x = x + 3
    wanted = oracle(x.double(), weight.double(), bias.double())
    theirs = eager(x, (4096,), weight, bias, EPS)
    assert (layer_norm(x, weight, bias, EPS) - wanted).square().mean() <= 1.05 * (theirs - wanted).square().mean()


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_input_is_named(impl):
    with pytest.raises(ToolkitError, match=r"bias has shape \[3\]; .* needs \[4\]"):
        layer_norm(torch.ones(2, 4), None, torch.ones(3), EPS, impl=impl)
    with pytest.raises((RuntimeError, ValueError), match=r"dtype is .*; allowed are float32"):
        layer_norm(torch.ones(2, 4, dtype=torch.int64), None, None, EPS, impl=impl)


@pytest.mark.parametrize("affine", [False, True])
def test_opcheck(affine):
    x = seeded(3, 8, dtype=torch.float32)
    p = [seeded(8, dtype=torch.float32, seed=i) if affine else None for i in (1, 2)]
    torch.library.opcheck(torch.ops.toolkit.layer_norm_backward.default, (x, x, *p, EPS))
    leaves = [None if q is None else q.requires_grad_() for q in p]
    torch.library.opcheck(torch.ops.toolkit.layer_norm.default, (x.requires_grad_(), *leaves, EPS))
