import math

import pytest
import torch
from torch import Tensor

from tests.helpers import rowwise
from tests.helpers.implementations import NATIVE, TRITON, impl_and_dtype, implementations, only_triton
from tests.helpers.interpreter import far_apart
from tests.helpers.rowwise import check_oracle, check_repeatable, check_rows, error, run, seeded
from toolkit.errors import ToolkitError
from toolkit.ops.token_logprob import token_logprob


def oracle(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(logits, -1)
    own = logits.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return torch.where(targets < 0, 0.0, own - lse), lse


def some_targets(*shape: int, vocabulary: int, seed: int = 3) -> Tensor:
    """Targets over the vocabulary, about one in six of them -100."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocabulary, shape, generator=generator, device="cpu")
    ignored = torch.rand(shape, generator=generator, device="cpu") < 1 / 6
    return torch.where(ignored, -100, targets).to(torch.get_default_device())


@impl_and_dtype()
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (3, 7), (13, 60), (5, 513), (2, 2048), (3, 2049), (2, 3, 64), (0, 16), (4, 10_000), (7,), (2, 9001)],
)
def test_values_and_gradients(impl, dtype, shape):
    logits, targets = seeded(*shape, dtype=dtype, scale=3.0), some_targets(*shape[:-1], vocabulary=shape[-1])
    # The results are float32 for 16-bit logits, so only the gradient has their precision.
    with_targets = [logits]
    check_oracle(lambda x: token_logprob(x, targets, impl=impl.option), lambda x: oracle(x, targets), with_targets)
    if dtype.itemsize == 2:
        results = token_logprob(logits, targets, impl=impl.option)
        assert all(r.dtype == torch.float32 for r in results)
        assert max(map(error, results, oracle(logits.double(), targets))) < rowwise.BOUNDS[torch.float32][0]


def test_each_result_alone_passes_its_gradient(impl):
    logits, targets = seeded(5, 40, dtype=impl.dtypes[0]), some_targets(5, vocabulary=40)
    for which in (0, 1):
        check_oracle(
            lambda x, i=which: token_logprob(x, targets, impl=impl.option)[i],
            lambda x, i=which: oracle(x, targets)[i],
            [logits],
        )


def test_ignored_rows_have_zero_logprob_and_gradient(impl):
    logits = seeded(3, 50, dtype=torch.float32).requires_grad_()
    logprob, _ = token_logprob(logits, torch.tensor([4, -100, -100]), impl=impl.option)
    (grad,) = torch.autograd.grad(logprob.sum(), logits)
    assert logprob[1:].tolist() == [0.0, 0.0]
    assert not grad[1:].any()
    assert grad[0].any()


@impl_and_dtype([torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [1, 60, 2048, 5001, 40_000])
def test_rows_do_not_depend_on_other_rows(impl, vocabulary, dtype):
    logits = seeded(23 if impl is not TRITON else 9, vocabulary, dtype=dtype, scale=4.0)
    check_rows(
        lambda x, y: token_logprob(x, y, impl=impl.option), [logits, some_targets(len(logits), vocabulary=vocabulary)]
    )


@implementations(NATIVE, TRITON)
@pytest.mark.parametrize("vocabulary", [1, 60, 5001])
def test_gradients_do_not_depend_on_other_rows_nor_threads(impl, vocabulary):
    rows = 9 if impl is TRITON else 23
    logits, targets = (
        seeded(rows, vocabulary, dtype=torch.float32, scale=4.0),
        some_targets(rows, vocabulary=vocabulary),
    )
    check_repeatable(lambda x: token_logprob(x, targets), [logits])
    _, lse = token_logprob(logits, targets)
    inputs = [seeded(rows, dtype=torch.float32), seeded(rows, dtype=torch.float32, seed=1), logits, targets, lse]
    check_rows(torch.ops.toolkit.token_logprob_backward, inputs)


def test_strided_logits(impl):
    dtype = impl.dtypes[0]
    base, targets = seeded(4, 3, 40, dtype=dtype), some_targets(4, 3, vocabulary=20)
    for x, y in (
        (base[..., 3:23], targets),
        (base[..., ::2], targets),
        (base[:, :, :20].transpose(0, 1), targets.T),
    ):
        results, grads = run(lambda x, y: token_logprob(x, y, impl=impl.option), [x, y])
        wanted, expected = run(lambda x, y: token_logprob(x, y), [x.contiguous(), y.contiguous()])
        assert max(map(error, [*results, *grads], [*wanted, *expected])) < (1e-13 if dtype == torch.float64 else 1e-6)
        if impl is TRITON:
            assert all(map(torch.equal, [*results, *grads], [*wanted, *expected]))


@implementations(NATIVE, TRITON)
def test_offsets_past_two_to_the_31(impl):
    logits, targets = seeded(4, 60, dtype=torch.float16), torch.tensor([3, 59, -100, 0])
    far, one = far_apart(logits), torch.ones(4)
    got, wanted = (token_logprob(x, targets) for x in (far, logits))
    assert all(map(torch.equal, got, wanted))
    backward = torch.ops.toolkit.token_logprob_backward
    assert torch.equal(*(backward(one, one, x, targets, got[1]) for x in (far, logits)))


@only_triton
def test_impossible_targets_are_nan(impl):
    logits, targets = seeded(4, 50, dtype=torch.float32), torch.tensor([4, -1, -100, 50])
    logprob, lse = torch.ops.toolkit.token_logprob(logits, targets)  # on a GPU no target is read back
    assert logprob[1:3].tolist() == [0.0, 0.0]
    assert logprob[3].isnan()
    assert lse.isfinite().all()
    alone = torch.ops.toolkit.token_logprob_backward(torch.ones(4), torch.zeros(4), logits, targets, lse)
    assert alone[0].any()
    assert not alone[1:3].any()
    with pytest.raises(ToolkitError, match=r"kernels of token_logprob, got torch\.float64"):
        token_logprob(torch.zeros(1, 4, dtype=torch.float64), torch.tensor([1]))


@pytest.mark.parametrize("width", [11, 5000, 9000])
def test_extreme_values(impl, width):
    x = seeded(7, width, dtype=torch.float32)
    x[0] = 1e4
    x[1] = -1e4
    x[2, 3] = 1e4
    x[3, : width - 2] = -math.inf  # whole blocks without probability
    x[4] = -math.inf
    x[5, 6] = math.inf
    x[6, 1] = math.nan
    targets = torch.tensor([5, 5, 3, width - 1, 2, 6, 0])
    logprob, lse = token_logprob(x, targets, impl=impl.option)
    wanted = oracle(x[:4].double(), targets[:4])
    assert error(logprob[:4], wanted[0]) < 1e-6
    assert error(lse[:4], wanted[1]) < 1e-6
    assert logprob[4:].isnan().all()
    assert lse[4] == -math.inf
    assert lse[5:].isnan().all()
    leaf = x[:4].clone().requires_grad_()
    (grad,) = torch.autograd.grad(token_logprob(leaf, targets[:4], impl=impl.option)[0].sum(), leaf)
    assert grad.isfinite().all()
    assert not grad[3, : width - 2].any()


def test_float32_error_is_no_larger_than_eager_torch():
    logits, targets = seeded(200, 8192, dtype=torch.float32, scale=3.0), some_targets(200, vocabulary=8192)

    def errors(f) -> tuple[float, float]:
        ours, (grad,) = run(lambda x: f(x, targets), [logits])
        wanted, (expected,) = run(lambda x: oracle(x, targets)[0], [logits.double()])
        kept = targets >= 0
        weight = (seeded(200, seed=7) / seeded(200, dtype=torch.float32, seed=7).double())[kept, None]
        value = (ours[0] - wanted[0])[kept].square().mean()
        return float(value), float((grad[kept] * weight - expected[kept]).square().mean())

    eager = errors(lambda x, y: -torch.nn.functional.cross_entropy(x, y, reduction="none"))
    ours = errors(lambda x, y: token_logprob(x, y)[0])
    assert ours[0] <= 1.05 * eager[0]
    assert ours[1] <= 1.05 * eager[1]


def test_bad_input_is_named(impl):
    x = torch.ones(2, 4)
    for wrong in (4, -1, -200) if x.is_cpu else ():
        with pytest.raises(IndexError, match=rf"targets must be -100 or a token id from 0 to 3, got {wrong}\."):
            token_logprob(x, torch.tensor([1, wrong]), impl=impl.option)
    with pytest.raises(ToolkitError, match=r"targets and logits must have shapes .* got \[1\] and \[2, 4\]"):
        token_logprob(x, torch.tensor([1]), impl=impl.option)


def test_opcheck():
    logits, targets = seeded(3, 8, dtype=torch.float32), torch.tensor([1, -100, 7])
    ops = torch.ops.toolkit
    _, lse = token_logprob(logits, targets)
    torch.library.opcheck(ops.token_logprob_backward.default, (lse, lse, logits, targets, lse))
    torch.library.opcheck(ops.token_logprob.default, (logits.requires_grad_(), targets))
