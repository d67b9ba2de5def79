"""Random layers of experts shared out to ranks, and the single process they must agree with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.moe import ExpertParallel, ExpertWeights, mix
from toolkit.moe.transport import Transport
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.experts import experts

GRADIENTS = ("x", "scores", "up", "down", "up_bias", "down_bias")


@dataclass
class Case:
    """All ranks' tokens one after the other; rank r has ``tokens[r]`` of them."""

    x: Tensor
    ids: Tensor
    scores: Tensor
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
    slots: int = 3,
    width: int = 10,
    inner: int = 6,
    only: range | None = None,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    gated: bool = True,
    **layout: Any,
) -> Case:
    """Ids from ``only`` (all experts where None), some of them the mark of a slot to skip."""
    g = torch.Generator().manual_seed(seed)
    count = sum(tokens)
    allowed = torch.tensor([*(only or range(num_experts)), num_experts])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    wide = 2 * inner if gated else inner
    up, down = normal(num_experts, wide, width), normal(num_experts, width, inner)
    if layout.get("transposed"):
        up, down = up.mT.contiguous(), down.mT.contiguous()
    biases = (normal(num_experts, wide), normal(num_experts, width)) if bias else (None, None)
    weights = ExpertWeights(up, down, "silu", *biases, **layout)
    ids = allowed[torch.randint(len(allowed), (count, slots), generator=g)]
    scores = torch.rand(count, slots, generator=g, dtype=torch.float64)
    scores = scores.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return Case(normal(count, width), ids, scores, normal(count, width), weights, tokens, num_experts)


def exchanged(
    case: Case, transport: Transport, chunks: int, recompute: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients on this rank; the weights' are those of its experts."""
    parallel = ExpertParallel(chunks=chunks, transport=transport)
    mine, owned = case.of_rank(transport.rank), parallel.owned(case.num_experts)
    leaves = {"x": case.x[mine].clone(), "scores": case.scores[mine].clone()}
    for name in GRADIENTS[2:]:
        if getattr(case.weights, name) is not None:
            leaves[name] = getattr(case.weights, name)[owned].clone()
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    tensors: dict[str, Any] = {name: tensor for name, tensor in leaves.items() if name not in ("x", "scores")}
    weights = case.weights._replace(**tensors, parallel=parallel)
    out = mix(leaves["x"], case.ids[mine], leaves["scores"], weights, recompute=recompute)
    out.backward(case.grad[mine])
    gradients: dict[str, Any] = {name: leaf.grad for name, leaf in leaves.items()}
    return out.detach(), gradients


def on_one(case: Case, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the op on all tokens and experts, in ``dtype``."""
    kind = case.scores.dtype if dtype == case.x.dtype else dtype
    leaves = {
        "x": case.x.to(dtype, copy=True).requires_grad_(),
        "scores": case.scores.to(kind, copy=True).requires_grad_(),
    }
    for name in GRADIENTS[2:]:
        if getattr(case.weights, name) is not None:
            leaves[name] = getattr(case.weights, name).to(dtype, copy=True).requires_grad_()
    w = case.weights
    out = experts(
        leaves["x"], leaves["scores"], leaves["up"], leaves["down"], dispatch_plan(case.ids, case.num_experts),
        w.kind, up_bias=leaves.get("up_bias"), down_bias=leaves.get("down_bias"), score_position=w.site,
        transposed=w.transposed, interleaved=w.interleaved,
    )  # fmt: skip
    out.backward(case.grad.to(dtype))
    gradients: dict[str, Any] = {name: leaf.grad for name, leaf in leaves.items()}
    return out.detach(), gradients
