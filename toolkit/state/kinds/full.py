"""Full attention: every token's key and value, for as long as the sequence lives."""

from torch import Tensor

from toolkit.state.kinds import PagedRows
from toolkit.state.kinds.token_rows import TokenRows


class FullAttention(TokenRows, kind="full"):
    """keys [num_blocks, block_size, heads, width] and values [..., value width] of one layer.

    spec.shapes: (heads, width) of a token's keys, (heads, value width) of its values.
    """

    op = "attend"

    def operands(self, view: PagedRows) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [rows, heads, width] that attention reads, and the block tables that lead to them."""
        keys, values = self.rows
        return keys, values, view.block_tables
