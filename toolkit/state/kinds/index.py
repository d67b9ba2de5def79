"""The keys of an indexer, by which a sparse attention layer selects the tokens that it attends: one per token.

They lie beside what the layer attends, a latent or keys and values, which is another state kind's.
"""

from torch import Tensor

from toolkit.state.kinds import PagedRows
from toolkit.state.kinds.token_rows import TokenRows


class IndexKeys(TokenRows, kind="index"):
    """keys [num_blocks, block_size, 1, width] of one layer; spec.shapes: (1, width)."""

    op = "select"

    def operands(self, view: PagedRows) -> tuple[Tensor, Tensor]:
        """Keys [rows, width] that a selection reads, and the block tables that lead to them."""
        (keys,) = self.rows
        return keys[:, 0], view.block_tables
