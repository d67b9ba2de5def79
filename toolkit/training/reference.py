"""A copy of the initial model, beside the one in training, that losses compare with."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from toolkit.config.objective import SyncedReferenceSection
from toolkit.config.schema import ModelSection
from toolkit.patching import patch, ragged_forward, sequence_readings, weights_changed
from toolkit.state.batch import RaggedBatch
from toolkit.training.readings import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toolkit.training.objectives.base import RunContext


class Reference:
    """A frozen model beside the one in training: without gradients, never in training mode."""

    def __init__(self, model: "PreTrainedModel", section: ModelSection, device: torch.device) -> None:
        model.requires_grad_(False).to(device).eval()  # type: ignore[arg-type]
        patch(model, section.roles, section.numerics, section.kv_cache_dtype)
        self.model = model

    @torch.no_grad()
    def logprobs(
        self,
        sequences: list[list[int]],
        last: list[int],
        rotary_lengths: list[int | None] | None = None,
        temperature: float = 1.0,
    ) -> list[Tensor]:
        """Log-probabilities of the last ``last[i]`` tokens of each sequence, without gradients.

        Args:
            temperature: by which logits are divided.
        """
        read = Reading(temperature)
        return sequence_readings(self.model, sequences, read, last=last, rotary_lengths=rotary_lengths)[0]

    @torch.no_grad()
    def logits(self, batch: RaggedBatch, rows: Tensor) -> Tensor:
        """Logits [len(rows), V] of those rows."""
        return ragged_forward(self.model, batch, rows)

    @torch.no_grad()
    def move_towards(self, model: nn.Module, alpha: float) -> None:
        """``weight = alpha weight of model + (1 - alpha) weight``: TR-DPO (Gorbatovski et al., 2024).

        Args:
            model: with parameters of the same names.
            alpha: above 0, at most 1.
        """
        own = dict(self.model.named_parameters())
        for name, value in model.named_parameters():
            own[name].mul_(1.0 - alpha).add_(value.detach().to(own[name]), alpha=alpha)
        weights_changed(self.model)


class ReferenceSync:
    """Moves a reference towards the model in training, as ``sync_ref_model`` of a recipe says.

    Its weights then are part of a checkpoint.
    """

    def __init__(self, section: SyncedReferenceSection, reference: Reference, context: "RunContext") -> None:
        self._section, self._reference, self._context = section, reference, context

    def stepped(self, step: int) -> None:
        """After step ``step``, counted from 1; all processes must call it."""
        if step % self._section.ref_model_sync_steps == 0:
            with self._context.whole():
                self._reference.move_towards(self._context.model.model, self._section.ref_model_mixup_alpha)

    def tensors(self) -> dict[str, Tensor]:
        """The reference's weights by name."""
        return {name: one.detach() for name, one in self._reference.model.named_parameters()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue with what ``tensors`` gave."""
        for name, one in self._reference.model.named_parameters():
            one.copy_(tensors[name])
        weights_changed(self._reference.model)
