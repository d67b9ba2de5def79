"""Elements past 2^31: rows further apart than 32 bits can count, in memory that is never touched in between."""

import pytest
import torch
from torch import Tensor

from toolkit.ops.activation import activation
from toolkit.ops.attention import attention
from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.layer_norm import layer_norm
from toolkit.ops.linear import linear
from toolkit.ops.linear_logprob import linear_logprob
from toolkit.ops.rms_norm import rms_norm
from toolkit.ops.rotary import rotary
from toolkit.ops.state_write import state_write
from toolkit.ops.token_logprob import token_logprob

FAR = 2**31 + 64  # elements between rows
WIDTH = 48


@pytest.fixture(scope="module")
def far() -> Tensor:
    """[2, 48] float16, rows FAR apart; 4 GiB of address space, two pages of memory."""
    x = torch.empty(FAR + WIDTH, dtype=torch.float16).as_strided((2, WIDTH), (FAR, 1))
    x.copy_(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0)))
    return x


NEAR = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1)).half()
TABLE = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH).half()
OPS = {
    "rms_norm": lambda x: rms_norm(x, NEAR[0], 1e-6),
    "layer_norm": lambda x: layer_norm(x, NEAR[0], NEAR[1], 1e-6),
    "activation": lambda x: activation(x, "silu"),
    "gated_activation, gate": lambda x: gated_activation(x, NEAR, "gelu"),
    "gated_activation, up": lambda x: gated_activation(NEAR, x, "gelu"),
    "rotary": lambda x: rotary(x[:, None], TABLE, TABLE),
    "token_logprob": lambda x: token_logprob(x, torch.tensor([1, 40]))[0],
    "linear, x": lambda x: linear(x, NEAR),
    "linear, weight": lambda x: linear(NEAR, x),
    "linear_logprob, hidden": lambda x: linear_logprob(x, NEAR, torch.tensor([0, 1])).logprob,
    "linear_logprob, weight": lambda x: linear_logprob(NEAR, x, torch.tensor([0, 1])).logprob,
    "attention, q": lambda x: attend(x, NEAR, NEAR),
    "attention, k": lambda x: attend(NEAR, x, NEAR),
    "attention, v": lambda x: attend(NEAR, NEAR, x),
}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    offsets = torch.tensor([0, 2])
    q, k, v = (x[:, None] for x in (q, k, v))
    return attention(q, k, v, offsets, offsets[:1], offsets[1:], None, 1, 0.2, 0, 0.0)[0]


@pytest.mark.parametrize("name", OPS)
def test_forward_and_gradient(name, far):
    results = []
    for x in (far, far.clone(memory_format=torch.contiguous_format)):
        leaf = x.detach().requires_grad_()
        assert leaf.stride() == x.stride()
        y = OPS[name](leaf)
        results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), leaf)))
    for got, wanted in zip(*results, strict=True):
        assert wanted.isfinite().all()
        assert torch.equal(got, wanted)


def test_state_written_far_away():
    slots = FAR // 16 + 1
    cache = torch.empty(slots, 1, 16)
    new = torch.arange(32.0).view(2, 1, 16)
    state_write(cache, new, torch.tensor([0, slots - 1]))
    assert torch.equal(cache[[0, slots - 1]], new)
    offsets = torch.tensor([0, 2])
    for paged in (cache.as_strided((2, 1, 16), ((slots - 1) * 16, 16, 1)), new):
        out, _ = attention(new, paged, paged, offsets, offsets[:1], offsets[1:], None, 1, 0.1, 0, 0.0)
        assert out.isfinite().all()
    tables = torch.tensor([[0, slots - 1]])
    out, _ = attention(new, cache, cache, offsets, offsets[:1], offsets[1:], tables, 1, 0.1, 0, 0.0)
    wanted, _ = attention(new, new, new, offsets, offsets[:1], offsets[1:], None, 1, 0.1, 0, 0.0)
    assert torch.equal(out, wanted)
