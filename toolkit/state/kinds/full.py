"""Full attention: every token's key and value, for as long as the sequence lives.

A sliding window is this kind too, with the window applied by the attention that reads it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.ops.state_write import state_write
from toolkit.state.kinds import LayerSpec, Rows, StateKind


class FullAttention(StateKind, kind="full"):
    """keys [num_pages * page_size, kv_heads, head_dim] and values [..., v_head_dim] of one layer."""

    def __init__(self, keys: Tensor, values: Tensor, page_size: int) -> None:
        self.keys = keys
        self.values = values
        self.page_size = page_size

    @staticmethod
    def row_shapes(spec: LayerSpec) -> tuple[tuple[int, ...], ...]:
        return (spec.kv_heads, spec.head_dim), (spec.kv_heads, spec.v_head_dim)

    @classmethod
    def page_bytes(cls, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> int:
        return page_size * spec.kv_heads * (spec.head_dim + spec.v_head_dim) * dtype.itemsize

    @classmethod
    def allocate(
        cls, spec: LayerSpec, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> "FullAttention":
        # Zeros, because what the host has not touched yet costs no memory and a stray NaN would spread.
        keys, values = (
            torch.zeros(num_pages * page_size, *shape, dtype=dtype, device=device) for shape in cls.row_shapes(spec)
        )
        return cls(keys, values, page_size)

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(self, rows: Rows, slots: Tensor) -> None:
        keys, values = rows
        state_write(self.keys, keys, slots)
        state_write(self.values, values, slots)

    def read(self, pages: Sequence[int], length: int) -> Rows:
        index = torch.tensor(pages, dtype=torch.int64, device=self.keys.device)
        keys, values = (paged[index].flatten(0, 1)[:length] for paged in self._paged())
        return keys, values

    def fork(self, copies: Sequence[tuple[int, int]]) -> None:
        for group in independent(copies):
            source, destination = torch.tensor(group, dtype=torch.int64, device=self.keys.device).unbind(1)
            for paged in self._paged():
                paged[destination] = paged[source]

    def truncate(self, pages: Sequence[int], length: int) -> None:
        """Nothing to do.

        Rows past a sequence's length are never read, and are overwritten when it goes on.
        """

    def swap_out(self, pages: Sequence[int]) -> Rows:
        index = torch.tensor(pages, dtype=torch.int64, device=self.keys.device)
        return tuple(paged[index].cpu() for paged in self._paged())

    def swap_in(self, pages: Sequence[int], host: Rows) -> None:
        index = torch.tensor(pages, dtype=torch.int64, device=self.keys.device)
        for paged, saved in zip(self._paged(), host, strict=True):
            paged[index] = saved.to(paged.device)

    def _paged(self) -> tuple[Tensor, Tensor]:
        """keys and values as [num_pages, page_size, ...] views."""
        return self.keys.unflatten(0, (-1, self.page_size)), self.values.unflatten(0, (-1, self.page_size))


def independent(copies: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Cut a list of page copies into runs whose copies may happen all at once.

    A run reads all its sources before it writes, so it ends only where a source or a destination was written
    by the run already.
    """
    groups: list[list[tuple[int, int]]] = []
    written: set[int] = set()
    for source, destination in copies:
        if not groups or source in written or destination in written:
            groups.append([])
            written = set()
        groups[-1].append((source, destination))
        written.add(destination)
    return groups
