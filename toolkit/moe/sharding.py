"""Experts of a model sharded over ranks in place: parameters keep name and identity and hold this rank's shard.

W ranks of an expert-parallel group, D data-parallel ranks; D / W groups hold the same experts.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from toolkit.errors import ToolkitError
from toolkit.moe.dispatchers import ExpertParallelDispatcher
from toolkit.moe.sharded_parameters import ShardedParameters

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


class ShardedExperts(ShardedParameters):
    """Parameters of experts that hold this rank's shard.

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
        super().__init__(parameters)
        self.dispatcher, self._replicas, self._modules = dispatcher, replicas, modules
        copies = 1 if replicas is None else dist.get_world_size(replicas)
        share = 1.0 / (dispatcher.size * copies)
        for parameter in self.parameters.values() if average else ():
            parameter.register_hook(lambda grad: grad * share)
        self.attach()

    def attach(self) -> None:
        for module in self._modules:
            setattr(module, DISPATCHER, self.dispatcher)

    def detach(self) -> None:
        for module in self._modules:
            delattr(module, DISPATCHER)

    def reduce(self) -> None:
        if self._replicas is not None:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=self._replicas)

    def sum(self, value: Tensor) -> Tensor:
        return self.dispatcher.transport.gather(value).sum(0)

    def gather(self, parameter: nn.Parameter, shard: Tensor) -> Tensor:
        """[E, ...] of every rank's shard [E / W, ...]."""
        return self.dispatcher.transport.gather(shard.detach()).flatten(0, 1)

    def shard(self, parameter: nn.Parameter, full: Tensor) -> Tensor:
        """A copy of this rank's shard of [E, ...]."""
        return full[self.dispatcher.owned(len(full))].clone()


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
    leave_out_of_ddp(model, sharded)
    return ShardedExperts(sharded, list(layers), dispatcher, replicas, average)


def leave_out_of_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Let data parallel neither write these parameters nor average their gradients, beside those left out before.

    Args:
        model: that will be wrapped.
        names: of its parameters.
    """
    ignored = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
