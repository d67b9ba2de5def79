"""What an op costs follows what it is asked for, not the capacity of what it is handed."""

import pytest
import torch

from tests.helpers.allocations import allocated_bytes
from toolkit.ops.attention import attention, attention_backward
from toolkit.ops.causal_conv import causal_conv_paged
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.experts import experts
from toolkit.ops.grouped_linear import grouped_linear
from toolkit.ops.linear_recurrence import linear_recurrence_paged
from toolkit.ops.lora_linear import lora_add
from toolkit.ops.registry import has_native
from toolkit.ops.state_write import state_write

needs_native = pytest.mark.skipif(not has_native("attention"), reason="the native CPU library is not built")
IMPLS = ["reference", pytest.param("cpu", marks=needs_native)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FEW, MANY, BLOCK = 10, 10_000, 16


def filled(capacity, *shape, dtype, seed=0):
    """[capacity, ...] whose first ``FEW`` entries do not depend on the capacity; NaN after them."""
    made = torch.full((capacity, *shape), torch.nan, dtype=dtype)
    made[:FEW] = torch.randn(FEW, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return made


def numbers(*shape, dtype, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend(capacity, dtype, impl):
    keys, values = (filled(capacity, BLOCK * 2, 24, dtype=dtype, seed=s).view(-1, 2, 24) for s in (1, 2))
    tables, lengths = torch.tensor([[7, 2, 5], [1, 9, 0]]), torch.tensor([40, 21])
    query = numbers(6, 4, 24, dtype=dtype), torch.tensor([0, 1, 6])
    return lambda: attention(query[0], keys, values, query[1], lengths, lengths, tables, BLOCK, impl=impl)


def attend_to_latents(capacity, dtype, impl):
    keys = filled(capacity, BLOCK, 40, dtype=dtype).view(-1, 1, 40)
    tables, lengths, starts = torch.tensor([[7, 2, 5]]), torch.tensor([40]), torch.tensor([0, 1])
    q = numbers(1, 4, 40, dtype=dtype)
    return lambda: attention(q, keys, keys[..., :32], starts, lengths, lengths, tables, BLOCK, impl=impl)


def write_state(capacity, dtype, impl):
    pool, rows = filled(capacity, 2, 24, dtype=dtype), numbers(3, 2, 24, dtype=dtype)

    def write():
        state_write(pool, rows, torch.tensor([4, -1, 9]), impl=impl)
        return pool[:FEW].clone()

    return write


SNAPSHOTS = [torch.tensor(x) for x in ([0, 1, 5], [3, -1], [0, 4], [8, 9])]  # offsets, loads, rows and blocks of stores


def convolve(capacity, dtype, impl):
    tails = filled(capacity, 3, 20, dtype=dtype)
    x, weight = numbers(5, 20, dtype=dtype), numbers(20, 4, dtype=dtype)
    return lambda: causal_conv_paged(x, weight, None, *SNAPSHOTS, tails, None, impl=impl)


def recur(capacity, dtype, impl):
    states = filled(capacity, 2, 8, 12, dtype=torch.float32)
    q, k, v = (numbers(5, 2, width, dtype=dtype, seed=width) for width in (8, 8, 12))
    g, beta = -numbers(5, 2, dtype=dtype).abs(), numbers(5, 2, dtype=dtype).sigmoid()
    return lambda: linear_recurrence_paged(q, k * 0.1, v, g, beta, *SNAPSHOTS, states, 1.0, True, impl=impl)


def adapt(capacity, dtype, impl):
    """Slices of one adapter, and adapters."""
    a, b = filled(capacity, 4, 20, dtype=dtype), filled(capacity, 12, 4, dtype=dtype)
    x, base, ids = numbers(5, 20, dtype=dtype), numbers(5, 12, dtype=dtype), torch.tensor([2, -1, 9, 2, 0])
    own, zeros = torch.tensor([-1, 0, -1, 0, -1]), torch.zeros(5, dtype=torch.int64)
    first, second = [a, *a[:FEW]], [b, *b[:FEW]]
    chosen = torch.where(own < 0, zeros, ids + 1)
    scaling = [0.5] * len(first)
    return lambda: lora_add(base, x, first, second, scaling, chosen, groups=ids.clamp_min(0) * (own < 0), impl=impl)


def route_to(capacity):
    return dispatch_plan(torch.tensor([[1, 8], [8, 3]]), capacity)


def multiply_by_experts(capacity, dtype, impl):
    weight, bias = filled(capacity, 12, 20, dtype=dtype), filled(capacity, 12, dtype=dtype)
    x, plan = numbers(2, 20, dtype=dtype), route_to(capacity)
    return lambda: grouped_linear(x, weight, bias, plan, gather=True, impl=impl)


def mix_experts(capacity, dtype, impl):
    up, up_bias = filled(capacity, 24, 20, dtype=dtype), filled(capacity, 24, dtype=dtype)
    down, down_bias = filled(capacity, 20, 12, dtype=dtype), filled(capacity, 20, dtype=dtype)
    x, weights, plan = numbers(2, 20, dtype=dtype), numbers(2, 2, dtype=dtype), route_to(capacity)
    return lambda: experts(x, weights, up, down, plan, "silu", up_bias=up_bias, down_bias=down_bias, impl=impl)


CASES = [
    attend, attend_to_latents, write_state, convolve, recur, adapt, multiply_by_experts, mix_experts,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("impl", IMPLS)
def test_no_temporary_follows_the_capacity(impl, case, dtype):
    """Blocks of a pool, adapters, experts: with a thousand times as many, the same bytes are allocated and computed."""
    few, many = (allocated_bytes(case(capacity, dtype, impl)) for capacity in (FEW, MANY))
    assert many[0] == few[0]
    pairs = zip(*(result if isinstance(result, tuple) else (result,) for result in (few[1], many[1])), strict=True)
    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in pairs)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (72, 40), (20, 12)], ids=str)
def test_narrow_tensors_give_the_bits_of_their_float32_values(widths, dtype):
    """16-bit keys, in place and in tiles, forward and backward: as if everything were converted first, rounded once."""
    starts = torch.tensor([0, 67, 68, 101])
    plan = starts, starts[:-1].contiguous(), starts.diff()
    shapes = [(6, widths[0]), (2, widths[0]), (2, widths[1])]
    narrow = [numbers(101, *shape, dtype=dtype, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    upcast = [x.detach().float().requires_grad_() for x in narrow]
    out, lse = attention(*narrow, *plan, window=50, impl="cpu")
    expected, expected_lse = attention(*upcast, *plan, window=50, impl="cpu")
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(lse, expected_lse)
    grad = numbers(*out.shape, dtype=dtype, seed=9)
    # The rounded output is what the backward reads, so it is compared from there on.
    arguments = (*plan, widths[0] ** -0.5, 50, 0.0)
    found = attention_backward(grad, *narrow, out.detach(), lse, *arguments, impl="cpu")
    wanted = attention_backward(grad.float(), *upcast, out.detach().float(), lse, *arguments, impl="cpu")
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found[:3], wanted[:3], strict=True))
