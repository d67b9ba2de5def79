"""Tensor parallel: a patched model split over ranks in place, by transformers' plan of it."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import ToolkitError, first_line
from toolkit.modules.linear import autocast_linear
from toolkit.modules.tensor_parallel import (
    column_forward,
    gathered_row_forward,
    group_of_model,
    reduced_row_forward,
    shared_column_forward,
)
from toolkit.moe.dispatchers import ReplicatedTokensDispatcher
from toolkit.moe.sharded_parameters import ShardedParameters
from toolkit.moe.sharding import DISPATCHER
from toolkit.numerics import Numerics
from toolkit.ops.collectives import gather_from_ranks, gather_objects, reduce_from_ranks, share
from toolkit.patching.adapters import inner_model, without_adapters
from toolkit.patching.attached import attach, attached, detach
from toolkit.patching.claim import Undo, replace_forward, undo_all
from toolkit.patching.instance_forward import InstalledForwards
from toolkit.patching.record import put_record, record_of
from toolkit.patching.sharding import check_unsharded, check_unsplit
from toolkit.patching.tensor_parallel.check import check_equal, difference, look
from toolkit.patching.tensor_parallel.plan import COLUMN, Plan, check_adapters, plan_of
from toolkit.whole_shapes import ATTRIBUTE

__all__ = ["TensorParallel", "group_of_model", "parallel_of", "tensor_parallel"]


class _Split(NamedTuple):
    """The dimension of a parameter that is split, and its size over all ranks."""

    dim: int
    width: int


class TensorParallel(ShardedParameters):
    """A model that is split over the ranks of a group: see ``tensor_parallel``."""

    def __init__(self, model: nn.Module, ranks: dist.ProcessGroup, plan: Plan, bitwise: bool) -> None:
        self._model, self.ranks, self._plan, self._bitwise = weakref.ref(model), ranks, plan, bitwise
        self.rank, self.size = dist.get_rank(ranks), dist.get_world_size(ranks)
        self._dispatcher = ReplicatedTokensDispatcher(ranks)
        self._undo: tuple[Undo, ...] = ()
        with without_adapters(model):
            self._resolve(model)
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        self._splits: dict[int, _Split] = {}
        parameters: dict[str, nn.Parameter] = {}
        for parameter, dim in self._split_parameters():
            self._splits[id(parameter)] = _Split(dim, parameter.shape[dim])
            parameters[named[id(parameter)]] = parameter
        super().__init__(parameters)
        self.whole = [p for p in model.parameters() if id(p) not in self._splits]
        self._hooks: list[Any] = []

    def _resolve(self, model: nn.Module) -> None:
        """Find the modules of the plan: adapters that come later change their paths."""
        plan = self._plan
        self._linear: list[tuple[Any, str]] = [(model.get_submodule(path), how) for path, how in plan.linear.items()]
        self._head: Any = model.get_submodule(plan.head) if plan.head else None
        self._summed = [model.get_submodule(path) for path in plan.summed]

    def _split_parameters(self) -> list[tuple[nn.Parameter, int]]:
        found: list[tuple[nn.Parameter, int]] = []
        for linear, style in self._linear:
            by_rows = style in COLUMN or self._bitwise
            found.append((linear.weight, 0 if by_rows else 1))
            if linear.bias is not None and by_rows:
                found.append((linear.bias, 0))
        if self._head is not None and not self._plan.shared_head:
            found += [(one, 0) for one in (self._head.weight, self._head.bias) if one is not None]
        for module, names in self._plan.experts.items():
            found += [(getattr(module, name), 0) for name in names]
        return found

    def apply(self) -> None:
        """Keep this rank's shard of every parameter that is split, and compute with those."""
        for parameter in self.parameters.values():
            parameter.data = self.shard(parameter, parameter.data)
        for module in self._summed:
            for parameter in module.parameters():
                needed = parameter.requires_grad
                parameter.requires_grad_(True)  # no hook is taken otherwise
                self._hooks.append(parameter.register_hook(partial(_sum_over, self.ranks.group_name)))
                parameter.requires_grad_(needed)
        self.attach()

    def undo(self) -> None:
        """Give every rank the whole model back."""
        for parameter in self.parameters.values():
            parameter.data = self.gather(parameter, parameter.detach())
        while self._hooks:
            self._hooks.pop().remove()
        self.detach()

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Write whole weights, as ``gather_state_dict`` gives them, into what this rank holds of them.

        Raises:
            ToolkitError: for a name that the model does not have, or another shape; nothing is written then.
        """
        model: Any = self._model()
        with without_adapters(model):
            own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        for name, value in weights.items():
            if name not in own:
                raise ToolkitError(f"weights must have tensors of {type(model).__name__} only, got {name}.")
            if list(value.shape) != self.whole_shape(own[name]):
                shape = self.whole_shape(own[name])
                raise ToolkitError(f"{name} must have the shape {shape}, got {list(value.shape)}.")
        with torch.no_grad():
            for name, value in weights.items():
                there = own[name]
                there.copy_(self.shard(there, value) if id(there) in self._splits else value)

    def whole_shape(self, parameter: Tensor) -> list[int]:
        """The shape of a parameter over all ranks."""
        shape = list(parameter.shape)
        if id(parameter) in self._splits:
            dim, width = self._splits[id(parameter)]
            shape[dim] = width
        return shape

    def attach(self) -> None:
        model: Any = self._model()
        linear = autocast_linear if self._bitwise else F.linear
        group = self.ranks.group_name
        undo: list[Undo] = []
        for layer, style in self._linear:
            undo.append(replace_forward(layer, self._forward(style, linear, group))())
        if self._head is not None:
            made = shared_column_forward(linear, group) if self._plan.shared_head else None
            undo.append(replace_forward(self._head, made or column_forward(linear, group, gather_output=True))())
        for module in self._plan.experts:
            setattr(module, DISPATCHER, self._dispatcher)
        model.__dict__[_SAVE] = partial(_refuse_to_save, type(model).__name__)
        with without_adapters(model):
            own = list(model.named_parameters(remove_duplicate=False))
        model.__dict__[ATTRIBUTE] = {name: self.whole_shape(parameter) for name, parameter in own}
        attach(model, _PARALLEL, self)
        self._undo = tuple(undo)
        self._note_forwards(model)

    def _forward(self, style: str, linear: Callable[..., Tensor], group: str) -> Callable[..., Tensor]:
        if style in COLUMN:
            return column_forward(linear, group, gather_output=style != "colwise")
        row = gathered_row_forward if self._bitwise else reduced_row_forward
        return row(linear, group, split_input=style == "rowwise")

    def detach(self) -> None:
        undo_all(self._undo)
        self._undo = ()
        model: Any = self._model()
        for module in self._plan.experts:
            delattr(module, DISPATCHER)
        model.__dict__.pop(_SAVE, None)
        del model.__dict__[ATTRIBUTE]
        detach(model, _PARALLEL)
        self._note_forwards(model)

    @staticmethod
    def _note_forwards(model: nn.Module) -> None:
        """Let the patch's record have the forwards that are there now."""
        record = record_of(model)
        assert record is not None
        assert record.report is not None
        put_record(model, replace(record, forwards=InstalledForwards.of(record.report.claims)))

    def reduce(self) -> None:
        """Nothing: each shard is on one rank."""

    def gather(self, parameter: nn.Parameter, shard: Tensor) -> Tensor:
        split = self._splits[id(parameter)]
        return gather_from_ranks(shard, split.dim, split.width, self.ranks.group_name)

    def shard(self, parameter: nn.Parameter, full: Tensor) -> Tensor:
        dim, width = self._splits[id(parameter)]
        own = share(width, self.rank, self.size)
        return full.narrow(dim, own.start, own.stop - own.start).clone(memory_format=torch.contiguous_format)

    def sum(self, value: Tensor) -> Tensor:
        return reduce_from_ranks(value, self.ranks.group_name)


_SAVE, _PARALLEL = "save_pretrained", "_toolkit_tensor_parallel"


def parallel_of(model: nn.Module) -> TensorParallel | None:
    """What ``tensor_parallel`` returned for a model that is split; None for one that is whole."""
    found: TensorParallel | None = attached(model, _PARALLEL)
    return found


def _refuse_to_save(name: str, *args: Any, **kwargs: Any) -> None:
    raise ToolkitError(f"{name} must be gathered to be saved, got one that is split; use `with parallel.gathered():`.")


def _sum_over(group: str, grad: Tensor) -> Tensor:
    return reduce_from_ranks(grad, group)


def tensor_parallel(model: nn.Module, group: dist.ProcessGroup | None = None) -> TensorParallel:
    """Split a patched model over the ranks of a group, in place, by transformers' plan of it (``model.tp_plan``).

    Projections of attention and MLPs hold a part of their rows, and a layer's keys and values are those of this rank's
    heads. The head holds a part of the vocabulary and returns all logits; MoE layers hold a part of their experts.
    Embeddings, norms, routers and what the plan does not name stay whole. All ranks compute the same tokens: they must
    make the same calls with the same arguments, and get the same results.

    In numerics mode bitwise no sum of the forward is split: what the plan calls row-parallel holds a part of its output
    rows, too, and its input is gathered. Outputs are bitwise those of one process; gradients are sums over ranks, in
    their order, and repeat from run to run. In fast mode row-parallel layers hold input columns, and one sum over ranks
    follows each.

    The split model is compared with the whole one: logits, and gradients of norms and routers, of a few random tokens.

    Args:
        model: patched, with equal weights on all ranks. Adapters of layers (LoRA) stay whole on each, and have equal
            gradients.
        group: of the ranks (gloo on CPUs, NCCL on GPUs); None for all.

    Returns:
        What trains and saves the shards: ``clip``, ``gathered``, ``shard_optimizer``, ``load_state_dict``.

    Raises:
        ToolkitError: for a model that is not patched, has no plan, or something that cannot be split so; for different
            weights; for no process group; and where the split model computes something else. The model is whole then.
    """
    model = inner_model(model)
    if not dist.is_initialized():
        raise ToolkitError("tensor parallel needs torch.distributed; call init_process_group, under torchrun, say.")
    ranks = dist.group.WORLD if group is None else group
    assert ranks is not None
    record = record_of(model)
    if record is None or record.report is None:
        raise ToolkitError(
            f"model {type(model).__name__} must be patched before it is split; call toolkit.patch first."
        )
    check_unsharded(model, "tensor parallel")
    check_unsplit(model, "tensor parallel")
    size = dist.get_world_size(ranks)
    bitwise = record.report.numerics is Numerics.BITWISE
    check_adapters(model)
    with without_adapters(model):
        plan = plan_of(model, size)
    for module, names in plan.experts.items():
        ReplicatedTokensDispatcher(ranks).owned(len(getattr(module, names[0])))
    check_equal(dict(model.named_parameters()), ranks)
    parallel = TensorParallel(model, ranks, plan, bitwise)
    if not parallel.parameters:
        raise ToolkitError(f"tensor parallel needs a plan that splits a parameter, got that of {type(model).__name__}.")
    before = look(model, parallel.whole)
    parallel.apply()
    try:
        problem = difference(before, look(model, parallel.whole), bitwise)
    except Exception as error:
        problem = f"its forward fails ({first_line(error, with_class=True)})"
    problem = next((one for one in gather_objects(problem, ranks.group_name) if one is not None), None)
    if problem is not None:
        parallel.undo()
        raise ToolkitError(f"{type(model).__name__} cannot be split over {size} ranks: {problem}.")
    return parallel
