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

    def forward(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """Forward ``down(act(gate(x)) * up(x))``, or ``down(act(gate(x), up(x)))`` for a gate of two arguments.

        The projections are called as modules, so adapters still act.
        """
        gate, up, down, kind = self.gate, self.up, self.down, self.kind

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            return getattr(self, down)(gated_activation(getattr(self, gate)(x), getattr(self, up)(x), kind))

        return forward


def activation_forward(kind: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """Forward of a parameterless elementwise activation."""

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        return activation(input, kind)

    return forward
