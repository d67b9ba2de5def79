"""What each layer of a model remembers, found by watching one forward of one token."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.patching.forward import ragged_forward
from toolkit.patching.probe import device_of
from toolkit.patching.record import report_of
from toolkit.state import StateSpec
from toolkit.state.batch import RaggedBatch


@dataclass(frozen=True, eq=False)
class _Watching(RaggedBatch):
    """A batch that notes what each layer asks of it."""

    seen: list[StateSpec] = field(default_factory=list)
    routed: list[StateSpec] = field(default_factory=list)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor | int, **settings: Any) -> Tensor:
        window = settings.get("window", 0)
        values = (k.shape[1], v) if isinstance(v, int) else tuple(v.shape[1:])
        kind = "latent" if isinstance(v, int) else "window" if window else "full"
        self.seen.append(StateSpec(layer, kind, (tuple(k.shape[1:]), values), window))
        return super().attend(layer, q, k, v, **settings)

    def scan(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **settings: Any) -> Tensor:
        self.seen.append(StateSpec(layer, "recurrent", ((v.shape[1], k.shape[2], v.shape[2]),)))
        return super().scan(layer, q, k, v, *rest, **settings)

    def convolve(self, layer: int, x: Tensor, weight: Tensor, *rest: Any, **settings: Any) -> Tensor:
        self.seen.append(StateSpec(layer, "conv", ((weight.shape[1] - 1, x.shape[1]),)))
        return super().convolve(layer, x, weight, *rest, **settings)

    def note_routing(self, layer: int, ids: Tensor) -> None:
        self.routed.append(StateSpec(layer, "routing", ((1, ids.shape[1]),)))


def state_spec(model: nn.Module) -> list[StateSpec]:
    """What every layer of a patched model remembers, in the order in which its forward meets them.

    After those come its layers of experts, counted by themselves: where their tokens are routed (kind "routing").
    """
    plain = RaggedBatch.from_sequences([[0]], device=device_of(model))
    watching = _Watching(**{name: getattr(plain, name) for name in RaggedBatch.__dataclass_fields__})
    with torch.no_grad():
        ragged_forward(model, watching)
    layers = {spec.layer for spec in watching.seen}
    count = getattr(model.config.get_text_config(), "num_hidden_layers", len(layers))  # type: ignore[operator, union-attr]
    missing = sorted(set(range(count)) - layers)
    report = report_of(model)
    if missing and report is not None and any(one.role in ("attention", "mixer") for one in report.skipped):
        raise ToolkitError(f"layers {missing} of the model keep their state to themselves; allowed is none.")
    places = sorted(spec.layer for spec in watching.routed)
    if places != list(range(len(places))):
        raise ToolkitError(f"layers of experts are numbered {places}; allowed are 0 to {len(places) - 1}, each once.")
    return watching.seen + watching.routed
