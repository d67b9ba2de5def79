"""Attention layers with biases by distance: recognised by the module that makes them, proven in a ragged batch.

The role ``attention`` finds the layers; this is how one of them is proven. Their convolutions are the role ``mixer``'s.
"""

import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.modules.relative_bias import biased_forward, relative_logits_forward
from toolkit.patching.attention_interface import IMPLEMENTATION, NAME
from toolkit.patching.attention_probe import FAR
from toolkit.patching.calls import MASK, Call
from toolkit.patching.claim import ProbeError
from toolkit.patching.conditions import UNIT, Condition, Trial, drop_nothing, worst_error
from toolkit.patching.probe import device_of, random_input
from toolkit.patching.roles import mixer
from toolkit.patching.search import prove
from toolkit.state.active import set_forward_context
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext

POSITIONS = "position_ids"


def relative_logits_of(layer: nn.Module) -> str | None:
    """The name in ``layer`` of the module that makes a bias of each query by distance; None where there is none."""
    for name, child in layer.named_children():
        projection = getattr(child, "proj", None)
        extent = getattr(child, "rel_extent", None)
        if isinstance(projection, nn.Parameter) and projection.dim() == 2 and projection.shape[1] == extent:
            return name
    return None


class _Probe:
    """Runs a probe copy of a layer over sequences that are longer than its biases extent."""

    def __init__(
        self, layer: nn.Module, call: Call, name: str, condition: Condition = UNIT, proven: Any = None
    ) -> None:
        self.copied: Any = condition.copy_of(layer)
        drop_nothing(self.copied)
        self.dtype = condition.dtype or torch.float32
        for part in self.copied.modules():
            part.__dict__[IMPLEMENTATION] = NAME
        self.call, self.name, self.device = call, name, device_of(self.copied)
        extent = int(getattr(layer, name).rel_extent)
        window = int(getattr(layer, "sliding_window", None) or 0)
        self.window = window
        self.lengths = (2 * max(extent, window) + 5, 4, 1)
        own = inspect.signature(type(layer).forward).parameters
        recorded = call.arguments
        shape = recorded[call.hidden].shape
        self.inputs = [name for name in own if isinstance(recorded.get(name), Tensor) and recorded[name].shape == shape]
        asked = [one.name for one in own.values() if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
        unknown = set(asked) - {"self", MASK, *self.inputs}
        if unknown or not self.inputs:
            raise RuntimeError(f"it takes {sorted(unknown)}, which no such layer is known to take")
        self.width = shape[-1]
        self.convolutions = {path: one for path, one in self.copied.named_modules() if mixer.has_state(one)}
        if proven is None:
            proven = {path: mixer.proven(one) for path, one in self.convolutions.items()}
        self.proven = proven
        for path, verdict in self.proven.items():
            if isinstance(verdict, str):
                raise RuntimeError(f"of its {path} {verdict}")

    def run(self, given: list[Tensor], mask: Any, positions: Tensor, forwards: dict[str, Any] | None) -> Tensor:
        """The layer's output; ``forwards`` of a candidate, by name, None for its own."""
        self.copied.config._attn_implementation = "eager" if forwards is None else NAME
        for path, one in self.convolutions.items():
            own = type(one).forward if forwards is None else self.proven[path][1]
            one.__dict__["forward"] = types.MethodType(own, one)
        maker = getattr(self.copied, self.name)
        made = type(maker).forward if forwards is None else forwards[self.name]
        maker.__dict__["forward"] = types.MethodType(made, maker)
        function = type(self.copied).forward if forwards is None else forwards[""]
        arguments: dict[str, Any] = dict(zip(self.inputs, given, strict=True)) | {MASK: mask}
        if POSITIONS in self.call.arguments:
            arguments[POSITIONS] = positions
        output: Tensor = types.MethodType(function, self.copied)(**arguments)[0]
        return output

    def mask(self, length: int) -> Tensor:
        back = torch.arange(length, device=self.device)[:, None] - torch.arange(length, device=self.device)
        seen = (back >= 0) & (back < self.window) if self.window else back >= 0
        shown = torch.zeros(1, 1, length, length, dtype=self.dtype, device=self.device)
        return shown.masked_fill(~seen, torch.finfo(self.dtype).min)

    def trials(self, forwards: dict[str, Any]) -> Iterator[Trial]:
        """Of sequences in one ragged batch, at their first tokens and far behind, against each one's own way."""
        for start in (0, FAR) if POSITIONS in self.call.arguments else (0,):
            yield self._trial(forwards, start)

    def _trial(self, forwards: dict[str, Any], start: int) -> Trial:
        batch = RaggedBatch.from_sequences([[0] * length for length in self.lengths], self.device, share=False)
        context, count = DenseContext(batch), len(self.lengths)

        def together(*given: Tensor) -> Tensor:
            rows = [torch.cat(given[at : at + count], 1) for at in range(0, len(given), count)]
            with set_forward_context(context):
                return self.run(rows, None, batch.positions[None] + start, forwards)

        def separate(*given: Tensor) -> Tensor:
            outputs = []
            for at, length in enumerate(self.lengths):
                positions = torch.arange(length, device=self.device)[None] + start
                outputs.append(self.run(list(given[at::count]), self.mask(length), positions, None))
            return torch.cat(outputs, 1)

        inputs = [random_input(1, length, self.width, like=self.copied) for _ in self.inputs for length in self.lengths]
        return Trial(together, separate, [inputs])


def prove_biased(layer: nn.Module, call: Call, name: str) -> tuple[str, dict[str, Any], ProbeError] | str:
    """What takes the place of the layer's forward ("") and of that of its module ``name``, or why nothing does."""
    probe = _Probe(layer, call, name)
    own = type(getattr(layer, name)).forward
    forwards = {"": biased_forward(type(layer).forward), name: relative_logits_forward(own)}

    def error() -> ProbeError:
        def build(source: nn.Module, condition: Condition) -> tuple[nn.Module, Iterator[Trial]]:
            made = probe if condition is UNIT else _Probe(source, call, name, condition, probe.proven)
            return made.copied, made.trials(forwards)

        return worst_error(layer, build)

    return prove([("attention (biases by distance)", forwards, error)])
