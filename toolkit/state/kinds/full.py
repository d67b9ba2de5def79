"""Full attention: every token's key and value, for as long as the sequence lives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.ops.state_write import state_write
from toolkit.state.kinds import PagedRows, Rows, Snapshots, StateKind, StateSpec


class FullAttention(StateKind, kind="full"):
    """keys [num_pages, page_size, heads, width] and values [..., value width] of one layer.

    spec.shapes: (heads, width) of a token's keys, (heads, value width) of its values.
    """

    op = "attend"

    def __init__(
        self, spec: StateSpec, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(spec, num_pages, page_size, dtype, device)
        self.rows = tuple(store.flatten(0, 1) for store in self.stores)

    @classmethod
    def entries(cls, spec: StateSpec, page_size: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [((page_size, *shape), dtype) for shape in spec.shapes]

    @classmethod
    def inputs(cls, spec: StateSpec) -> tuple[tuple[int, ...], ...]:
        return spec.shapes

    def write(self, rows: Rows, view: PagedRows | Snapshots, query_offsets: Tensor) -> None:
        assert isinstance(view, PagedRows)
        for store, given in zip(self.rows, rows, strict=True):
            state_write(store, given, view.slots)

    def operands(self, view: PagedRows) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [rows, heads, width] that attention reads, and the block tables that lead to them."""
        keys, values = self.rows
        return keys, values, view.block_tables

    def read(self, pages: Sequence[int], length: int) -> Rows:
        """Keys and values of the tokens that are still read, [n, ...] each."""
        reach = self.reach(self.spec)
        start = max(0, length - reach) if reach else 0
        first = start // self.page_size
        index = self._index(pages[first : -(-length // self.page_size)])
        return tuple(
            store[index].flatten(0, 1)[start - first * self.page_size : length - first * self.page_size]
            for store in self.stores
        )
