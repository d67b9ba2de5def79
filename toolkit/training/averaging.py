"""Exponential moving average of a run's weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toolkit.patching import weights_changed
from toolkit.training.strategies import Strategy

FILE = "ema.safetensors"


class AveragedWeights:
    """``average = decay average + (1 - decay) weight`` after every step, in float32 or wider.

    Args:
        model: whose trained parameters are averaged.
        decay: see above.
        strategy: how processes share the model.
    """

    def __init__(self, model: nn.Module, decay: float, strategy: Strategy) -> None:
        self._model, self._decay, self._strategy = model, decay, strategy
        self._parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._averages = {name: _float32(one) for name, one in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After a step."""
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name].detach().to(average.dtype), 1.0 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averages; afterwards, its weights again, bit for bit."""
        kept = {name: one.detach().clone() for name, one in self._parameters.items()}
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, one in self._parameters.items():
            one.copy_(values[name])
        weights_changed(self._model)

    def whole(self) -> dict[str, Tensor]:
        """The averages by name. Where they are sharded over processes, all of these must call it."""
        return {name: self._strategy.whole_of(self._parameters[name], one) for name, one in self._averages.items()}

    def load(self, folder: Path) -> None:
        """Continue with what ``save_averages`` wrote."""
        for name, value in load_file(str(folder / FILE)).items():
            own = self._averages[name]
            own.copy_(self._strategy.shard_like(self._parameters[name], value, own))


def save_averages(averages: dict[str, Tensor], folder: Path) -> None:
    """Write what ``AveragedWeights.whole`` gave to a folder."""
    save_file({name: one.cpu().contiguous() for name, one in averages.items()}, str(folder / FILE))


def _float32(parameter: Tensor) -> Tensor:
    """A copy."""
    values = parameter.detach()
    return values.float() if values.itemsize < 4 else values.clone()
