"""Short causal convolutions: the last few inputs of every channel. Blocks hold snapshots, as for ``recurrent``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.ops.causal_conv import causal_conv_paged
from toolkit.state.kinds import PagedRows, Rows, Snapshots, StateKind, StateSpec


class ShortConvolution(StateKind, kind="conv"):
    """tails [num_blocks, width - 1, channels] of one layer, oldest first; spec.shapes: that entry's shape."""

    op = "convolve"
    snapshot_interval = 16

    @classmethod
    def entries(cls, spec: StateSpec, block_size: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(spec.shapes[0], dtype)]

    @classmethod
    def lookback(cls, spec: StateSpec) -> int:
        return 1

    @classmethod
    def inputs(cls, spec: StateSpec) -> tuple[tuple[int, ...], ...]:
        return ((spec.shapes[0][1],),)

    def write(self, rows: Rows, view: PagedRows | Snapshots, query_offsets: Tensor) -> None:
        (x,) = rows
        self.convolve(x, x.new_zeros(x.shape[1], self.spec.shapes[0][0] + 1), None, None, view, query_offsets)

    def convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        view: PagedRows | Snapshots,
        query_offsets: Tensor,
    ) -> Tensor:
        """Outputs [T, C] of ``causal_conv`` from and to the blocks."""
        assert isinstance(view, Snapshots)
        snapshots = view.load_blocks, view.store_rows, view.store_blocks
        return causal_conv_paged(x, weight, bias, query_offsets, *snapshots, self.stores[0], activation)

    def read(self, blocks: Sequence[int], length: int) -> Rows:
        """The last inputs; zeros where the sequence is shorter."""
        if length == 0:
            return (torch.zeros_like(self.stores[0][0]),)
        return (self.stores[0][blocks[(length - 1) // self.block_size]].clone(),)
