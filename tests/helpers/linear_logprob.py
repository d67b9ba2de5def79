"""What the tests of linear_logprob share: problems of every variant, and dense logits in float64 as oracle."""

import torch
from torch import Tensor

from tests.helpers.implementations import Implementation
from tests.helpers.rowwise import integers, seeded
from toolkit.ops.linear_logprob import linear_logprob

BOUND = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}

VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 2.0, "scale": 1.5},
    "tempered": {"temperature": 0.7},
    "temperatures": {"temperature": "rows"},
    "all": {"bias": True, "scale": 0.5, "softcap": 3.0, "temperature": "rows"},
}


def problem(
    rows: int, depth: int, vocabulary: int, dtype: torch.dtype | None = None, variant: str = "plain", choices: int = 0
) -> tuple[list[Tensor], Tensor, dict]:
    """(hidden, weight[, bias]), targets (about a fifth ignored) and the keywords of a variant."""
    options = dict(VARIANTS[variant])
    tensors = [
        seeded(rows, depth, dtype=dtype),
        seeded(vocabulary, depth, dtype=dtype, scale=1.5 * max(depth, 1) ** -0.5, seed=1),
    ]
    if options.pop("bias", False):
        tensors.append(seeded(vocabulary, dtype=dtype, seed=2))
    if options.get("temperature") == "rows":
        options["temperature"] = seeded(rows, dtype=torch.float32, seed=5).sigmoid() + 0.5
    shape = (rows, choices) if choices else (rows,)
    targets = integers(0, vocabulary, *shape, seed=3)
    return tensors, torch.where(integers(0, 5, *shape, seed=4) == 0, -100, targets), options


def oracle(tensors: list[Tensor], targets: Tensor, scale=1.0, softcap=0.0, temperature=1.0) -> tuple[Tensor, ...]:
    """The four statistics from dense logits and torch's own log_softmax."""
    z = torch.nn.functional.linear(*tensors) * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(z)[:, None] if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(z, -1)
    several = targets if targets.dim() > 1 else targets[:, None]
    own = log_p.gather(-1, several.clamp_min(0)).view(targets.shape)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.where(targets < 0, 0.0, own), torch.logsumexp(z, -1), entropy, z.mean(-1)


def run(f, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The four statistics and the gradients of one weighting of them."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = list(f(leaves))[:4]
    weights = [seeded(*y.shape, dtype=y.dtype, seed=10 + i) for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, leaves, weights))


def run_exactly(f, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """``run`` on the same numbers in float64, with the cotangents of ``run`` on ``tensors``."""
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    outputs = list(f(leaves))
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    weights = [seeded(*y.shape, dtype=dtype, seed=10 + i).double() for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, leaves, weights))


def call(tensors: list[Tensor], targets: Tensor, impl: Implementation | None = None, **options):
    bias = tensors[2] if len(tensors) > 2 else None
    return linear_logprob(tensors[0], tensors[1], targets, bias=bias, impl=impl.option if impl else None, **options)
