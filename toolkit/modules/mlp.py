"""Feed-forward layers: gated (two projections, one gated) and the plain activation."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from toolkit.ops.activation import activation
from toolkit.ops.gated_activation import gated_activation


@dataclass(frozen=True)
class GatedMlp:
    """Where a gated MLP keeps its projections, by attribute name, and the activation of its gate."""

    gate: str
    up: str
    down: str
    kind: str

    def make_forward(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """Forward ``down(act(gate(x)) * up(x))``, or ``down(act(gate(x), up(x)))`` for a gate of two arguments.

        The projections are called as modules, so adapters still act.
        """
        gate, up, down, kind = self.gate, self.up, self.down, self.kind

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            return getattr(self, down)(gated_activation(getattr(self, gate)(x), getattr(self, up)(x), kind))

        return forward


@dataclass(frozen=True)
class PackedMlp:
    """Where a gated MLP whose gate and up projections are one keeps its projections, and how the two lie in it."""

    gate_up: str
    down: str
    kind: str
    gate_first: bool = True
    interleaved: bool = False

    def make_forward(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """As ``GatedMlp.make_forward``: gate and up are halves of one projection, or every other column of it."""
        gate_up, down, kind, interleaved = self.gate_up, self.down, self.kind, self.interleaved
        gate_at, up_at = (0, 1) if self.gate_first else (1, 0)

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            packed = getattr(self, gate_up)(x)
            parts = (packed[..., 0::2], packed[..., 1::2]) if interleaved else packed.chunk(2, -1)
            return getattr(self, down)(gated_activation(parts[gate_at], parts[up_at], kind))

        return forward


def activation_forward(kind: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """Forward of a parameterless elementwise activation."""

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        return activation(input, kind)

    return forward
