"""Multi-head latent attention: one compressed vector a token, which is key and value of every head.

The first columns are the latent, the last ones the key's rotated part, which all heads share (DeepSeek-V2, 2024).
"""

import torch
from torch import Tensor

from toolkit.state.kinds import PagedRows, Rows, Snapshots, StateSpec
from toolkit.state.kinds.full import FullAttention


class LatentAttention(FullAttention, kind="latent"):
    """latents [num_blocks, block_size, 1, width] of one layer.

    spec.shapes: (1, width) of a key, (1, n) of its value, which is its first n columns.
    """

    @classmethod
    def entries(cls, spec: StateSpec, block_size: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return super().entries(spec, block_size, dtype)[:1]

    @classmethod
    def inputs(cls, spec: StateSpec) -> tuple[tuple[int, ...], ...]:
        return spec.shapes[:1]

    def write(self, rows: Rows, view: PagedRows | Snapshots, query_offsets: Tensor) -> None:
        super().write(rows[:1], view, query_offsets)

    def operands(self, view: PagedRows) -> tuple[Tensor, Tensor, Tensor]:
        keys = self.rows[0]
        return keys, keys[..., : self.spec.shapes[1][-1]], view.block_tables
