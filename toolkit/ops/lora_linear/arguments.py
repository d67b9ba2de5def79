"""What ``lora_add`` takes, checked in one place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.errors import ToolkitError


def check(
    base: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    adapters: Tensor,
    groups: Tensor | None,
    column_scales: Sequence[Tensor | None] | None,
    bias: Tensor | None,
) -> None:
    """ToolkitError, in one sentence, for arguments that do not fit."""
    for name, given in (("a", a), ("b", b), ("scaling", scaling), ("column_scales", column_scales)):
        if isinstance(given, Tensor):
            kind = "numbers" if name == "scaling" else "tensors"
            raise ToolkitError(
                f"{name} must be a list of {kind}, one of each adapter, got a tensor of shape {list(given.shape)}."
            )
        if given is not None and len(given) != len(a):
            raise ToolkitError(f"{name} must have {len(a)} entries, one of each adapter in a, got {len(given)}.")
    for at, (first, second) in enumerate(zip(a, b)):
        _check_factors(at, first, second, base.shape[-1], x.shape[-1])
    for name, ids in (("adapters", adapters), ("groups", groups)):
        if ids is not None and (ids.shape != x.shape[:-1] or ids.dtype != torch.int64):
            raise ToolkitError(
                f"{name} must be int64 {list(x.shape[:-1])} for x of shape {list(x.shape)}, got {ids.dtype} of shape "
                f"{list(ids.shape)}."
            )
    if base.shape[:-1] != x.shape[:-1]:
        raise ToolkitError(f"base must have as many rows as x of shape {list(x.shape)}, got {list(base.shape)}.")
    named = {"bias": bias}
    named |= {f"column_scales[{at}]": scale for at, scale in enumerate(column_scales or ())}
    for name, row in named.items():
        if row is not None and row.shape != base.shape[-1:]:
            raise ToolkitError(f"{name} must have shape [{base.shape[-1]}], got {list(row.shape)}.")
    named |= {"x": x} | {f"{name}[{at}]": one for name, of in (("a", a), ("b", b)) for at, one in enumerate(of)}
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype != base.dtype:
            raise ToolkitError(f"{name} must have the dtype of base, {base.dtype}, got {tensor.dtype}.")


def _check_factors(at: int, a: Tensor, b: Tensor, outputs: int, inner: int) -> None:
    if a.dim() not in (2, 3) or a.shape[-1] != inner:
        raise ToolkitError(f"a[{at}] must have shape [R, {inner}] or [G, R, {inner}], got {list(a.shape)}.")
    expected = [*a.shape[:-2], outputs, a.shape[-2]]
    if list(b.shape) != expected:
        raise ToolkitError(f"b[{at}] must have shape {expected} for a[{at}] of {list(a.shape)}, got {list(b.shape)}.")
