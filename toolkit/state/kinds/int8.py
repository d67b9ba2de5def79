"""Keys and values in eight bits with a scale for each token and head (``toolkit.state.rounding``)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.state.kinds import PagedRows, Rows, Snapshots, StateKind, StateSpec
from toolkit.state.kinds.window import WindowAttention
from toolkit.state.rounding import int8_codes, int8_values


class Int8Attention(StateKind, kind="full_int8"):
    """Codes [num_blocks, block_size, heads, width] of keys and of values, and float32 scales [..., heads, 1] of both.

    Attention reads values of the model's dtype: those of the blocks in use are computed for each call.
    """

    op = "attend"
    capturable = False  # how many blocks are in use is data

    def __init__(
        self, spec: StateSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(spec, num_blocks, block_size, dtype, device)
        self.dtype = dtype

    @classmethod
    def entries(cls, spec: StateSpec, block_size: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        codes = [((block_size, *shape), torch.int8) for shape in spec.shapes]
        return codes + [((block_size, heads, 1), torch.float32) for heads, _ in spec.shapes]

    @classmethod
    def inputs(cls, spec: StateSpec) -> tuple[tuple[int, ...], ...]:
        return spec.shapes

    def write(self, rows: Rows, view: PagedRows | Snapshots, query_offsets: Tensor) -> None:
        assert isinstance(view, PagedRows)
        kept = (view.slot_mapping >= 0).nonzero()[:, 0]
        slots = view.slot_mapping[kept]
        for codes, scales, given in zip(*self._halves(), rows, strict=True):
            codes.flatten(0, 1)[slots], scales.flatten(0, 1)[slots] = int8_codes(given[kept])

    def operands(self, view: PagedRows) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [rows, heads, width] of the blocks in use, and the tables that lead to them."""
        blocks, tables = view.block_tables.unique(return_inverse=True)
        keys, values = self._values(blocks)
        return keys, values, tables

    def read(self, blocks: Sequence[int], length: int) -> Rows:
        """The rows of the tokens that are still read, [n, ...] each."""
        lookback = self.lookback(self.spec)
        start = max(0, length - lookback) if lookback else 0
        first = start // self.block_size
        found = self._values(self._index(blocks[first : -(-length // self.block_size)]))
        return tuple(rows[start - first * self.block_size : length - first * self.block_size] for rows in found)

    def _halves(self) -> tuple[Rows, Rows]:
        return self.stores[:2], self.stores[2:]

    def _values(self, blocks: Tensor) -> Rows:
        pairs = zip(*self._halves(), strict=True)
        return tuple(int8_values(codes[blocks], scales[blocks], self.dtype).flatten(0, 1) for codes, scales in pairs)


class Int8Window(Int8Attention, kind="window_int8"):
    """As ``full_int8``, for a layer whose queries see ``spec.window`` tokens, themselves included."""

    lookback = WindowAttention.lookback
