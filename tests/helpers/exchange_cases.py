"""Random MoE layers sharded over ranks, and the single process they must agree with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.moe import ExpertLayout, ExpertParallelDispatcher, ExpertWeights, moe_forward
from toolkit.moe.dispatchers.transport import Transport
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.experts import experts

GRADIENTS = ("x", "topk_weights", "up", "down", "up_bias", "down_bias")


@dataclass
class Case:
    """All ranks' tokens one after the other; rank r has ``tokens[r]`` of them."""

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    grad: Tensor
    weights: ExpertWeights
    tokens: list[int]
    num_experts: int

    def of_rank(self, rank: int) -> slice:
        return slice(sum(self.tokens[:rank]), sum(self.tokens[: rank + 1]))


def make_case(
    seed: int,
    tokens: list[int],
    *,
    num_experts: int = 8,
    top_k: int = 3,
    hidden: int = 10,
    inner: int = 6,
    only: range | None = None,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    gated: bool = True,
    **layout: Any,
) -> Case:
    """Ids from ``only`` (all experts where None), some of them the mark of a pair to skip."""
    g = torch.Generator().manual_seed(seed)
    count = sum(tokens)
    allowed = torch.tensor([*(only or range(num_experts)), num_experts])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    up_outputs = 2 * inner if gated else inner
    up, down = normal(num_experts, up_outputs, hidden), normal(num_experts, hidden, inner)
    if layout.get("transposed"):
        up, down = up.mT.contiguous(), down.mT.contiguous()
    biases = (normal(num_experts, up_outputs), normal(num_experts, hidden)) if bias else (None, None)
    weights = ExpertWeights(up, down, ExpertLayout("silu", **layout), *biases)
    topk_ids = allowed[torch.randint(len(allowed), (count, top_k), generator=g)]
    topk_weights = torch.rand(count, top_k, generator=g, dtype=torch.float64)
    topk_weights = topk_weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return Case(normal(count, hidden), topk_ids, topk_weights, normal(count, hidden), weights, tokens, num_experts)


def exchanged(
    case: Case, transport: Transport, chunks: int, recompute: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients on this rank; the weights' are those of its experts."""
    dispatcher = ExpertParallelDispatcher(chunks=chunks, transport=transport)
    mine, owned = case.of_rank(transport.rank), dispatcher.owned(case.num_experts)
    leaves = {"x": case.x[mine].clone(), "topk_weights": case.topk_weights[mine].clone()}
    for name in GRADIENTS[2:]:
        if getattr(case.weights, name) is not None:
            leaves[name] = getattr(case.weights, name)[owned].clone()
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    tensors: dict[str, Any] = {name: tensor for name, tensor in leaves.items() if name not in ("x", "topk_weights")}
    weights = case.weights._replace(**tensors)
    out = moe_forward(
        leaves["x"], case.topk_ids[mine], leaves["topk_weights"], weights, dispatcher, recompute=recompute
    )
    out.backward(case.grad[mine])
    gradients: dict[str, Any] = {name: leaf.grad for name, leaf in leaves.items()}
    return out.detach(), gradients


def on_one(case: Case, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the op on all tokens and experts, in ``dtype``."""
    kind = case.topk_weights.dtype if dtype == case.x.dtype else dtype
    leaves = {
        "x": case.x.to(dtype, copy=True).requires_grad_(),
        "topk_weights": case.topk_weights.to(kind, copy=True).requires_grad_(),
    }
    for name in GRADIENTS[2:]:
        if getattr(case.weights, name) is not None:
            leaves[name] = getattr(case.weights, name).to(dtype, copy=True).requires_grad_()
    layout = case.weights.layout
    out = experts(
        leaves["x"], leaves["topk_weights"], leaves["up"], leaves["down"],
        dispatch_plan(case.topk_ids, case.num_experts), layout.activation,
        up_bias=leaves.get("up_bias"), down_bias=leaves.get("down_bias"),
        score_position=layout.score_position,
        transposed=layout.transposed, interleaved=layout.interleaved,
    )  # fmt: skip
    out.backward(case.grad.to(dtype))
    gradients: dict[str, Any] = {name: leaf.grad for name, leaf in leaves.items()}
    return out.detach(), gradients
