"""The weights of a layer's experts, as data: tensors and their layout.

E experts, hidden size H, intermediate size I; G = 2 with a gate, else 1.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.ops.experts import is_gated


@dataclass(frozen=True)
class ExpertLayout:
    """What a layer's experts compute, and how their weights lie: see ``toolkit.ops.experts.experts``.

    Whether there is a gate follows from the weights' shapes.

    Args:
        activation: e.g. "silu".
        score_position: where the routing weight is applied: "activation", "combine" or "input".
        transposed: up [E, H, G I] and down [E, I, H] instead of [E, G I, H] and [E, H, I].
        interleaved: gate and up alternate along G I; otherwise the gate is the first half.
    """

    activation: str
    score_position: str = "activation"
    transposed: bool = False
    interleaved: bool = False


class ExpertWeights(NamedTuple):
    """The experts that one rank holds.

    Fields:
        up: [E, G I, H], or as ``layout`` says.
        down: [E, H, I], or as ``layout`` says.
        layout: what the experts compute.
        up_bias: [E, G I] or None.
        down_bias: [E, H] or None.
    """

    up: Tensor
    down: Tensor
    layout: ExpertLayout
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def num_local_experts(self) -> int:
        return self.up.shape[0]

    @property
    def gated(self) -> bool:
        return is_gated(self.up, self.down, self.layout.transposed)

    def to(self, dtype: torch.dtype) -> "ExpertWeights":
        """The weights in another dtype."""
        up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in (self.up_bias, self.down_bias))
        return ExpertWeights(self.up.to(dtype), self.down.to(dtype), self.layout, up_bias, down_bias)


class Factors(NamedTuple):
    """Low-rank adapters ``W + scaling B A`` of each expert's weight.

    Fields:
        a: of each adapter [E, r, in].
        b: of each adapter [E, out, r].
        scaling: of each adapter.
    """

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    scaling: tuple[float, ...]

    def to(self, dtype: torch.dtype) -> "Factors":
        """The factors in another dtype."""
        return Factors(tuple(one.to(dtype) for one in self.a), tuple(one.to(dtype) for one in self.b), self.scaling)


class ExpertAdapters(NamedTuple):
    """Low-rank adapters of each expert's two weights; None for a weight without.

    Fields:
        up, down: of the weights.
        ids: [T] int64 the adapter of each token, -1 for none; None where all tokens have the first one.
    """

    up: Factors | None = None
    down: Factors | None = None
    ids: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "ExpertAdapters":
        """The adapters in another dtype."""
        return ExpertAdapters(self.up and self.up.to(dtype), self.down and self.down.to(dtype), self.ids)
