"""What the kinds have in common whose blocks hold a row for each token: keys and values, latents, routing."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from toolkit.ops.state_write import state_write
from toolkit.state.kinds import PagedRows, Rows, Snapshots, StateKind, StateSpec


class TokenRows(StateKind):
    """``stores`` of [num_blocks, block_size, heads, width], here one for each of spec.shapes: (heads, width).

    ``rows``: the same memory, one row per slot.
    """

    def __init__(
        self, spec: StateSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(spec, num_blocks, block_size, dtype, device)
        self.rows = tuple(store.flatten(0, 1) for store in self.stores)

    def with_stores(self, stores: Rows) -> Self:
        other = super().with_stores(stores)
        other.rows = tuple(store.flatten(0, 1) for store in stores)
        return other

    @classmethod
    def entries(cls, spec: StateSpec, block_size: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [((block_size, *shape), dtype) for shape in spec.shapes]

    @classmethod
    def inputs(cls, spec: StateSpec) -> tuple[tuple[int, ...], ...]:
        return spec.shapes

    def write(self, rows: Rows, view: PagedRows | Snapshots, query_offsets: Tensor) -> None:
        assert isinstance(view, PagedRows)
        for store, given in zip(self.rows, rows, strict=True):
            state_write(store, given, view.slot_mapping)

    def read(self, blocks: Sequence[int], length: int) -> Rows:
        """The rows of the tokens that are still read, [n, ...] each."""
        lookback = self.lookback(self.spec)
        start = max(0, length - lookback) if lookback else 0
        first = start // self.block_size
        held = self.contents(self._index(blocks[first : -(-length // self.block_size)]))
        return tuple(rows[start - first * self.block_size : length - first * self.block_size] for rows in held)

    def contents(self, blocks: Tensor) -> Rows:
        """The rows of whole blocks [n], [n * block_size, heads, width] each."""
        return tuple(store[blocks].flatten(0, 1) for store in self.stores)
