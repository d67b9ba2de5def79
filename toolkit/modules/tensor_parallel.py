"""Linear layers whose output rows, or input columns, are split over the ranks of a group.

Shapes: K inputs, N outputs; rank r of W holds its ``share`` of the split dimension. A *whole* input is equal on all
ranks, a *split* one is this rank's share of the last dimension (``toolkit.ops.collectives``).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from toolkit.ops.collectives import copy_to_ranks, gather_from_ranks, reduce_from_ranks, split_to_ranks

Linear = Callable[..., Tensor]
"""``toolkit.modules.linear.autocast_linear`` or ``torch.nn.functional.linear``."""
_SPLIT = "tensor_parallel_split"
"""The attribute of a forward of this file that is its ``Split``."""


class Split(NamedTuple):
    """What a split layer takes and returns.

    Fields:
        group: name of the process group.
        input: whether it takes this rank's share of the K inputs; else all of them.
        output: whether it returns this rank's share of the N outputs; else all of them.
    """

    group: str
    input: bool
    output: bool


def split_of_forward(module: nn.Module) -> Split | None:
    """How a module is split over ranks; None for a module that is whole."""
    found: Split | None = getattr(module.__dict__.get("forward"), _SPLIT, None)
    return found


def group_of_forward(module: nn.Module) -> str | None:
    """The group that a module is split over; None for a module that is whole."""
    split = split_of_forward(module)
    return None if split is None else split.group


def group_of_model(model: nn.Module) -> str | None:
    """The name of the process group that a model is split over; None for a model that is whole."""
    return next((group for module in model.modules() if (group := group_of_forward(module)) is not None), None)


def _split(forward: Callable[..., Tensor], group: str, input: bool, output: bool) -> Callable[..., Tensor]:
    forward.__dict__[_SPLIT] = Split(group, input, output)
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

    return _split(forward, group, input=False, output=not gather_output)


def shared_column_forward(linear: Linear, group: str) -> Callable[..., Tensor]:
    """``column_forward`` with gathered outputs of a weight that every rank holds whole, as an embedding needs it."""

    def forward(self: Any, input: Tensor) -> Tensor:
        weight = split_to_ranks(self.weight, 0, group)
        bias = None if self.bias is None else split_to_ranks(self.bias, 0, group)
        return gather_from_ranks(linear(copy_to_ranks(input, group), weight, bias), -1, self.out_features, group)

    return _split(forward, group, input=False, output=False)


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

    return _split(forward, group, input=split_input, output=False)


def reduced_row_forward(linear: Linear, group: str, split_input: bool) -> Callable[..., Tensor]:
    """Forward in fast mode of a row-parallel layer, which holds its share of the K columns and the whole bias.

    Partial outputs are summed over ranks, once, and the bias is added to the sum. Arguments as above.
    """

    def forward(self: Any, input: Tensor) -> Tensor:
        x = input if split_input else split_to_ranks(input, -1, group)
        y = reduce_from_ranks(linear(x, self.weight, None), group)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    return _split(forward, group, input=split_input, output=False)
