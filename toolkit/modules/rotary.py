"""The table of rotary angles: cosines and sines of each token's position."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from toolkit.ops.rotary import rotary_tables


def rotary_tables_forward(scaling: float) -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Forward of a rotary embedding with the buffer ``inv_freq`` [F]: cos, sin of [..., 2F] in x's dtype."""

    @torch.no_grad()
    def forward(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_tables(position_ids, self.inv_freq, scaling, x.dtype)  # type: ignore[arg-type]

    return forward
