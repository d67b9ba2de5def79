"""Experts of a model sharded over ranks in place: parameters keep name and identity and hold this rank's shard.

W ranks of an expert-parallel group, D data-parallel ranks; D / W groups hold the same experts.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from toolkit.errors import ToolkitError
from toolkit.moe.dispatchers import ExpertParallelDispatcher

DISPATCHER = "moe_dispatcher"
"""The attribute of a module of experts that holds its ``Dispatcher``; without it experts are local."""


def group_size(size: int | None = None) -> int:
    """``size``, or the number of ranks where it is None; ToolkitError unless it divides that."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    size = world if size is None else size
    if size < 1 or world % size:
        raise ToolkitError(f"The size of expert parallelism must be >= 1 and divide the {world} processes, got {size}.")
    return size


def expert_groups(size: int | None = None) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """(this rank's expert-parallel group of ``size`` consecutive ranks, the group of ranks that hold the same experts).

    None for a group of one. All ranks must call it. The groups are new: nothing else may run on them, so that all ranks
    make the same calls in the same order.

    Args:
        size: ranks that a layer's experts are sharded over; None for all.

    Raises:
        ToolkitError: unless ``size`` divides the number of ranks.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    size = group_size(size)
    mine: list[dist.ProcessGroup | None] = [None, None]
    together = [list(range(first, first + size)) for first in range(0, world, size)]
    replicas = [list(range(first, world, size)) for first in range(size)]
    for index, groups in enumerate((together, replicas)):
        for ranks in groups if len(groups[0]) > 1 else []:
            group = dist.new_group(ranks)
            if rank in ranks:
                mine[index] = group
    return mine[0], mine[1]


class ShardedExperts:
    """Parameters of experts that hold this rank's shard: their gradients, their norm, and their full layout.

    A gradient of such a parameter is the mean over the D ranks' losses, as data parallel makes those of all others: the
    sum over a group that the backward gives is divided by D, and ``reduce`` adds up the groups.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        modules: Sequence[nn.Module],
        dispatcher: ExpertParallelDispatcher,
        replicas: dist.ProcessGroup | None,
        average: bool,
    ) -> None:
        self.parameters, self.dispatcher, self._replicas = dict(parameters), dispatcher, replicas
        self._modules = modules
        copies = 1 if replicas is None else dist.get_world_size(replicas)
        share = 1.0 / (dispatcher.size * copies)
        for parameter in self.parameters.values() if average else ():
            parameter.register_hook(lambda grad: grad * share)
        self._attach()

    def _attach(self) -> None:
        for module in self._modules:
            setattr(module, DISPATCHER, self.dispatcher)

    def reduce(self) -> None:
        """All-reduces the gradients over the ranks that hold the same experts; once, before an optimizer step."""
        if self._replicas is not None:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=self._replicas)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float = math.inf) -> Tensor:
        """The norm of all gradients, which are then scaled so that it is ``limit`` at most.

        The squares of experts are summed over the group; those of other parameters, equal on all ranks, are not. Summed
        in float64, so that the norm does not depend on the number of ranks. All ranks of the group must call it.
        """
        known = {id(parameter) for parameter in self.parameters.values()}
        grads = [(id(p) in known, p.grad) for p in parameters if p.grad is not None]
        device = self.device()
        sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(2)]
        for sharded, grad in grads:
            sums[sharded] += torch.linalg.vector_norm(grad, dtype=torch.float64).square()
        norm = (sums[0] + self.dispatcher.transport.gather(sums[1]).sum(0)).sqrt().float()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for _, grad in grads:
            grad.mul_(factor.to(grad.dtype))
        return norm

    def device(self) -> torch.device:
        """The device of the experts."""
        return next(iter(self.parameters.values())).device

    def gather(self, shard: Tensor) -> Tensor:
        """[E, ...] of every rank's shard [E / W, ...]; all ranks of the group must call it."""
        return self.dispatcher.transport.gather(shard.detach()).flatten(0, 1)

    def shard(self, full: Tensor) -> Tensor:
        """A copy of this rank's shard of [E, ...]."""
        return full[self.dispatcher.owned(len(full))].clone()

    @contextmanager
    def gathered(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        """Inside the block every rank has all experts, as before sharding: for saving, export, evaluation.

        So has the state of ``optimizer``. All ranks of the group must enter it; inside, they need not do the same. Each
        needs the memory for it. Writes to the parameters inside are lost.
        """
        shards = [(parameter, parameter.data) for parameter in self.parameters.values()]
        known = {} if optimizer is None else optimizer.state
        states = [(known[parameter], dict(known[parameter])) for parameter, _ in shards if parameter in known]
        try:
            for parameter, shard in shards:
                parameter.data = self.gather(shard)
            for state, before in states:
                state.update({key: self.gather(value) for key, value in before.items() if value.dim()})
            for module in self._modules:
                delattr(module, DISPATCHER)
            yield
        finally:
            for parameter, shard in shards:
                parameter.data = shard
            for state, before in states:
                state.update(before)
            self._attach()

    def shard_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Replaces an optimizer's state in the full layout, as ``gathered`` gave it, by this rank's shard."""
        for parameter in self.parameters.values():
            state = optimizer.state[parameter]
            for key, value in state.items():
                if value.dim():
                    state[key] = self.shard(value)


def shard_experts(
    model: nn.Module,
    layers: Mapping[nn.Module, Sequence[str]],
    group: dist.ProcessGroup | None = None,
    *,
    chunks: int = 2,
    replicas: dist.ProcessGroup | None = None,
    dispatcher: ExpertParallelDispatcher | None = None,
    average: bool = True,
) -> ShardedExperts:
    """Shards the experts of ``model`` over the ranks of ``group``, in place. All ranks must hold equal parameters.

    Args:
        model: as data parallel will wrap it, which then skips the experts' gradients.
        layers: its modules of experts and the names of their parameters [E, ...] (``toolkit.patching.expert_layers``),
            which hold this rank's shard afterwards under the same names.
        group, replicas: of ``expert_groups``.
        chunks: of ``ExpertParallelDispatcher``.
        dispatcher: replaces group and chunks.
        average: divide the experts' gradients by the number of data-parallel ranks, unless the framework does that.

    Raises:
        ToolkitError: for a model without such layers, and for experts that the ranks do not divide.
    """
    if not layers:
        raise ToolkitError(f"{type(model).__name__} has no patched MoE layer; expert parallelism needs one.")
    dispatcher = dispatcher if dispatcher is not None else ExpertParallelDispatcher(group, chunks)
    of_layer = {id(module): names for module, names in layers.items()}
    sharded: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name in of_layer.get(id(module), ()):
            parameter = getattr(module, name)
            parameter.data = parameter.data[dispatcher.owned(len(parameter))].clone()
            sharded[f"{path}.{name}" if path else name] = parameter
    ignored = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *sharded]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return ShardedExperts(sharded, list(layers), dispatcher, replicas, average)


def gather_state_dict(model: nn.Module, sharded: ShardedExperts) -> dict[str, Tensor]:
    """``model.state_dict()`` in the full layout, copied to CPU. All ranks of the group must call it."""
    with sharded.gathered():
        return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
