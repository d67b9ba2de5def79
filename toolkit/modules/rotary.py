"""Rotary tables: cosines and sines of each token's position."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.ops.rotary import rotary_tables

# From (cos, sin), [..., F] each, to the tables in the layout that a model multiplies by.
LAYOUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "twice": lambda cos, sin: (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)),
    "repeated": lambda cos, sin: (cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)),
    "once": lambda cos, sin: (cos, sin),
    "complex": torch.complex,
}


def rotary_tables_forward(layout: str = "twice", axes: Tensor | None = None) -> Callable[..., Any]:
    """Forward of a rotary embedding with the buffer ``inv_freq`` [F], or one ``<layer_type>_inv_freq`` per layer type.

    The forward takes x (for its dtype), position_ids [B, T] and a layer_type, and returns cosines and sines in x's
    dtype, or complex numbers in complex64.

    Args:
        layout: a name of ``LAYOUTS``.
        axes: [F] the axis of each frequency; position_ids may be [A, B, T] then, positions along each of A axes
            (``toolkit.ops.rotary.rotary_tables``).
    """

    @torch.no_grad()
    def forward(self: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        prefix = "" if layer_type is None else f"{layer_type}_"
        inv_freq = getattr(self, f"{prefix}inv_freq")
        scaling = float(getattr(self, f"{prefix}attention_scaling", 1.0))
        along = axes.to(inv_freq.device) if axes is not None and position_ids.dim() == 3 else None
        dtype = torch.float32 if layout == "complex" else x.dtype
        cos, sin = rotary_tables(position_ids, inv_freq, scaling, dtype, along)
        if layout == "twice":
            return cos, sin
        half = inv_freq.shape[0]
        return LAYOUTS[layout](cos[..., :half], sin[..., :half])

    return forward
