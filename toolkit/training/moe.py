"""A mixture's experts in training: section ``train.moe`` at work, in one place for all objectives.

The losses are the mean over all tokens of an update, over micro-batches and processes alike; the load balancing loss,
which is no sum over tokens, is that of each micro-batch, weighted by its tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from toolkit.config.schema import MoeSection
from toolkit.errors import ToolkitError
from toolkit.moe.balance import RouterStatistics, correct_bias, load_figures
from toolkit.moe.observer import observing
from toolkit.patching import PatchReport, ragged_forward, weights_changed
from toolkit.state.batch import RaggedBatch
from toolkit.training.objectives.base import RunContext


class Balancing:
    """Losses, corrections and figures of the routers of a run's model. Of a dense model it does nothing.

    Raises ToolkitError where the section asks for what the model has not.
    """

    def __init__(self, section: MoeSection, context: RunContext, report: PatchReport) -> None:
        self.section, self.context = section, context
        self.statistics = RouterStatistics(losses=section.router_aux_loss_coef > 0 or section.router_z_loss_coef > 0)
        self._counts: list[int] = []
        self._total = 1.0
        self._loads: dict[int, Tensor] = {}  # of the update under way, on this process
        self._step_loads: dict[int, Tensor] = {}  # of the step so far, on all
        self._losses = torch.zeros(2, dtype=torch.float64, device=context.device)
        self._updates = 0
        self._look(report)
        if self.routers:
            context.model.observer = self.statistics

    def _look(self, report: PatchReport) -> None:
        """Which routers the model has."""
        section, seen = self.section, RouterStatistics(losses=False)
        with torch.no_grad(), observing(seen):
            ragged_forward(self.context.model.model, RaggedBatch.from_sequences([[0]], device=self.context.device))
        self.routers = len(seen.take_loads())
        left = sorted({refusal.reason for refusal in report.skipped if refusal.role in ("router", "experts")})
        why = f" ({'; '.join(left)})" if left else ""
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "bias_update_rate"):
            if getattr(section, name) and not self.routers:
                raise ToolkitError(
                    f"train.moe.{name} must be 0 for a model without a patched router{why}, got "
                    f"{getattr(section, name)}."
                )
        if section.bias_update_rate and not seen.corrections:
            raise ToolkitError(
                "train.moe.bias_update_rate must be 0 for a model whose routers have no expert bias, got "
                f"{section.bias_update_rate}."
            )
        experts = [claim.module for claim in report.claims if claim.role == "experts"]
        if section.recompute and not experts:
            raise ToolkitError(f"train.moe.recompute must be false for a model without patched experts{why}, got true.")
        for module in experts:
            module.recompute_experts = section.recompute  # type: ignore[assignment]

    def begin(self, micros: Sequence[Any], rows: Callable[[Any], int]) -> None:
        """Before an update of ``micros``, which have so many rows."""
        if self.routers:
            self._counts = [rows(micro) for micro in micros]
            (self._total,) = self.context.reduce_sum([sum(self._counts)])

    def loss(self, index: int) -> Tensor | None:
        """Takes in the micro-batch that just ran; what it adds to its loss, or None."""
        if not self.routers:
            return None
        count = self._counts[index]
        for layer, load in self.statistics.take_loads().items():
            _add(self._loads, layer, load if count else torch.zeros_like(load))
        if not self.statistics.losses:
            return None
        share = count * self.context.world_size / max(self._total, 1.0)
        both = torch.stack(self.statistics.take_losses())
        self._losses += share * both.detach()
        return (
            share * (both * both.new_tensor([self.section.router_aux_loss_coef, self.section.router_z_loss_coef])).sum()
        )

    def finish_update(self) -> None:
        """After the optimizer: sum up the loads of all processes, and correct the routers' biases by them."""
        mine, self._loads = self._loads, {}
        if not mine:
            return
        self._updates += 1
        reduced = cast(Tensor, self.context.accelerator.reduce(torch.cat(list(mine.values())), "sum"))
        for layer, load in zip(mine, reduced.split([len(load) for load in mine.values()])):
            _add(self._step_loads, layer, load)
            if self.section.bias_update_rate and layer in self.statistics.corrections:
                correct_bias(self.statistics.corrections[layer], load, self.section.bias_update_rate)
        if self.section.bias_update_rate:
            weights_changed(self.context.model.model)  # biases are buffers, which the weight version does not watch

    def metrics(self) -> dict[str, float]:
        """What a step logs: how even the loads of all its tokens are, and its mean losses."""
        loads, self._step_loads = list(self._step_loads.values()), {}
        if not loads:
            return {}
        values = load_figures(loads)
        if self.statistics.losses:
            balance, z_loss = self.context.reduce_sum(
                (self._losses / (self._updates * self.context.world_size)).tolist()
            )
            values |= {"aux_loss": balance, "router_z_loss": z_loss}
        self._losses.zero_()
        self._updates = 0
        return values


def _add(sums: dict[int, Tensor], layer: int, load: Tensor) -> None:
    sums[layer] = sums[layer] + load if layer in sums else load
