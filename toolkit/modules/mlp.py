"""Feed-forward layers: gated MLPs and plain activations."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from toolkit.modules.joined_linear import linear_outputs, with_one_input
from toolkit.ops.activation import activation
from toolkit.ops.gated_activation import gated_activation


@dataclass(frozen=True)
class GatedMlp:
    """Attribute names of a gated MLP's projections, and the activation of its gate."""

    gate: str
    up: str
    down: str
    kind: str

    def make_forward(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """A forward that computes ``down(act(gate(x)) * up(x))``, or ``down(act(gate(x), up(x)))`` for a binary gate.

        Projections are called as modules, so adapters still act.
        """
        gate, up, down, kind = self.gate, self.up, self.down, self.kind

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            of_gate, of_up = linear_outputs(self, (gate, up), x)
            y: Tensor = getattr(self, down)(gated_activation(of_gate, of_up, kind))
            return y

        return with_one_input(forward, (gate, up))


@dataclass(frozen=True)
class PackedMlp:
    """As ``GatedMlp``, with gate and up packed in one projection: their order, and whether they are interleaved."""

    gate_up: str
    down: str
    kind: str
    gate_first: bool = True
    interleaved: bool = False

    def make_forward(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """As ``GatedMlp.make_forward``; gate and up are halves, or even and odd columns, of one projection's output."""
        gate_up, down, kind, interleaved = self.gate_up, self.down, self.kind, self.interleaved
        gate_at, up_at = (0, 1) if self.gate_first else (1, 0)

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            packed = getattr(self, gate_up)(x)
            parts = (packed[..., 0::2], packed[..., 1::2]) if interleaved else packed.chunk(2, -1)
            y: Tensor = getattr(self, down)(gated_activation(parts[gate_at], parts[up_at], kind))
            return y

        return forward


def activation_forward(kind: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """Forward of an elementwise activation without parameters."""

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        return activation(input, kind)

    return forward
