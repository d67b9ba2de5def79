"""Linear recurrences: one matrix per head for any length (gated delta rule, state-space duality, selective scan).

A block holds the state after its last token so far, in float32 at least. The state of a full block is a snapshot: a
prefix that ends there can be gone on from, by a fork, a prefix hit or after a truncation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.ops.linear_recurrence import linear_recurrence_paged
from toolkit.state.kinds import PagedRows, Rows, Snapshots, StateKind, StateSpec


class Recurrence(StateKind, kind="recurrent"):
    """states [num_blocks, heads, key width, value width] of one layer; spec.shapes: that entry's shape."""

    op = "scan"
    snapshot_interval = 16

    @classmethod
    def entries(cls, spec: StateSpec, block_size: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(spec.shapes[0], torch.promote_types(dtype, torch.float32))]

    @classmethod
    def lookback(cls, spec: StateSpec) -> int:
        return 1

    @classmethod
    def inputs(cls, spec: StateSpec) -> tuple[tuple[int, ...], ...]:
        heads, keys, values = spec.shapes[0]
        return (heads, keys), (heads, values), (heads,), (heads,)

    def write(self, rows: Rows, view: PagedRows | Snapshots, query_offsets: Tensor) -> None:
        """Rows are keys, values, log decays and betas, of the delta rule."""
        k, v, g, beta = rows
        self.scan(k, k, v, g, beta, view, query_offsets, 1.0, True)

    def scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor | None,
        view: PagedRows | Snapshots,
        query_offsets: Tensor,
        scale: float,
        delta: bool,
        rates: Tensor | None = None,
        chunked: bool = False,
    ) -> Tensor:
        """Outputs [T, H, V] of ``linear_recurrence`` from and to the blocks."""
        assert isinstance(view, Snapshots)
        plan = query_offsets, view.load_blocks, view.store_rows, view.store_blocks
        options: dict[str, Any] = {"rates": rates, "chunked": chunked}
        return linear_recurrence_paged(q, k, v, g, beta, *plan, self.stores[0], scale, delta, **options)

    def read(self, blocks: Sequence[int], length: int) -> Rows:
        """The state after the last token; zeros for none."""
        if length == 0:
            return (torch.zeros_like(self.stores[0][0]),)
        return (self.stores[0][blocks[(length - 1) // self.block_size]].clone(),)
