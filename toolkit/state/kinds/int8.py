"""Keys and values in eight bits with a scale for each token and head (``toolkit.ops.int8_rows``)."""

import torch
from torch import Tensor

from toolkit.ops.int8_rows import int8_values, state_write_int8
from toolkit.state.kinds import PagedRows, Rows, Snapshots, StateSpec
from toolkit.state.kinds.token_rows import TokenRows
from toolkit.state.kinds.window import WindowAttention


class Int8Attention(TokenRows, kind="full_int8"):
    """Codes [num_blocks, block_size, heads, width] of keys and values, and float32 scales [..., heads, 1] of both."""

    op = "attend"

    def __init__(
        self, spec: StateSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(spec, num_blocks, block_size, dtype, device)
        self.dtype = dtype

    @classmethod
    def entries(cls, spec: StateSpec, block_size: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        codes = [((block_size, *shape), torch.int8) for shape in spec.shapes]
        return codes + [((block_size, heads, 1), torch.float32) for heads, _ in spec.shapes]

    def write(self, rows: Rows, view: PagedRows | Snapshots, query_offsets: Tensor) -> None:
        assert isinstance(view, PagedRows)
        for codes, scales, given in zip(self.rows[:2], self.rows[2:], rows, strict=True):
            state_write_int8(codes, scales, given, view.slot_mapping)

    def operands(self, view: PagedRows) -> tuple[Tensor, ...]:
        """Codes [rows, heads, width] of keys and values, the block tables, and scales [rows, heads, 1] of both."""
        keys, values, *scales = self.rows
        return keys, values, view.block_tables, *scales

    def contents(self, blocks: Tensor) -> Rows:
        *codes, key_scales, value_scales = super().contents(blocks)
        pairs = zip(codes, (key_scales, value_scales), strict=True)
        return tuple(int8_values(*pair, self.dtype) for pair in pairs)


class Int8Window(Int8Attention, kind="window_int8"):
    """As ``full_int8``, for a layer whose queries see ``spec.window`` tokens, themselves included."""

    lookback = WindowAttention.lookback
