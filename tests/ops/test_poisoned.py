"""Fresh memory full of NaN: no op leaves an element of a result unwritten, forward or backward, or reads one."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.helpers.rowwise import seeded
from toolkit.ops.activation import activation
from toolkit.ops.attention import attention
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.experts import experts
from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.grouped_linear import combine, grouped_linear
from toolkit.ops.layer_norm import layer_norm
from toolkit.ops.linear import linear, linear_group
from toolkit.ops.linear_cross_entropy import linear_cross_entropy
from toolkit.ops.linear_logprob import linear_logprob
from toolkit.ops.lora_linear import lora_linear
from toolkit.ops.quantised_linear import dequantise, find, quantised_linear
from toolkit.ops.rms_norm import add_rms_norm, rms_norm
from toolkit.ops.rotary import rotary, rotary_tables
from toolkit.ops.route import route
from toolkit.ops.sample import penalize, sample
from toolkit.ops.token_logprob import token_logprob

ROWS, WIDTH = 37, 45
IDS = torch.arange(ROWS) % 19 - 1
TARGETS = torch.where(IDS < 0, -100, IDS)
OFFSETS = torch.tensor([0, 5, 5, 30])  # an empty sequence, and rows of padding at the end
A, B = seeded(2, 3, WIDTH, seed=5), seeded(2, WIDTH, 3, seed=6)
SQUARE = seeded(WIDTH, WIDTH, seed=4)
CODES, SCALES = find("int4").quantise(SQUARE, group=32)
HALF, INTEGERS = torch.full((ROWS,), 0.5, dtype=torch.float64), torch.arange(ROWS)


# Experts 0 to 3, of which 2 gets no token; 4 marks a slot to skip.
PLAN = dispatch_plan(torch.tensor([[0, 1], [3, 4], [1, 4], [4, 4]]).repeat(10, 1)[:ROWS], 4)
UP, DOWN = seeded(4, 14, WIDTH, seed=7), seeded(4, WIDTH, 7, seed=8)


def mixed(x: Tensor, score_position: str) -> Tensor:
    bias = x[:4, :14], x[4:8]
    return experts(
        x, x[:, :2], UP.to(x.dtype), DOWN.to(x.dtype), PLAN, "silu", up_bias=bias[0], down_bias=bias[1],
        score_position=score_position,
    )  # fmt: skip


def attend(x: Tensor) -> Tensor:
    q = x[:, None, :44].unflatten(-1, (2, 22)).squeeze(1)
    return attention(q, q[:, :1], q[:, 1:], OFFSETS, OFFSETS[:-1], OFFSETS.diff())[0]


OPS = {
    "rms_norm": lambda x: rms_norm(x, x[0], 1e-6),
    "add_rms_norm": lambda x: add_rms_norm(x, x.flip(0), x[0], 1e-6),
    "layer_norm": lambda x: layer_norm(x, x[0], x[1], 1e-6),
    "activation": lambda x: activation(x, "gelu"),
    "gated_activation": lambda x: gated_activation(x, x.flip(0), "clamped_swiglu"),
    "rotary": lambda x: rotary(x[:, None], *rotary_tables(INTEGERS, torch.rand(10), dtype=x.dtype)),
    "linear": lambda x: linear(x, SQUARE.to(x.dtype), x[0]),
    "linear_group": lambda x: linear_group(x.detach(), [SQUARE.to(x.dtype)] * 2, [None, None]),
    "quantised_linear": lambda x: quantised_linear(x, CODES, SCALES, x[0], "int4", WIDTH),
    "quantised_linear, few rows": lambda x: quantised_linear(x[:3], CODES, SCALES, None, "int4", WIDTH),
    "dequantise": lambda x: dequantise(CODES, SCALES, "int4", WIDTH, WIDTH, x.dtype),
    "lora_linear": lambda x: lora_linear(
        x, SQUARE.to(x.dtype), None, list(A.to(x.dtype)), list(B.to(x.dtype)), [1.0, 1.0], IDS % 3 - 1
    ),
    "lora_linear, of every kind": lambda x: lora_linear(
        x,
        SQUARE.to(x.dtype),
        x[1],
        [x[:2], A.to(x.dtype), x[2:3]],
        [x[:2].T, B.to(x.dtype), x[2:3].T],
        [1.0, 2.0, 0.5],
        IDS % 4 - 1,
        groups=INTEGERS % 2 * (IDS % 4 == 2),
        column_scales=[x[3], None, x[4]],
    ),
    "token_logprob": lambda x: token_logprob(x, TARGETS),
    "linear_logprob": lambda x: linear_logprob(x, SQUARE.to(x.dtype), TARGETS, bias=x[0], top_k=3)[:4],
    "linear_logprob, ignored": lambda x: linear_logprob(x, SQUARE.to(x.dtype), IDS * 0 - 100)[:1],
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, SQUARE.to(x.dtype), TARGETS, bias=x[0]),
    "linear_cross_entropy, weight": lambda x: linear_cross_entropy(x.detach(), x, TARGETS, row_weights=HALF),
    "linear_cross_entropy, ignored": lambda x: linear_cross_entropy(x, SQUARE.to(x.dtype), IDS * 0 - 100),
    "attention": attend,
    "dispatch_plan": lambda x: [value.double() for value in dispatch_plan(IDS.view(-1, 1) % 6, 4, 8)],
    "route": lambda x: route(
        x, 3, "sigmoid", expert_bias=x[0].detach(), n_group=9, topk_group=2, experts_per_group_score=2
    )[0],
    "route, normalised": lambda x: route(x, 3, norm_topk_prob=True)[0],
    "grouped_linear": lambda x: grouped_linear(x, UP.to(x.dtype), x[:4, :14], PLAN, gather=True),
    "grouped_linear, weights": lambda x: grouped_linear(
        torch.cat([x, x])[: 2 * ROWS].detach(), x[:28].unflatten(0, (4, 7)), None, PLAN
    ),
    "combine": lambda x: combine(torch.cat([x, x]), PLAN[1], x[:, :2]),
    "experts": lambda x: mixed(x, "activation"),
    "experts, at the combine": lambda x: mixed(x, "combine"),
    "experts, at the input": lambda x: mixed(x, "input"),
    "experts, weights": lambda x: experts(
        x.detach(), x.detach()[:, :2], x[:28].unflatten(0, (4, 7)), DOWN.to(x.dtype), PLAN, "gelu"
    ),
    "sample": lambda x: sample(x.detach(), HALF, INTEGERS % 5, HALF, HALF, INTEGERS, INTEGERS)[1],
    "penalize": lambda x: penalize(
        x.detach(),
        INTEGERS,
        torch.arange(ROWS + 1),
        INTEGERS % 2,
        HALF,
        HALF,
        HALF,
        INTEGERS[:0],
        0 * torch.arange(ROWS + 1),
    ),
}


@pytest.fixture
def poison() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    before, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    assert torch.empty(5).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def run(name: str, dtype: torch.dtype) -> list[Tensor]:
    x = seeded(ROWS, WIDTH, dtype=dtype).requires_grad_()
    torch.manual_seed(0)
    outputs = OPS[name](x)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    graded = [y for y in outputs if y.requires_grad]
    gradients = torch.autograd.grad(graded, x, [torch.ones_like(y) for y in graded]) if graded else ()
    return [y.detach() for y in outputs] + list(gradients)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_are_whole(name, dtype, request):
    clean = run(name, dtype)
    request.getfixturevalue("poison")
    for got, wanted in zip(run(name, dtype), clean, strict=True):
        assert wanted.isfinite().all()
        assert torch.equal(got, wanted)
