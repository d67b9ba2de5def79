"""Adapters that rows of a batch choose: what a wrapper's forward reads of the forward's context.

A wrapper whose adapter a row does not have leaves the row as the layer made it: there the adapter has rank 0.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.state.active import get_forward_context
from toolkit.state.context import ForwardContext


class RowAdapters(NamedTuple):
    """What the rows of a call have chosen.

    Fields:
        names: of adapters.
        ids: [...] int64 of each row, an index of ``names``, -1 for none.
        context: of the forward.
    """

    names: tuple[str, ...]
    ids: Tensor
    context: ForwardContext


def row_adapters(shape: Sequence[int], head: bool = False) -> RowAdapters | None:
    """The adapters of a call's rows; None where the adapters that are switched on act on all rows.

    Args:
        shape: [...] of the rows, the batch's tokens in order.
        head: whether the call has only the rows whose logits are wanted.

    Raises:
        ToolkitError: the call has other rows than the batch.
    """
    context = get_forward_context()
    if context is None or context.batch.adapter_ids is None:
        return None
    ids = context.batch.adapter_ids
    if head and context.rows is not None:
        ids = ids[context.rows]
    count = 1
    for size in shape:
        count *= size
    if count != len(ids):
        raise ToolkitError(
            f"a layer whose adapters rows choose must be given the {len(ids)} rows of the batch, got {count}."
        )
    return RowAdapters(context.batch.adapters, ids.view(*shape), context)


@cache
def no_factors(inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A [0, K] and B [N, 0] of an adapter that adds nothing."""
    with torch.inference_mode(False):
        return (
            torch.empty(0, inputs, dtype=dtype, device=device),
            torch.empty(outputs, 0, dtype=dtype, device=device),
        )
