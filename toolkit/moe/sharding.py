"""Experts of a model shared out to ranks in place: parameters keep name and identity and hold this rank's part.

W ranks of an expert-parallel group, D ranks that train together (data parallel); D / W groups hold the same experts.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from toolkit.errors import ToolkitError
from toolkit.moe.exchange import ExpertParallel

ATTRIBUTE = "expert_parallel"
"""Of a module of experts: the ``ExpertParallel`` that carries its tokens."""


def group_size(size: int | None = None) -> int:
    """``size``, or all ranks where it is None; ToolkitError unless it divides their number."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    size = world if size is None else size
    if size < 1 or world % size:
        raise ToolkitError(f"expert parallelism over {size} ranks cannot share out {world} processes evenly.")
    return size


def expert_groups(size: int | None = None) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """(the group of ``size`` consecutive ranks that this one belongs to, the group of those that hold its experts too).

    None for a group of one. All ranks must call it. ``size`` None takes all ranks. The groups are new: nothing else may
    run on them, so that what the ranks do stays in one order.
    Raises ToolkitError unless ``size`` divides the number of ranks.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    size = group_size(size)
    mine: list[dist.ProcessGroup | None] = [None, None]
    together = [list(range(first, first + size)) for first in range(0, world, size)]
    alike = [list(range(first, world, size)) for first in range(size)]
    for place, groups in enumerate((together, alike)):
        for ranks in groups if len(groups[0]) > 1 else []:
            group = dist.new_group(ranks)
            if rank in ranks:
                mine[place] = group
    return mine[0], mine[1]


class ShardedExperts:
    """Parameters of experts that hold this rank's part: their gradients, their norm, and their full layout.

    A gradient of such a parameter is the mean over the D ranks' losses, as data parallel makes those of all others:
    what the exchange adds up over a group is divided by D, and ``reduce`` adds the groups up.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        modules: Sequence[nn.Module],
        parallel: ExpertParallel,
        replicas: dist.ProcessGroup | None,
        average: bool,
    ) -> None:
        self.parameters, self.parallel, self._replicas = dict(parameters), parallel, replicas
        self._modules = modules
        copies = 1 if replicas is None else dist.get_world_size(replicas)
        share = 1.0 / (parallel.size * copies)
        for parameter in self.parameters.values() if average else ():
            parameter.register_hook(lambda grad: grad * share)
        self._attach()

    def _attach(self) -> None:
        for module in self._modules:
            setattr(module, ATTRIBUTE, self.parallel)

    def reduce(self) -> None:
        """Add the gradients up over the ranks that hold the same experts; once, before an optimizer step."""
        if self._replicas is not None:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=self._replicas)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float = math.inf) -> Tensor:
        """Scale the gradients of all parameters so that their norm is ``limit`` at most; the norm before that.

        The squares of experts are added up over the group, those of other parameters, which all ranks have alike, are
        not. Added in float64: the norm does not show how many ranks there are. All ranks of the group must call it.
        """
        known = {id(parameter) for parameter in self.parameters.values()}
        grads = [(id(p) in known, p.grad) for p in parameters if p.grad is not None]
        device = self.device()
        sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(2)]
        for shared_out, grad in grads:
            sums[shared_out] += torch.linalg.vector_norm(grad, dtype=torch.float64).square()
        norm = (sums[0] + self.parallel.transport.gather(sums[1]).sum(0)).sqrt().float()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for _, grad in grads:
            grad.mul_(factor.to(grad.dtype))
        return norm

    def device(self) -> torch.device:
        """Where the experts are."""
        return next(iter(self.parameters.values())).device

    def whole(self, part: Tensor) -> Tensor:
        """[E, ...] of every rank's part [E / W, ...]; all ranks of the group must call it."""
        return self.parallel.transport.gather(part.detach()).flatten(0, 1)

    def part(self, whole: Tensor) -> Tensor:
        """A copy of this rank's part of [E, ...]."""
        return whole[self.parallel.owned(len(whole))].clone()

    @contextmanager
    def gathered(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        """Inside of the block the model is whole and this rank's own, as it was before: for saving, export, evaluation.

        So is the state of ``optimizer``. All ranks of the group must enter it; inside, they need not do the same. Each
        needs the memory for it. What is written to the parameters inside is lost.
        """
        parts = [(parameter, parameter.data) for parameter in self.parameters.values()]
        known = {} if optimizer is None else optimizer.state
        states = [(known[parameter], dict(known[parameter])) for parameter, _ in parts if parameter in known]
        try:
            for parameter, part in parts:
                parameter.data = self.whole(part)
            for state, before in states:
                state.update({key: self.whole(value) for key, value in before.items() if value.dim()})
            for module in self._modules:
                delattr(module, ATTRIBUTE)
            yield
        finally:
            for parameter, part in parts:
                parameter.data = part
            for state, before in states:
                state.update(before)
            self._attach()

    def take_part(self, optimizer: torch.optim.Optimizer) -> None:
        """Cut this rank's part out of an optimizer's state in the full layout, as ``gathered`` gave it."""
        for parameter in self.parameters.values():
            state = optimizer.state[parameter]
            for key, value in state.items():
                if value.dim():
                    state[key] = self.part(value)


def shard_experts(
    model: nn.Module,
    layers: Mapping[nn.Module, Sequence[str]],
    group: dist.ProcessGroup | None = None,
    *,
    chunks: int = 2,
    replicas: dist.ProcessGroup | None = None,
    parallel: ExpertParallel | None = None,
    average: bool = True,
) -> ShardedExperts:
    """Share the experts of ``model`` out to the ranks of ``group``, in place.

    model: as data parallel will wrap it, which then leaves the experts' gradients alone. layers: its modules of experts
    and the names of their parameters [E, ...] (``toolkit.patching.expert_layers``). They keep their names and
    hold this rank's part afterwards; what they compute goes through the exchange. All ranks must start with equal ones.
    group, replicas: of ``expert_groups``. chunks: see ``ExpertParallel``; ``parallel`` takes the place of both.
    average: divide the experts' gradients by the number of data-parallel ranks, unless a host does that itself.
    Raises ToolkitError for a model without such layers, and for experts that the ranks do not divide.
    """
    if not layers:
        raise ToolkitError(f"{type(model).__name__} has no patched layer of experts; expert parallelism needs one.")
    parallel = parallel if parallel is not None else ExpertParallel(group, chunks)
    of_layer = {id(module): names for module, names in layers.items()}
    sharded: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name in of_layer.get(id(module), ()):
            parameter = getattr(module, name)
            parameter.data = parameter.data[parallel.owned(len(parameter))].clone()
            sharded[f"{path}.{name}" if path else name] = parameter
    ignored = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *sharded]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return ShardedExperts(sharded, list(layers), parallel, replicas, average)


def gather_state_dict(model: nn.Module, sharded: ShardedExperts) -> dict[str, Tensor]:
    """``model.state_dict()`` in the full layout, copied to the host. All ranks of the group must call it."""
    with sharded.gathered():
        return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
