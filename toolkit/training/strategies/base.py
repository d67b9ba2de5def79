"""What a run needs of the way in which its processes share the model, and the way in which each has all of it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from toolkit.config import Recipe
from toolkit.errors import ToolkitError
from toolkit.moe.sharded_parameters import ShardedParameters
from toolkit.moe.sharding import expert_groups, leave_out_of_ddp, shard_experts
from toolkit.patching import expert_layers
from toolkit.quantised import quantised_weights
from toolkit.training.model import RaggedModel
from toolkit.training.optimizers import make_optimizer
from toolkit.training.precision import GradientStep, Masters
from toolkit.training.state import OptimizerState, load_optimizer, optimizer_state
from toolkit.training.strategies import shards


class Strategy:
    """Plain data parallel: each process has the whole model, of which experts may be sharded. Base of the others.

    Args:
        recipe: of the run.
        accelerator: of the run.

    Attributes:
        forward: what losses call; ``wrap`` sets it.
        ragged: the model inside of it.
        optimizer: has torch's as ``optimizer``.
        gradients: makes steps of losses.
    """

    forward: nn.Module
    ragged: RaggedModel
    optimizer: Any
    gradients: GradientStep

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self._sharded: ShardedParameters | None = None
        self._inside = False

    def wrap(self, ragged: RaggedModel, masters: Masters | None) -> None:
        """Share a patched model with the other processes, and make its optimizer.

        Args:
            masters: float32 values of parameters that were rounded; those of parameters that are sharded become shards.
        """
        self._shard_experts(ragged, masters)
        # Data parallel would write quantised weights in place. All processes have made the same codes; gradients of
        # those that are trained are averaged by the step.
        leave_out_of_ddp(ragged, [name for name, _ in quantised_weights(ragged)])
        optimizer = make_optimizer(ragged, self.recipe.optimizer, masters, self.recipe.seed)
        self.forward, self.optimizer = self.accelerator.prepare(ragged, optimizer)
        self.ragged = self.accelerator.unwrap_model(self.forward)
        self.gradients = GradientStep(
            self.accelerator,
            self.forward,
            self.optimizer,
            self._sharded,
            self.recipe.optimizer,
            self.recipe.train.mixed_precision == "fp16",
        )

    def _shard_experts(self, ragged: RaggedModel, masters: Masters | None) -> None:
        section = self.recipe.train.expert_parallel
        if section is None:
            return
        group, replicas = expert_groups(section.size)
        layers = expert_layers(ragged)
        self._sharded = shard_experts(ragged, layers, group, chunks=section.chunks, replicas=replicas)
        self._shard_masters(masters)

    def _shard_masters(self, masters: Masters | None) -> None:
        assert self._sharded is not None
        for parameter in self._sharded.parameters.values():
            if masters is not None and parameter in masters:
                masters[parameter] = self._sharded.shard(parameter, masters[parameter])

    def whole_of(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """The whole of what has a parameter's layout. Where that is sharded, all processes must call this."""
        if self._sharded is not None and self._sharded.holds(parameter):
            return self._sharded.gather(parameter, value)
        return shards.whole_of(value)

    def shard_like(self, parameter: nn.Parameter, whole: Tensor, like: Tensor) -> Tensor:
        """What this process keeps of the whole of ``like``, which has a parameter's layout; a copy."""
        if self._sharded is not None and self._sharded.holds(parameter):
            return self._sharded.shard(parameter, whole).to(like.device)
        return shards.shard_like(whole, like)

    def inference(self) -> AbstractContextManager[None]:
        """Inside, every process computes with the whole model: for rollouts and evaluation. Otherwise as ``whole``."""
        return self.whole()

    def whole(self) -> AbstractContextManager[None]:
        """Inside, every process has the whole model, as after an optimizer step: for saving and export.

        All processes must enter it; inside, they need not do the same. Writes to parameters inside are lost where they
        are sharded. Within another one it does nothing.
        """
        return nullcontext() if self._inside else self._entered()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self._inside = True
        try:
            with self._gathered():
                yield
        finally:
            self._inside = False

    def _gathered(self) -> AbstractContextManager[None]:
        """``whole``, which is not entered yet."""
        return nullcontext() if self._sharded is None else self._sharded.gathered()

    def rewritten(self) -> AbstractContextManager[None]:
        """As ``whole``, but what is written to parameters inside, by every process the same, stays."""
        return nullcontext()

    @contextmanager
    def saving(self) -> Iterator[OptimizerState | None]:
        """As ``whole``; gives the main process the whole state of the optimizer, and the others None."""
        optimizer = self.optimizer.optimizer
        with nullcontext() if self._sharded is None else self._sharded.gathered(optimizer):
            yield optimizer_state(optimizer, self.ragged.model) if self.accelerator.is_main_process else None

    def load_optimizer(self, path: Path, groups: list[dict[str, Any]]) -> None:
        """Continue with the state that ``saving`` gave, of the same parameters."""
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        load_optimizer(optimizer, self.ragged.model, path, groups)
        if self._sharded is not None:
            self._sharded.shard_optimizer(optimizer)

    def _upcast(self, masters: Masters | None) -> Masters:
        """Give trained parameters the float32 values that they are the rounding of, for a framework that rounds them.

        Raises:
            ToolkitError: a parameter that would be rounded although the model keeps it in float32.
        """
        values = dict(masters or {})
        for name, parameter in self.ragged.model.named_parameters() if masters is not None else ():
            if parameter.dtype == torch.float32:
                raise ToolkitError(
                    f"train.mixed_precision must be 'no' with train.distributed "
                    f"'{self.recipe.train.distributed.strategy}' for {type(self.ragged.model).__name__}, which keeps "
                    f"{name} in float32, got 'bf16'."
                )
            if parameter.requires_grad:  # one of a checkpoint gets its value with the optimizer's state
                parameter.data = values.setdefault(parameter, parameter.data.float())
        return values
