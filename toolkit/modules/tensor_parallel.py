"""Linear layers whose output rows, or input columns, are split over the ranks of a group.

Shapes: K inputs, N outputs; rank r of W holds its ``share`` of the split dimension. A *whole* input is equal on all
ranks, a *split* one is this rank's share of the last dimension (``toolkit.ops.collectives``).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from toolkit.ops.collectives import copy_to_ranks, gather_from_ranks, reduce_from_ranks, split_to_ranks

Linear = Callable[..., Tensor]
"""``toolkit.modules.linear.autocast_linear`` or ``torch.nn.functional.linear``."""
GROUP = "tensor_parallel_group"
"""The attribute of a forward of this file that names its process group."""


def group_of_forward(module: nn.Module) -> str | None:
    """The group that a module is split over; None for a module that is whole."""
    found: str | None = getattr(module.__dict__.get("forward"), GROUP, None)
    return found


def _of_group(forward: Callable[..., Tensor], group: str) -> Callable[..., Tensor]:
    forward.__dict__[GROUP] = group
    return forward


def column_forward(linear: Linear, group: str, gather_output: bool) -> Callable[..., Tensor]:
    """Forward of a linear layer that holds its share of the N rows: a whole input [..., K] to its outputs.

    Bitwise the outputs of the whole layer: no sum is split. Only the gradient of the input is summed over ranks.

    Args:
        linear: GEMM.
        group: name of the process group.
        gather_output: return all [..., N], whole; else this rank's share, split.
    """

    def forward(self: Any, input: Tensor) -> Tensor:
        y = linear(copy_to_ranks(input, group), self.weight, self.bias)
        return gather_from_ranks(y, -1, self.out_features, group) if gather_output else y

    return _of_group(forward, group)


def shared_column_forward(linear: Linear, group: str) -> Callable[..., Tensor]:
    """``column_forward`` with gathered outputs of a weight that every rank holds whole, as an embedding needs it."""

    def forward(self: Any, input: Tensor) -> Tensor:
        weight = split_to_ranks(self.weight, 0, group)
        bias = None if self.bias is None else split_to_ranks(self.bias, 0, group)
        return gather_from_ranks(linear(copy_to_ranks(input, group), weight, bias), -1, self.out_features, group)

    return _of_group(forward, group)


def gathered_row_forward(linear: Linear, group: str, split_input: bool) -> Callable[..., Tensor]:
    """Forward in bitwise mode of what a plan calls row-parallel: an input [..., K] to whole outputs [..., N].

    This rank holds its share of the N rows, as in ``column_forward``, and the input is gathered: row-parallel itself
    would add up partial sums of ranks, in another order than one process.

    Args:
        linear: GEMM.
        group: name of the process group.
        split_input: whether the input is split; else it is whole.
    """

    def forward(self: Any, input: Tensor) -> Tensor:
        x = gather_from_ranks(input, -1, self.in_features, group) if split_input else input
        y = linear(copy_to_ranks(x, group), self.weight, self.bias)
        return gather_from_ranks(y, -1, self.out_features, group)

    return _of_group(forward, group)


def reduced_row_forward(linear: Linear, group: str, split_input: bool) -> Callable[..., Tensor]:
    """Forward in fast mode of a row-parallel layer, which holds its share of the K columns and the whole bias.

    Partial outputs are summed over ranks, once, and the bias is added to the sum. Arguments as above.
    """

    def forward(self: Any, input: Tensor) -> Tensor:
        x = input if split_input else split_to_ranks(input, -1, group)
        y = reduce_from_ranks(linear(x, self.weight, None), group)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    return _of_group(forward, group)
