"""Every layer's pages. The numbers of the pages are the ``PageAllocator``'s; their contents are here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.state import kinds
from toolkit.state.kinds import LayerSpec, Rows
from toolkit.state.kinds.full import FullAttention

__all__ = ["LayerSpec", "StatePool"]


class StatePool:
    """Storage of ``num_pages`` pages of ``page_size`` token slots for each layer.

    keys[layer], values[layer]: [num_pages * page_size, kv_heads, head_dim or v_head_dim], in ``dtype``, of
    the layers that attend. states[layer]: the layer's memory as its kind.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers = tuple(layers)
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.states = [
            kinds.find(spec.kind).allocate(spec, num_pages, page_size, dtype, self.device) for spec in self.layers
        ]
        attending = {layer: state for layer, state in enumerate(self.states) if isinstance(state, FullAttention)}
        self.keys: dict[int, Tensor] = {layer: state.keys for layer, state in attending.items()}
        self.values: dict[int, Tensor] = {layer: state.values for layer, state in attending.items()}

    @classmethod
    def page_bytes(cls, layers: Sequence[LayerSpec], page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers: divide the memory to spend by it for the number of pages."""
        return sum(kinds.find(spec.kind).page_bytes(spec, page_size, dtype) for spec in layers)

    @property
    def bytes(self) -> int:
        """Bytes of all storage."""
        return sum(state.bytes for state in self.states)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Run (source, destination) page copies in every layer, as if one after the other."""
        if copies:
            for state in self.states:
                state.fork(copies)

    def truncate(self, pages: Sequence[int], length: int) -> None:
        """Make the sequence that holds ``pages`` remember its first ``length`` tokens only."""
        for state in self.states:
            state.truncate(pages, length)

    def swap_out(self, pages: Sequence[int]) -> list[Rows]:
        """Copies of pages on the host, a tuple of tensors a layer; the pages may then be freed."""
        return [state.swap_out(pages) for state in self.states]

    def swap_in(self, pages: Sequence[int], host: Sequence[Rows]) -> None:
        """Put what ``swap_out`` returned into ``pages``: any pages, as many as were swapped out."""
        for state, saved in zip(self.states, host, strict=True):
            state.swap_in(pages, saved)
