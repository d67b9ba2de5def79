"""What the tests of the MoE ops share: routings, weights, and a loop over experts in float64 as oracle."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.rowwise import seeded
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.experts import experts

ROUTINGS = ["uniform", "skewed", "empty experts", "one expert", "skipped slots"]

GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "clamped_swiglu": lambda gate, up: (
        gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7)) * (up.clamp(-7, 7) + 1)
    ),
}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu2": lambda x: F.relu(x).square()}


def routing(name: str, tokens: int, slots: int, experts: int, seed: int = 0) -> Tensor:
    """[T, K] ids, distinct within a token; ``experts`` marks a pair that is skipped."""
    generator = torch.Generator("cpu").manual_seed(seed)
    keys = torch.rand(tokens, experts, generator=generator)
    if name == "skewed":
        keys = keys.pow(2.0 ** torch.arange(experts))  # each expert half as likely to come before another as the last
    elif name == "empty experts":
        keys[:, torch.arange(experts) % 3 == 1] = -1
    elif name == "one expert":
        keys = keys[:1].expand(tokens, -1)
    ids = keys.topk(slots, -1).indices
    if name == "skipped slots":
        ids = torch.where(torch.rand(tokens, slots, generator=generator) < 0.3, experts, ids)
        ids[1:2] = experts  # a token without experts
    return ids


def gradients_of(out: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Zeros for a leaf that no row reached, and for all where there were no rows at all."""
    if not out.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(out, leaves, grad, materialize_grads=True))


@dataclass(frozen=True)
class Layer:
    """Sizes and layout of a layer of experts."""

    experts: int = 5
    slots: int = 2
    width: int = 37
    inner: int = 11
    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    score_position: str = "activation"
    biases: bool = False

    def inputs(self, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        """x, scores, up, down and, where there are any, both biases."""
        up_outputs = self.inner * (2 if self.gated else 1)
        up = seeded(self.experts, up_outputs, self.width, scale=self.width**-0.5, seed=seed + 1)
        down = seeded(self.experts, self.width, self.inner, scale=self.inner**-0.5, seed=seed + 2)
        if self.transposed:
            up, down = up.mT.contiguous(), down.mT.contiguous()
        found = [seeded(tokens, self.width, seed=seed), seeded(tokens, self.slots, seed=seed + 3).sigmoid(), up, down]
        if self.biases:
            found += [seeded(self.experts, up_outputs, seed=seed + 4), seeded(self.experts, self.width, seed=seed + 5)]
        return [value.to(dtype) for value in found]

    def run(self, inputs: list[Tensor], ids: Tensor, impl: str | None = None, recompute: bool = False) -> Tensor:
        x, scores, up, down, *biases = inputs
        up_bias, down_bias = biases or (None, None)
        return experts(
            x, scores, up, down, dispatch_plan(ids, self.experts), self.activation,
            up_bias=up_bias, down_bias=down_bias, score_position=self.score_position, transposed=self.transposed,
            interleaved=self.interleaved, recompute=recompute, impl=impl,
        )  # fmt: skip

    def oracle(self, inputs: list[Tensor], ids: Tensor) -> Tensor:
        """A loop over experts, differentiable; a token's slots are added up by torch."""
        x, scores, up, down, *biases = inputs
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            s = scores[token, slot][:, None]
            rows = x[token] * s if self.score_position == "input" else x[token]
            first, second = (up[e].T, down[e].T) if self.transposed else (up[e], down[e])
            z = F.linear(rows, first, biases[0][e] if biases else None)
            y = F.linear(self.activate(z), second, biases[1][e] if biases else None)
            out = out.index_add(0, token, y if self.score_position == "input" else y * s)
        return out

    def activate(self, z: Tensor) -> Tensor:
        if not self.gated:
            return PLAIN[self.activation](z)
        gate, up = (z[:, ::2], z[:, 1::2]) if self.interleaved else z.chunk(2, -1)
        return GATES[self.activation](gate, up)


PLAIN_LAYER = Layer(gated=False, activation="gelu")
LAYERS = {
    "halves": Layer(),
    "interleaved": Layer(interleaved=True, activation="gelu_tanh"),
    "biases": Layer(biases=True),
    "as gpt-oss": Layer(interleaved=True, transposed=True, biases=True, activation="clamped_swiglu"),
    "plain": PLAIN_LAYER,
    "plain, transposed, biases": Layer(gated=False, activation="relu2", transposed=True, biases=True),
    **{f"at the {position}": Layer(score_position=position, biases=True) for position in ("combine", "input")},
    **{
        f"at the {position}, transposed": Layer(score_position=position, transposed=True, interleaved=True)
        for position in ("combine", "input")
    },
    "plain, at the input": replace(PLAIN_LAYER, score_position="input"),
    "one expert": Layer(experts=1, slots=1),
    "larger than a block": Layer(experts=3, width=270, inner=40),
}
"""Every layout and score position, each with another at least once."""
