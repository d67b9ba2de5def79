"""Keys and values in eight bits with a scale for each token and head (``toolkit.state.rounding``)."""

import torch
from torch import Tensor

from toolkit.state.kinds import PagedRows, Rows, Snapshots, StateSpec
from toolkit.state.kinds.token_rows import TokenRows
from toolkit.state.kinds.window import WindowAttention
from toolkit.state.rounding import int8_codes, int8_values


class Int8Attention(TokenRows, kind="full_int8"):
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

    def write(self, rows: Rows, view: PagedRows | Snapshots, query_offsets: Tensor) -> None:
        codes, scales = zip(*map(int8_codes, rows), strict=True)
        super().write((*codes, *scales), view, query_offsets)

    def operands(self, view: PagedRows) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [rows, heads, width] of the blocks in use, and the tables that lead to them."""
        blocks, tables = view.block_tables.unique(return_inverse=True)
        keys, values = self.contents(blocks)
        return keys, values, tables

    def contents(self, blocks: Tensor) -> Rows:
        *codes, key_scales, value_scales = super().contents(blocks)
        pairs = zip(codes, (key_scales, value_scales), strict=True)
        return tuple(int8_values(*pair, self.dtype) for pair in pairs)


class Int8Window(Int8Attention, kind="window_int8"):
    """As ``full_int8``, for a layer whose queries see ``spec.window`` tokens, themselves included."""

    lookback = WindowAttention.lookback
