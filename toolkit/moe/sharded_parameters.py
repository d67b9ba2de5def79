"""Parameters of which this rank holds a shard, under the names and identities that they had: what training needs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ShardedParameters(ABC):
    """Parameters sharded in place over a group: the norm of their gradients, and their full layout.

    Args:
        parameters: that hold this rank's shard, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)

    def holds(self, parameter: Tensor) -> bool:
        """Whether a parameter is one of these."""
        return any(one is parameter for one in self.parameters.values())

    @abstractmethod
    def gather(self, parameter: nn.Parameter, shard: Tensor) -> Tensor:
        """The full layout of a parameter's shards, or of what has its layout; all ranks of the group must call it."""

    @abstractmethod
    def shard(self, parameter: nn.Parameter, full: Tensor) -> Tensor:
        """A copy of this rank's shard of the full layout."""

    @abstractmethod
    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks of the group, in their order; all must call it."""

    @abstractmethod
    def attach(self) -> None:
        """Let the model's forward compute with shards."""

    @abstractmethod
    def detach(self) -> None:
        """Let the model's forward compute with whole parameters."""

    @abstractmethod
    def reduce(self) -> None:
        """All-reduces gradients over ranks that hold the same shards; once, before an optimizer step."""

    def clip(self, parameters: Iterable[nn.Parameter], limit: float = math.inf) -> Tensor:
        """The norm of all gradients, which are then scaled so that it is ``limit`` at most.

        The squares of sharded parameters are summed over the group; those of other parameters, equal on all ranks, are
        not. Summed in float64, so that the norm does not depend on the number of ranks. All ranks of the group must
        call it.
        """
        known = {id(parameter) for parameter in self.parameters.values()}
        grads = [(id(p) in known, p.grad) for p in parameters if p.grad is not None]
        device = self.device()
        sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(2)]
        for sharded, grad in grads:
            sums[sharded] += torch.linalg.vector_norm(grad, dtype=torch.float64).square()
        norm = (sums[0] + self.sum(sums[1])).sqrt().float()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for _, grad in grads:
            grad.mul_(factor.to(grad.dtype))
        return norm

    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.parameters.values())).device

    @contextmanager
    def gathered(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        """Inside the block every rank has all parameters, as before sharding: for saving, export, evaluation.

        So has the state of ``optimizer``. All ranks of the group must enter it; inside, they need not do the same. Each
        needs the memory for it. Writes to the parameters inside are lost.
        """
        shards = [(parameter, parameter.data) for parameter in self.parameters.values()]
        known = {} if optimizer is None else optimizer.state
        states = [
            (parameter, known[parameter], dict(known[parameter])) for parameter, _ in shards if parameter in known
        ]
        try:
            for parameter, shard in shards:
                parameter.data = self.gather(parameter, shard.detach())
            for parameter, state, before in states:
                state.update({key: self.gather(parameter, value) for key, value in before.items() if value.dim()})
            self.detach()
            yield
        finally:
            for parameter, shard in shards:
                parameter.data = shard
            for _, state, before in states:
                state.update(before)
            self.attach()

    def shard_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Replaces an optimizer's state in the full layout, as ``gathered`` gave it, by this rank's shard."""
        for parameter in self.parameters.values():
            state = optimizer.state.get(parameter, {})  # a frozen parameter has none
            for key, value in state.items():
                if value.dim():
                    state[key] = self.shard(parameter, value)


def gather_state_dict(model: nn.Module, sharded: ShardedParameters) -> dict[str, Tensor]:
    """``model.state_dict()`` in the full layout, copied to CPU. All ranks of the group must call it."""
    with sharded.gathered():
        return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
