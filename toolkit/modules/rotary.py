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


def rotary_grids_forward(
    scaling: float, grid_of: Tensor
) -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """As ``rotary_tables_forward``, for positions on several grids (time, height, width): position_ids [G, B, T].

    grid_of: [2F] int64, the grid whose position turns a column of the tables. Positions [B, T] are those of all grids.
    """
    plain = rotary_tables_forward(scaling)

    @torch.no_grad()
    def forward(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = plain(self, x, position_ids)
        if position_ids.dim() == 2:
            return cos, sin
        index = grid_of.to(cos.device).expand(1, *cos.shape[1:])
        return cos.gather(0, index)[0], sin.gather(0, index)[0]

    return forward
