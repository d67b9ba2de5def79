"""The loss of a model's indexers in training: field ``train.indexer_loss_coef``, for all objectives.

An indexer selects the keys that a sparse attention layer attends, and the objective has no gradient for it. It learns
from its own loss (``toolkit.ops.index_loss``) alone: the mean over all tokens of an update, over micro-batches and
processes, summed over layers. Only indexers have gradients of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.patching import IndexLosses, PatchReport, index_losses, indexers_of, ragged_forward
from toolkit.state.batch import RaggedBatch
from toolkit.training.objectives.base import RunContext
from toolkit.training.shares import TokenShares


def freeze_indexers(model: nn.Module, report: PatchReport) -> str | None:
    """Freeze what only the loss of indexers would train; a sentence of what is frozen, None where nothing is.

    Data parallel waits for a gradient of every parameter that is not frozen.
    Raises ToolkitError where nothing is left to train.
    """
    frozen = [p for indexer in indexers_of(report) for p in indexer.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not frozen:
        return None
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ToolkitError("train.indexer_loss_coef must be > 0 for a run that trains indexers alone, got 0.")
    return f"{len(frozen)} tensors of indexers (train.indexer_loss_coef is 0)"


class IndexerTraining:
    """The loss and the metric of the indexers of a run's model; nothing where the coefficient is 0.

    Args:
        coefficient: ``train.indexer_loss_coef`` of the recipe.
        context: the run.
        report: of patching the model.

    Raises:
        ToolkitError: for a coefficient above 0 where the model has no patched indexer, or the run trains none of their
            parameters.
    """

    def __init__(self, coefficient: float, context: RunContext, report: PatchReport) -> None:
        self.coefficient, self.context = coefficient, context
        self._shares = TokenShares(context)
        self._updates = 0
        self._loss = torch.zeros((), dtype=torch.float64, device=context.device)
        if coefficient:
            self._check(report)
            context.model.index_losses = IndexLosses()

    def _check(self, report: PatchReport) -> None:
        """Counts the model's indexers by a forward of one token."""
        with torch.enable_grad(), index_losses() as found:
            ragged_forward(self.context.model.model, RaggedBatch.from_sequences([[0]], device=self.context.device))
        if not found.layers:
            reasons = sorted({one.reason for one in report.skipped if one.role == "attention"})
            why = f" ({'; '.join(reasons)})" if reasons else ""
            raise ToolkitError(
                f"train.indexer_loss_coef must be 0 for a model without a patched indexer (sparse attention){why}, got "
                f"{self.coefficient}."
            )
        if not found.mean().requires_grad:
            raise ToolkitError(
                "train.indexer_loss_coef must be 0 for a run that trains no parameter of an indexer, got "
                f"{self.coefficient}; see model.trainable_parameters and model.lora.target_modules."
            )

    def begin(self, micros: Sequence[Any], rows: Callable[[Any], int]) -> None:
        """Before an update of ``micros``; ``rows`` gives the number of rows of each."""
        if self.coefficient:
            self._shares.begin(micros, rows)
            self._updates += 1

    def loss(self, index: int) -> Tensor | None:
        """The loss of the micro-batch that just ran, weighted for its backward; None without a coefficient."""
        if not self.coefficient:
            return None
        losses, self.context.model.index_losses = self.context.model.index_losses, IndexLosses()
        assert losses is not None
        loss = self._shares.of(index) * losses.mean()
        self._loss += loss.detach()
        return self.coefficient * loss

    def metrics(self) -> dict[str, float]:
        """Metrics of a step: the mean loss of its updates, in nats per token, without the coefficient."""
        if not self._updates:
            return {}
        (mean,) = self.context.reduce_sum([float(self._loss) / (self._updates * self.context.world_size)])
        self._loss.zero_()
        self._updates = 0
        return {"indexer_loss": mean}
