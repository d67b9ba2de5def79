"""What ranks exchange inside of a forward, with gradients: the four maps of tensor parallelism.

Ranks of a group run one program on equal inputs. A tensor is *whole* where all ranks hold equal values of it, and
*split* where each holds its share of one dimension. The gradient of a whole tensor is whole, that of a split one split.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.ops.transforms import first_derivative_only

_ONE_STEP = 65536  # elements up to which a sum takes one collective instead of two


def share(width: int, rank: int, size: int) -> slice:
    """Which of ``width`` entries rank ``rank`` of ``size`` holds: runs of ceil(width / size), the last ones shorter."""
    count = math.ceil(width / size)
    return slice(min(rank * count, width), min((rank + 1) * count, width))


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of a name (``group.group_name``)."""
    resolve: Any = dist.distributed_c10d._resolve_process_group
    found: dist.ProcessGroup = resolve(name)
    return found


def num_ranks(name: str) -> int:
    """The number of ranks of a group."""
    return dist.get_world_size(group_of(name))


def _join(parts: Tensor, mine: Tensor, ranks: dist.ProcessGroup) -> None:
    """Fill ``parts`` [W n] with every rank's ``mine`` [n]."""
    join: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # by which name torch has it
    join(parts, mine.contiguous(), group=ranks)


def _gather(x: Tensor, dim: int, width: int, group: str) -> Tensor:
    ranks = group_of(group)
    size, dim = dist.get_world_size(ranks), dim % x.dim()
    rows = x.movedim(dim, 0)
    count = math.ceil(width / size)
    if len(rows) < count:  # every rank sends as much as the first
        rows = torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
    out = rows.new_empty(size * count, *rows.shape[1:])
    if out.numel():
        _join(out, rows, ranks)
    return out[:width].movedim(0, dim).contiguous()


def _gather_fake(x: Tensor, dim: int, width: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] = width
    return x.new_empty(shape)


def _sum(x: Tensor, group: str) -> Tensor:
    ranks = group_of(group)
    size = dist.get_world_size(ranks)
    if not x.numel():
        return torch.empty_like(x)
    flat = x.reshape(-1)
    if flat.numel() <= _ONE_STEP:
        parts = flat.new_empty(size * flat.numel())
        _join(parts, flat, ranks)
        return _ordered_sum(parts.view(size, -1)).view_as(x)
    count = math.ceil(flat.numel() / size)  # each rank sums a part of the elements
    padded = torch.cat([flat, flat.new_zeros(size * count - flat.numel())])
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded, group=ranks)
    out = torch.empty_like(padded)
    _join(out, _ordered_sum(parts.view(size, -1)), ranks)
    return out[: flat.numel()].view_as(x)


def _ordered_sum(parts: Tensor) -> Tensor:
    total = parts[0].to(torch.promote_types(parts.dtype, torch.float32))
    for part in parts[1:]:
        total = total + part
    return total.to(parts.dtype)


def _sum_fake(x: Tensor, group: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _remember_share(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, ctx.dim, ctx.width, ctx.group = inputs


def _own_share(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    ranks = group_of(ctx.group)
    return _narrow(grad, ctx.dim, dist.get_rank(ranks), dist.get_world_size(ranks)), None, None, None


def _narrow(x: Tensor, dim: int, rank: int, size: int) -> Tensor:
    mine = share(x.shape[dim], rank, size)
    return x.narrow(dim, mine.start, mine.stop - mine.start)


# Not of the registry: there are no kernels here, and one implementation for all devices.
_LIBRARY = torch.library.Library("toolkit", "FRAGMENT")


def _define(
    schema: str, function: Callable[..., Tensor], fake: Callable[..., Tensor], backward: Any, setup_context: Any
) -> Any:
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"toolkit::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"toolkit::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.toolkit, name).default


_GATHER = _define(
    "gather_from_ranks(Tensor x, int dim, int width, str group) -> Tensor",
    _gather,
    _gather_fake,
    _own_share,
    _remember_share,
)
_SUM = _define(
    "reduce_from_ranks(Tensor x, str group) -> Tensor",
    _sum,
    _sum_fake,
    lambda ctx, grad: (grad, None),
    lambda ctx, inputs, output: None,
)


def gather_from_ranks(x: Tensor, dim: int, width: int, group: str) -> Tensor:
    """The whole tensor of ranks' shares, which are joined in the order of ranks.

    Args:
        x: this rank's ``share`` of dimension ``dim``, any dtype.
        dim: the split dimension.
        width: its size over all ranks.
        group: the name of the process group, all of whose ranks must call this.

    Returns:
        x with ``width`` entries of ``dim``. The gradient of x is this rank's share of the result's.
    """
    whole: Tensor = _GATHER(x, dim, width, group)
    return whole


def reduce_from_ranks(x: Tensor, group: str) -> Tensor:
    """The sum of all ranks' ``x``, element by element in the order of ranks.

    Args:
        x: of one shape and dtype on all ranks; 16-bit numbers are added in float32 and rounded once.
        group: as for ``gather_from_ranks``.

    Returns:
        A tensor like x, equal on all ranks and from run to run. The gradient of x is that of the result.
    """
    total: Tensor = _SUM(x, group)
    return total


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (total,) = first_derivative_only("copy_to_ranks", [_sum(grad, ctx.group)], [grad])
        return total, None


def copy_to_ranks(x: Tensor, group: str) -> Tensor:
    """``x``, a whole tensor of which each rank computes a part of what follows: its gradients are summed over ranks.

    The sum is ``reduce_from_ranks``'s. Without gradients this is x itself.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    copied: Tensor = _Copy.apply(x, group)  # type: ignore[no-untyped-call]
    return copied


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str) -> Tensor:
        ctx.dim, ctx.width, ctx.group = dim, x.shape[dim], group
        ranks = group_of(group)
        return _narrow(x, dim, dist.get_rank(ranks), dist.get_world_size(ranks))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        whole = _gather(grad, ctx.dim, ctx.width, ctx.group)
        (whole,) = first_derivative_only("split_to_ranks", [whole], [grad])
        return whole, None, None


def split_to_ranks(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's ``share`` of dimension ``dim`` of a whole tensor, as a view; the gradient is gathered."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        ranks = group_of(group)
        return _narrow(x, dim, dist.get_rank(ranks), dist.get_world_size(ranks))
    part: Tensor = _Split.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return part


def gather_objects(value: Any, group: str) -> list[Any]:
    """Every rank's ``value``, any object that can be pickled, in their order; all ranks of the group must call this."""
    ranks = group_of(group)
    found: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(found, value, group=ranks)
    return found


def send_object(value: Any, group: str) -> Any:
    """The first rank's ``value``, any object that can be pickled; all ranks of the group must call this.

    Values of the others are ignored.
    """
    ranks = group_of(group)
    found = [value]
    dist.broadcast_object_list(found, src=dist.get_global_rank(ranks, 0), group=ranks)
    return found[0]
