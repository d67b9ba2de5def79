"""Load balancing of an MoE model in training: section ``train.moe``, for all objectives.

The losses are the mean over all tokens of an update, over micro-batches and processes. The load balancing loss, which
is not a sum over tokens, is that of each micro-batch, weighted by its tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.config.schema import MoeSection
from toolkit.errors import ToolkitError
from toolkit.moe.balance import RouterStatistics, load_metrics, update_expert_bias
from toolkit.moe.observer import observing
from toolkit.patching import PatchReport
from toolkit.patching.forward import row_forward
from toolkit.patching.sharding import is_sharded
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext
from toolkit.training.objectives.base import RunContext
from toolkit.training.shares import TokenShares


class Balancing:
    """Auxiliary losses, updates of expert biases and metrics of the routers of a run's model; none for a dense model.

    Args:
        section: ``train.moe`` of the recipe.
        context: the run.
        report: of patching the model.

    Raises:
        ToolkitError: where the section needs routers, expert biases or experts that the model does not have.
    """

    def __init__(self, section: MoeSection, context: RunContext, report: PatchReport) -> None:
        self.section, self.context = section, context
        self.statistics = RouterStatistics(losses=section.router_aux_loss_coef > 0 or section.router_z_loss_coef > 0)
        self._shares = TokenShares(context)
        self._loads: dict[int, Tensor] = {}  # of the current update, on this process
        self._step_loads: dict[int, Tensor] = {}  # of the current step, on all processes
        self._losses = torch.zeros(2, dtype=torch.float64, device=context.device)
        self._updates = 0
        self._check(report)
        if self.routers:
            context.model.observer = self.statistics

    def _check(self, report: PatchReport) -> None:
        """Counts the model's routers by a forward of one token, and checks the section against them."""
        section, observed = self.section, RouterStatistics(losses=False)
        with torch.no_grad(), observing(observed):
            batch = RaggedBatch.from_sequences([[0]], device=self.context.device)
            row_forward(self.context.model.model, DenseContext(batch))
        self.routers = len(observed.take_loads())
        reasons = sorted({one.reason for one in report.skipped if one.role in ("router", "experts")})
        why = f" ({'; '.join(reasons)})" if reasons else ""
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "bias_update_rate"):
            if getattr(section, name) and not self.routers:
                raise ToolkitError(
                    f"train.moe.{name} must be 0 for a model without a patched router{why}, got "
                    f"{getattr(section, name)}."
                )
        if section.bias_update_rate and not observed.expert_biases:
            raise ToolkitError(
                "train.moe.bias_update_rate must be 0 for a model whose routers have no expert bias, got "
                f"{section.bias_update_rate}."
            )
        trained_apart = any(isinstance(one, nn.Parameter) for one in observed.expert_biases.values())
        if section.bias_update_rate and trained_apart and is_sharded(context_model := self.context.model.model):
            raise ToolkitError(
                f"train.moe.bias_update_rate must be 0 with sharded weights for {type(context_model).__name__}, whose "
                f"expert biases are sharded with them, got {section.bias_update_rate}."
            )
        experts = [claim.module for claim in report.claims if claim.role == "experts"]
        if section.recompute and not experts:
            raise ToolkitError(f"train.moe.recompute must be false for a model without patched experts{why}, got true.")
        for module in experts:
            module.recompute_experts = section.recompute  # type: ignore[assignment]

    def begin(self, micros: Sequence[Any], rows: Callable[[Any], int]) -> None:
        """Before an update of ``micros``; ``rows`` gives the number of rows of each."""
        if self.routers:
            self._shares.begin(micros, rows)

    def loss(self, index: int) -> Tensor | None:
        """The auxiliary losses of the micro-batch that just ran, weighted for its backward; None without any."""
        if not self.routers:
            return None
        count = self._shares.counts[index]
        for layer, load in self.statistics.take_loads().items():
            _add(self._loads, layer, load if count else torch.zeros_like(load))
        if not self.statistics.losses:
            return None
        share = self._shares.of(index)
        both = torch.stack(self.statistics.take_losses())
        self._losses += share * both.detach()
        coefficients = both.new_tensor([self.section.router_aux_loss_coef, self.section.router_z_loss_coef])
        return share * (both * coefficients).sum()

    def finish_update(self, updated: bool = True) -> None:
        """After the optimizer step: sums the loads of all processes and updates the expert biases by them.

        Args:
            updated: False for a step that was skipped, whose biases stay.
        """
        mine, self._loads = self._loads, {}
        if not mine:
            return
        self._updates += 1
        reduced = self.context.sum_tensor(torch.cat(list(mine.values())))
        for layer, load in zip(mine, reduced.split([len(load) for load in mine.values()])):
            _add(self._step_loads, layer, load)
            if updated and self.section.bias_update_rate and layer in self.statistics.expert_biases:
                update_expert_bias(self.statistics.expert_biases[layer], load, self.section.bias_update_rate)

    def metrics(self) -> dict[str, float]:
        """Metrics of a step: the balance of the loads of all its tokens, and its mean auxiliary losses."""
        loads, self._step_loads = list(self._step_loads.values()), {}
        if not loads:
            return {}
        self.context.details.add_expert_load(loads)
        values = load_metrics(loads)
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
