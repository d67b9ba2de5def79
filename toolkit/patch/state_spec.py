"""What each layer of a model remembers, found by watching one forward of one token."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.patch.forward import ragged_forward
from toolkit.patch.probe import device_of
from toolkit.state import LayerSpec
from toolkit.state.batch import RaggedBatch


@dataclass(frozen=True)
class _Watching(RaggedBatch):
    """A batch that notes the keys and values that each layer brings."""

    seen: dict[int, LayerSpec] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **shape: Any) -> Tensor:
        self.seen[layer] = LayerSpec(k.shape[1], k.shape[2], v.shape[2], shape.get("window", 0))
        return super().attend(layer, q, k, v, **shape)


def state_spec(model: nn.Module) -> list[LayerSpec]:
    """Key heads, head sizes and window of every attention layer of a patched model, in layer order."""
    plain = RaggedBatch.from_sequences([[0]], device=device_of(model))
    watching = _Watching(**{name: getattr(plain, name) for name in RaggedBatch.__dataclass_fields__})
    with torch.no_grad():
        ragged_forward(model, watching)
    if sorted(watching.seen) != list(range(len(watching.seen))) or not watching.seen:
        raise ToolkitError(
            f"layers {sorted(watching.seen)} of the model use attention; allowed is every layer from 0 on."
        )
    return [watching.seen[layer] for layer in range(len(watching.seen))]
