"""The contract of a state kind: what one layer remembers of every sequence. One file a kind.

A kind stores rows, one for each token slot, in the pages that a ``Table`` hands out; the layer's mathematics
reads them through block tables. A new kind is a file in this folder with a subclass of ``StateKind``; the
contract tests find it by themselves.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from toolkit.errors import ToolkitError, nearest

Rows = tuple[Tensor, ...]
"""What a kind stores of T tokens: tensors of T rows each, in the order and shapes of ``row_shapes``."""


@dataclass(frozen=True)
class LayerSpec:
    """What one layer needs to remember.

    kv_heads, head_dim, v_head_dim: heads of keys and values, width of a key and of a value.
    window: tokens that a query looks back over, itself included; 0 for all of them.
    kind: name of the state kind.
    """

    kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int = 0
    kind: str = "full"


class StateKind(ABC):
    """One layer's memory. ``class Mine(StateKind, kind="mine")`` registers itself.

    Slots are ``page * page_size + place``; ``pages`` are one sequence's physical pages in order.
    """

    kind: ClassVar[str]
    _registry: ClassVar[dict[str, type["StateKind"]]] = {}

    def __init_subclass__(cls, *, kind: str) -> None:
        super().__init_subclass__()
        cls.kind = kind
        StateKind._registry[kind] = cls

    @staticmethod
    @abstractmethod
    def row_shapes(spec: LayerSpec) -> tuple[tuple[int, ...], ...]:
        """Shape of one token's row in each tensor of ``Rows``."""

    @classmethod
    @abstractmethod
    def page_bytes(cls, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> int:
        """Bytes that one page of this layer takes."""

    @classmethod
    @abstractmethod
    def allocate(
        cls, spec: LayerSpec, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> "StateKind":
        """Storage for ``num_pages`` pages."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes of storage."""

    @abstractmethod
    def write(self, rows: Rows, slots: Tensor) -> None:
        """Store rows [T, ...] at slots [T] (int64; negative ones are skipped)."""

    @abstractmethod
    def read(self, pages: Sequence[int], length: int) -> Rows:
        """The first ``length`` rows of the sequence that holds ``pages``, in order, as copies."""

    @abstractmethod
    def fork(self, copies: Sequence[tuple[int, int]]) -> None:
        """Run the (source, destination) page copies of a fork, as if one after the other."""

    @abstractmethod
    def truncate(self, pages: Sequence[int], length: int) -> None:
        """Make the sequence that holds ``pages`` remember its first ``length`` tokens only."""

    @abstractmethod
    def swap_out(self, pages: Sequence[int]) -> Rows:
        """Copies of whole pages on the host, one page a row."""

    @abstractmethod
    def swap_in(self, pages: Sequence[int], host: Rows) -> None:
        """Put what ``swap_out`` returned into ``pages`` (any pages, as many as were swapped out)."""


def registered() -> dict[str, type[StateKind]]:
    """Every state kind by name: those of this folder, and those that were subclassed elsewhere."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(StateKind._registry)


def find(kind: str) -> type[StateKind]:
    """The state kind of that name. Raises ToolkitError for an unknown one."""
    known = registered()
    if kind not in known:
        allowed = sorted(known)
        raise ToolkitError(f"state kind is {kind!r}; allowed are {', '.join(allowed)}{nearest(kind, allowed)}.")
    return known[kind]
