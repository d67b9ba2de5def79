"""Tensor parallel: all processes train on the same examples, each with its rows of most matrices."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace

import torch

from toolkit.errors import ToolkitError
from toolkit.patching.tensor_parallel import TensorParallel, tensor_parallel
from toolkit.training.model import RaggedModel
from toolkit.training.optimizers import make_optimizer
from toolkit.training.precision import GradientStep, Masters
from toolkit.training.strategies.base import Strategy


class SplitModel(Strategy):
    """The model split by ``toolkit.tensor_parallel``: losses, rollouts and evaluation compute with the shards.

    Gradients are equal on all processes where a parameter is whole, and of the shard where it is not, so nothing is
    averaged; the optimizer updates what this process holds.
    """

    def wrap(self, ragged: RaggedModel, masters: Masters | None) -> None:
        self.forward = self.ragged = ragged
        ragged.to(self.accelerator.device)
        try:
            self._parallel: TensorParallel = tensor_parallel(ragged.model)
        except ToolkitError as error:
            raise ToolkitError(f"train.distributed 'tp' is not for this model: {error}") from None
        self._sharded = self._parallel
        self._shard_masters(masters)
        optimizer = make_optimizer(ragged, self.recipe.optimizer, masters, self.recipe.seed)
        self.optimizer = SimpleNamespace(optimizer=optimizer, step=optimizer.step, zero_grad=optimizer.zero_grad)
        self.gradients = SplitStep(
            self.accelerator,
            ragged,
            self.optimizer,
            self._parallel,
            self.recipe.optimizer,
            self.recipe.train.mixed_precision == "fp16",
        )

    def inference(self) -> AbstractContextManager[None]:
        """Nothing: all processes have the same data, so each of them computes with its shard."""
        return nullcontext()

    @contextmanager
    def rewritten(self) -> Iterator[None]:
        parameters = self._parallel.parameters.values()
        with self.whole():
            yield
            written = [self._parallel.shard(parameter, parameter.detach()) for parameter in parameters]
        with torch.no_grad():
            for parameter, shard in zip(parameters, written):
                parameter.copy_(shard)


class SplitStep(GradientStep):
    """Gradients are whole when a backward ends."""

    averages = False

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()
