"""Which keys a token attended: the positions that an indexer selected, beside the other state of its layer.

As with ``routing``: a completion's selection is whole after prefix hits, forks, swaps and truncations, and it is the
one that the state was computed by.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from toolkit.state.kinds import PagedRows, Rows, Snapshots, StateSpec
from toolkit.state.kinds.token_rows import TokenRows


class Selection(TokenRows, kind="selection"):
    """positions [num_blocks, block_size, 1, K] int32 of one layer with an indexer; spec.shapes: (1, K).

    -1 stands behind a token's last position. Nothing of a forward reads it.
    """

    op = "record_selection"

    @classmethod
    def entries(cls, spec: StateSpec, block_size: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(shape, torch.int32) for shape, _ in super().entries(spec, block_size, dtype)]

    def write(self, rows: Rows, view: PagedRows | Snapshots, query_offsets: Tensor) -> None:
        """Positions [T, 1, any], of which no token has more than K: a small pool selects fewer columns than K."""
        (positions,) = rows
        ((_, width),) = self.spec.shapes
        missing = max(0, width - positions.shape[-1])
        super().write((pad(positions[..., :width], (0, missing), value=-1),), view, query_offsets)
