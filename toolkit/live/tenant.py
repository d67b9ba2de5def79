"""A tenant: one training client's adapter in the served model, its optimizer's state and its summed gradients.

One of rank 0 has no adapter: it trains the model's own weights, and is alone.

What is here runs on the thread of ``LiveTraining`` alone, one call at a time; what writes the model or its adapters
runs on the engine's thread, between two steps.
"""

import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.engine import Engine
from toolkit.errors import ToolkitError
from toolkit.live.adam import AdamParams, AdamState, adam_step
from toolkit.live.checkpoints import Saved
from toolkit.live.lora import LoraSettings, base_parameters, factors_in, new_factors, target_layers, write_adapter


@dataclass
class Tenant:
    """A training client.

    Args:
        name: its public id.
        base_model: name of the served model.
        settings: of its LoRA.

    Attributes:
        adapter: the engine's name of its adapter, for requests that sample the weights as they are now; None of rank 0.
        parameters: its factors, by the names of a PEFT file, or all weights; none before ``arrive``.
        optimizer: Adam's state.
        gradients: sums since the last step; None for none.
        version: another one after each write.
    """

    name: str
    base_model: str
    settings: LoraSettings
    adapter: str | None = field(init=False)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    optimizer: AdamState = field(default_factory=AdamState)
    gradients: dict[str, Tensor] | None = None
    version: str = field(default_factory=lambda: uuid.uuid4().hex)
    _original: dict[str, Tensor] = field(default_factory=dict)
    _config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.adapter = None if self.settings.full else f"tenant-{uuid.uuid4().hex}"

    def check(self) -> None:
        """Raise ToolkitError unless its adapter is in the model."""
        if not self.parameters:
            raise ToolkitError(f"model_id must be a training client that was created, got {self.name}.")

    def arrive(self, engine: Engine, scratch: Path, saved: Saved | None = None) -> None:
        """Put its adapter into the model, a new one or a saved one; or take the model's own weights.

        Args:
            engine: of the model; its thread runs this.
            scratch: a folder to write to.
            saved: what it begins with.

        Raises:
            ToolkitError: the model has no such layers, or the saved factors are of others.
        """
        model: Any = engine.backend.model  # type: ignore[attr-defined]
        if self.adapter is None:
            self.parameters, self._config = base_parameters(model), model.config.to_dict()
        else:
            layers = target_layers(model, self.settings)
            factors = new_factors(layers, self.settings)
            folder = scratch / self.adapter
            folder.mkdir()
            try:
                write_adapter(folder, self.base_model, factors)
                engine.load_adapter(self.adapter, folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            self.parameters = factors_in(model, self.adapter)
        if saved is not None:
            try:
                self.load(saved)
            except ToolkitError:
                self.leave(engine)
                raise

    def leave(self, engine: Engine) -> None:
        """Take its adapter out of the model, where requests that sample it finish first; or give the model its weights
        back, under which requests continue.
        """
        if self.parameters and self.adapter is not None:
            engine.unload_adapter(self.adapter)
        with torch.no_grad():
            for name, one in self._original.items():
                self.parameters[name].copy_(one)
        self.parameters, self._original = {}, {}

    def add_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Add a request's gradients to those since the last step."""
        mine = self.gradients
        self.gradients = gradients if mine is None else {name: mine[name] + one for name, one in gradients.items()}

    def step(self, params: AdamParams) -> float:
        """Write a step of Adam by the summed gradients, which are then gone; their norm."""
        self.check()
        self._begin_write()
        zeros = {name: torch.zeros_like(one) for name, one in self.parameters.items()}
        norm = adam_step(self.parameters, self.gradients or zeros, self.optimizer, params)
        self.gradients = None
        return norm

    def saved(self, optimizer: bool) -> Saved:
        """A copy of its weights, and of its optimizer's state where that is asked for."""
        self.check()
        factors = self._copy()
        state = None
        if optimizer:
            mean, square = (
                {name: one.cpu().clone() for name, one in each.items()}
                for each in (self.optimizer.mean, self.optimizer.square)
            )
            state = AdamState(self.optimizer.step, mean, square)
        return Saved(self.base_model, self.settings, factors, state, self._config)

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
        self._begin_write()
        with torch.no_grad():
            for name, mine in self.parameters.items():
                mine.copy_(saved.factors[name])
        self.optimizer = AdamState() if saved.optimizer is None else self._on_device(saved.optimizer)
        self.gradients = None

    def _copy(self) -> dict[str, Tensor]:
        return {name: one.detach().cpu().clone() for name, one in self.parameters.items()}

    def _begin_write(self) -> None:
        """What is written now is another version, and the model's own weights are kept before they are lost."""
        self.version = uuid.uuid4().hex
        if self.adapter is None and not self._original:
            self._original = self._copy()

    def _on_device(self, state: AdamState) -> AdamState:
        mean, square = (
            {name: one.to(self.parameters[name].device) for name, one in each.items()}
            for each in (state.mean, state.square)
        )
        return AdamState(state.step, mean, square)
