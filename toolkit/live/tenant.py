"""A tenant: one training client's adapter in the served model, its optimizer's state and its summed gradients.

What is here runs on the thread of ``LiveTraining`` alone, one call at a time; what writes the model or its adapters
runs on the engine's thread, between two steps.
"""

import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from toolkit.engine import Engine
from toolkit.errors import ToolkitError
from toolkit.live.adam import AdamParams, AdamState, adam_step
from toolkit.live.checkpoints import Saved
from toolkit.live.lora import LoraSettings, factors_in, new_factors, target_layers, write_adapter


@dataclass
class Tenant:
    """A training client.

    Args:
        name: its public id.
        base_model: name of the served model.
        settings: of its LoRA.

    Attributes:
        adapter: the engine's name of its adapter, for requests that sample the weights as they are now.
        parameters: its factors, by the names of a PEFT file; none before ``arrive``.
        optimizer: Adam's state.
        gradients: sums since the last step; None for none.
        loads: times that its weights were read from a checkpoint.
    """

    name: str
    base_model: str
    settings: LoraSettings
    adapter: str = field(default_factory=lambda: f"tenant-{uuid.uuid4().hex}")
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    optimizer: AdamState = field(default_factory=AdamState)
    gradients: dict[str, Tensor] | None = None
    loads: int = 0

    def check(self) -> None:
        """Raise ToolkitError unless its adapter is in the model."""
        if not self.parameters:
            raise ToolkitError(f"model_id must be a training client that was created, got {self.name}.")

    def arrive(self, engine: Engine, scratch: Path, saved: Saved | None = None) -> None:
        """Put its adapter into the model: a new one, or a saved one.

        Args:
            engine: of the model; its thread runs this.
            scratch: a folder to write to.
            saved: what it begins with.

        Raises:
            ToolkitError: the model has no such layers, or the saved factors are of others.
        """
        layers = target_layers(engine.backend.model, self.settings)  # type: ignore[attr-defined]
        factors = new_factors(layers, self.settings)
        folder = scratch / self.adapter
        folder.mkdir()
        try:
            write_adapter(folder, self.base_model, factors)
            engine.load_adapter(self.adapter, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.parameters = factors_in(engine.backend.model, self.adapter)  # type: ignore[attr-defined]
        if saved is not None:
            try:
                self.load(saved)
            except ToolkitError:
                self.leave(engine)
                raise

    def leave(self, engine: Engine) -> None:
        """Take its adapter out of the model; requests that sample it finish first."""
        if self.parameters:
            self.parameters = {}
            engine.unload_adapter(self.adapter)

    def add_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Add a request's gradients to those since the last step."""
        mine = self.gradients
        self.gradients = gradients if mine is None else {name: mine[name] + one for name, one in gradients.items()}

    def step(self, params: AdamParams) -> float:
        """Write a step of Adam by the summed gradients, which are then gone; their norm."""
        self.check()
        zeros = {name: torch.zeros_like(one) for name, one in self.parameters.items()}
        norm = adam_step(self.parameters, self.gradients or zeros, self.optimizer, params)
        self.gradients = None
        return norm

    def saved(self, optimizer: bool) -> Saved:
        """A copy of its weights, and of its optimizer's state where that is asked for."""
        self.check()
        factors = {name: one.detach().cpu().clone() for name, one in self.parameters.items()}
        state = None
        if optimizer:
            mean, square = (
                {name: one.cpu().clone() for name, one in each.items()}
                for each in (self.optimizer.mean, self.optimizer.square)
            )
            state = AdamState(self.optimizer.step, mean, square)
        return Saved(self.base_model, self.settings, factors, state)

    def load(self, saved: Saved) -> None:
        """Write saved weights over its own; summed gradients are gone, and Adam begins anew unless its state was saved.

        Raises:
            ToolkitError: the factors are of other layers or of another rank. Nothing is written then.
        """
        self.check()
        for name, mine in self.parameters.items():
            given = saved.factors.get(name)
            if given is None or given.shape != mine.shape or len(saved.factors) != len(self.parameters):
                raise ToolkitError(
                    f"path must be a checkpoint of the same layers and rank ({self.settings.rank}), got rank "
                    f"{saved.settings.rank} and {len(saved.factors)} factors in the place of {len(self.parameters)}."
                )
        with torch.no_grad():
            for name, mine in self.parameters.items():
                mine.copy_(saved.factors[name])
        self.optimizer = AdamState() if saved.optimizer is None else self._on_device(saved.optimizer)
        self.gradients = None
        self.loads += 1

    def _on_device(self, state: AdamState) -> AdamState:
        mean, square = (
            {name: one.to(self.parameters[name].device) for name, one in each.items()}
            for each in (state.mean, state.square)
        )
        return AdamState(state.step, mean, square)
