"""Triton token_logprob in Triton's interpreter, against fp64."""

import math

import pytest
import torch

from tests.helpers.interpreter import DTYPES, TOLERANCE, close, far_apart, gradients, noise, poisoned, rows_alone
from toolkit.errors import ToolkitError
from toolkit.ops.token_logprob import token_logprob
from toolkit.ops.token_logprob.triton import token_logprob_backward


def oracle(logits, targets):
    lse = torch.logsumexp(logits, -1)
    own = logits.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return torch.where(targets < 0, 0.0, own - lse), lse


def some_targets(*shape, vocabulary):
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(vocabulary, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 1 / 6, -100, targets)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_fp64(dtype):
    for shape in [(1, 1), (13, 60), (2, 3, 64), (0, 16), (5, 513), (3, 4096), (2, 9001), (7,)]:
        logits, targets = noise(*shape, dtype=dtype, scale=3.0), some_targets(*shape[:-1], vocabulary=shape[-1])
        grads = [noise(*shape[:-1], seed=1), noise(*shape[:-1], seed=2)]
        with poisoned():
            got = token_logprob(logits, targets, impl="triton")
            dlogits = token_logprob_backward(*grads, logits, targets, got[1])
        for one, wanted in zip(got, oracle(logits.double(), targets)):
            assert one.dtype == torch.float32
            close(one, wanted, 1e-6)
        assert dlogits.dtype == dtype
        (wanted,) = gradients(lambda x, y=targets: oracle(x, y), [logits], grads)
        close(dlogits, wanted, 2 * TOLERANCE[dtype])


def test_strides():
    base, targets = noise(4, 3, 40), some_targets(4, 3, vocabulary=20)
    for x, y in ((base[..., 3:23], targets), (base[..., ::2], targets), (base[:, :, :20].transpose(0, 1), targets.T)):
        got = token_logprob(x, y, impl="triton")
        assert all(map(torch.equal, got, token_logprob(x.contiguous(), y.contiguous(), impl="triton")))
        ones = torch.ones(1, 1).expand(y.shape)
        grads = [token_logprob_backward(ones, 0 * ones, t, y, got[1]) for t in (x, x.contiguous())]
        assert torch.equal(*grads)


@pytest.mark.parametrize("vocabulary", [1, 60, 5001])
def test_rows_do_not_depend_on_other_rows(vocabulary):
    logits, targets = noise(9, vocabulary, scale=4.0), some_targets(9, vocabulary=vocabulary)
    rows_alone(lambda x, y: token_logprob(x, y, impl="triton"), [logits, targets])
    _, lse = token_logprob(logits, targets, impl="triton")
    rows_alone(token_logprob_backward, [noise(9), noise(9, seed=1), logits, targets, lse])


@pytest.mark.parametrize("width", [11, 9000])
def test_extreme_values(width):
    x = noise(7, width)
    x[0], x[1], x[4] = 1e4, -1e4, -math.inf
    x[2, 3] = 1e4
    x[3, : width - 2] = -math.inf  # whole blocks without probability
    x[5, 6], x[6, 1] = math.inf, math.nan
    targets = torch.tensor([5, 5, 3, width - 1, 2, 6, 0])
    logprob, lse = token_logprob(x, targets, impl="triton")
    wanted = oracle(x[:4].double(), targets[:4])
    close(logprob[:4], wanted[0], 1e-6)
    close(lse[:4], wanted[1], 1e-6)
    assert logprob[4:].isnan().all()
    assert lse[4] == -math.inf
    assert lse[5:].isnan().all()
    grad = token_logprob_backward(torch.ones(7), torch.zeros(7), x, targets, lse)
    assert grad[:4].isfinite().all()
    assert not grad[3, : width - 2].any()


def test_ignored_and_impossible_targets():
    logits, targets = noise(4, 50), torch.tensor([4, -1, -100, 50])
    logprob, lse = token_logprob(logits, targets, impl="triton")
    assert logprob[1:3].tolist() == [0.0, 0.0]
    assert logprob[3].isnan()
    assert lse.isfinite().all()
    grad = token_logprob_backward(torch.ones(4), torch.zeros(4), logits, targets, lse)
    assert grad[0].any()
    assert not grad[1:3].any()


def test_offsets_past_two_to_the_31():
    logits, targets = noise(4, 60, dtype=torch.float16), torch.tensor([3, 59, -1, 0])
    far = far_apart(logits)
    got, wanted = (token_logprob(x, targets, impl="triton") for x in (far, logits))
    assert all(map(torch.equal, got, wanted))
    grads = [token_logprob_backward(torch.ones(4), torch.ones(4), x, targets, got[1]) for x in (far, logits)]
    assert torch.equal(*grads)


def test_bad_input_is_one_sentence():
    with pytest.raises(ToolkitError, match=r"token_logprob got dtype torch\.float64"):
        token_logprob(torch.zeros(1, 4, dtype=torch.float64), torch.tensor([1]), impl="triton")
