"""What each layer of a model remembers, found by watching one forward of one token."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.patching.forward import context_forward
from toolkit.patching.probe import device_of
from toolkit.patching.record import report_of
from toolkit.state import StateSpec
from toolkit.state.batch import RaggedBatch
from toolkit.state.context import AttentionSettings
from toolkit.state.dense import DenseContext
from toolkit.state.pools import Pools


class _SpecContext(DenseContext):
    """A dense forward that notes what each layer asks of it."""

    def __init__(self, batch: RaggedBatch) -> None:
        super().__init__(batch)
        self.layers: list[StateSpec] = []
        self.selections_kept: list[StateSpec] = []
        self.experts: list[StateSpec] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        kind = "window" if settings.window else "full"
        if settings.kv_dtype:
            kind += f"_{settings.kv_dtype}"
        self.layers.append(StateSpec(layer, kind, (tuple(k.shape[1:]), tuple(v.shape[1:])), settings.window))
        return super().attend(layer, q, k, v, settings)

    def attend_latent(self, layer: int, q: Tensor, latents: Tensor, value_width: int, *, scale: float) -> Tensor:
        self.layers.append(StateSpec(layer, "latent", (tuple(latents.shape[1:]), (latents.shape[1], value_width))))
        return super().attend(layer, q, latents, latents[..., :value_width], AttentionSettings(scale))

    def attend_biased(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, bias: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        kind, width = "window" if settings.window else "full", k.shape[2] + bias.shape[2]
        self.layers.append(StateSpec(layer, kind, ((k.shape[1], width), tuple(v.shape[1:])), settings.window))
        return super().attend_biased(layer, q, k, v, settings, bias, sinks)

    def attend_prompt(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, window: int
    ) -> Tensor:
        self.layers.append(StateSpec(layer, "prompt_window", (tuple(k.shape[1:]), tuple(v.shape[1:])), 0))
        return DenseContext.attend(self, layer, q, k, v, settings)

    def select(self, layer: int, q: Tensor, k: Tensor, weights: Tensor, topk: int, *, scale: float) -> Tensor:
        self.layers.append(StateSpec(layer, "index", ((1, k.shape[1]),)))
        self.selections_kept.append(StateSpec(layer, "selection", ((1, topk),)))
        return super().select(layer, q, k, weights, topk, scale=scale)

    def select_pools(self, layer: int, q: Tensor, rows: Tensor, weights: Tensor, pools: Pools) -> Tensor:
        self.layers.append(StateSpec(layer, "pooled_index", ((1, rows.shape[1]),)))
        self.selections_kept.append(StateSpec(layer, "selection", ((1, pools.width),)))
        return super().select_pools(layer, q, rows, weights, pools)

    def attend_selected(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, settings: AttentionSettings
    ) -> Tensor:
        self.layers.append(StateSpec(layer, "full", (tuple(k.shape[1:]), tuple(v.shape[1:]))))
        return super().attend_selected(layer, q, k, v, selected, settings)

    def attend_selected_latent(
        self, layer: int, q: Tensor, latents: Tensor, value_width: int, selected: Tensor, settings: AttentionSettings
    ) -> Tensor:
        self.layers.append(StateSpec(layer, "latent", (tuple(latents.shape[1:]), (latents.shape[1], value_width))))
        return super().attend_selected(layer, q, latents, latents[..., :value_width], selected, settings)

    def scan(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *rest: Any, part: int = 0, **settings: Any) -> Tensor:
        self.layers.append(StateSpec(layer, "recurrent", ((v.shape[1], k.shape[2], v.shape[2]),), part=part))
        return super().scan(layer, q, k, v, *rest, part=part, **settings)

    def convolve(
        self, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
        part: int = 0,
    ) -> Tensor:  # fmt: skip
        self.layers.append(StateSpec(layer, "conv", ((weight.shape[1] - 1, x.shape[1]),), part=part))
        return super().convolve(layer, x, weight, bias, activation, part)

    def record_routing(self, layer: int, ids: Tensor) -> None:
        self.experts.append(StateSpec(layer, "routing", ((1, ids.shape[1]),)))


def state_spec(model: nn.Module) -> list[StateSpec]:
    """What every layer of a patched model remembers, in the order in which its forward meets them.

    After those come what an engine records where it is asked to: the keys that layers with an indexer select (kind
    "selection"), and where the tokens of its layers of experts, numbered separately, are routed (kind "routing").
    """
    context = _SpecContext(RaggedBatch.from_sequences([[0]], device=device_of(model)))
    with torch.no_grad():
        context_forward(model, context)
    layers = {spec.layer for spec in context.layers}
    count = getattr(model.config.get_text_config(), "num_hidden_layers", len(layers))  # type: ignore[operator, union-attr]
    missing = sorted(set(range(count)) - layers)
    report = report_of(model)
    if missing and report is not None and any(one.role in ("attention", "mixer") for one in report.skipped):
        raise ToolkitError(f"every layer's state must be known, got none of layers {missing}, which are not patched.")
    states = Counter((spec.layer, spec.kind, spec.part) for spec in context.layers)
    shared = next((layer for (layer, _, _), count in states.items() if count > 1), None)
    if shared is not None:
        raise ToolkitError(f"layers must have separate states, got several of layer {shared}.")
    indices = sorted(spec.layer for spec in context.experts)
    if indices != list(range(len(indices))):
        raise ToolkitError(f"layers of experts must be numbered 0 to {len(indices) - 1}, each once, got {indices}.")
    return context.layers + context.selections_kept + context.experts
