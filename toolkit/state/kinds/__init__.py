"""The contract of a state kind: what one layer remembers of every sequence. One file per kind.

``out, state' = op(in, state)``: a kind stores something in the blocks that a sequence's ``BlockTable`` hands out;
its op reads and writes it there. A new kind is a file in this folder with a subclass of ``StateKind``; the contract
tests find it. docs/state.md shows one from start to end.
"""

import copy
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.state.lazy_zeros import clear, lazy_zeros

Rows = tuple[Tensor, ...]
"""Tensors of one row per token, or one entry per block."""


@dataclass(frozen=True)
class StateSpec:
    """What one layer needs to remember.

    Args:
        layer: index of the layer (for routing: among the layers of experts).
        kind: name of the state kind.
        shapes: of each tensor that it stores of a token (or, for snapshots, of the value that a block holds).
        window: tokens that a query sees, itself included; 0 for all.
        part: which it is of the layer's states of that kind.
    """

    layer: int
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    window: int = 0
    part: int = 0


@dataclass(frozen=True)
class PagedRows:
    """Where the tokens of a batch lie in a group whose blocks hold ``block_size`` slots each. int64.

    Args:
        block_tables: [S, P] physical blocks of each sequence in order (any block where it is not read any more).
        slot_mapping: [T] where a new token's state goes, block * block_size + offset; negative: nowhere.
    """

    block_tables: Tensor
    slot_mapping: Tensor


@dataclass(frozen=True)
class Snapshots:
    """Where the states of a batch lie in a group whose blocks hold one value each. int64.

    Args:
        load_blocks: [S] block of the state that each sequence continues; negative: the empty state.
        store_rows: [N] rows of tokens after which the state is stored, ascending.
        store_blocks: [N] the block that it is stored to; negative: nowhere.
    """

    load_blocks: Tensor
    store_rows: Tensor
    store_blocks: Tensor


class StateKind(ABC):
    """The state of one layer. ``class Mine(StateKind, kind="mine")`` registers itself.

    Besides the methods below, a kind has the one that its ``op`` calls (see ``PagedContext``): ``operands`` for
    "attend" and "select", ``scan`` for "scan", ``convolve`` for "convolve", none for the others.

    Attributes:
        stores: tensors [num_blocks, ...] that hold everything; copies, swaps and counts of bytes follow from them.
    """

    kind: ClassVar[str]
    op: ClassVar[str]
    """What uses it: "attend", "select", "scan", "convolve", "record_routing", "record_selection" or "record_hidden"; a
    layer has one of each, and a scan a part."""
    snapshot_interval: ClassVar[int] = 0
    """0: a block holds a slot for each token. s > 0: it holds one value, and every s-th block's is kept."""
    capturable: ClassVar[bool] = True
    """Whether a decode step can be captured once and replayed: False for data-dependent shapes."""
    _registry: ClassVar[dict[str, type["StateKind"]]] = {}

    def __init_subclass__(cls, *, kind: str | None = None) -> None:
        super().__init_subclass__()
        if kind is not None:
            cls.kind = kind
            StateKind._registry[kind] = cls

    def __init__(
        self, spec: StateSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.spec = spec
        self.block_size = block_size
        # Zeros, because a stray NaN would spread; lazy ones, because a pool is made for the most that may come.
        self.stores: Rows = tuple(
            lazy_zeros((num_blocks, *shape), kept, device) for shape, kept in self.entries(spec, block_size, dtype)
        )

    def with_stores(self, stores: Rows) -> Self:
        """The same kind over other memory, which has the shapes of ``stores`` but for the number of blocks."""
        other = copy.copy(self)
        other.stores = stores
        return other

    @classmethod
    @abstractmethod
    def entries(cls, spec: StateSpec, block_size: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of a block's entry in each of ``stores``."""

    @classmethod
    def lookback(cls, spec: StateSpec) -> int:
        """Last tokens that a sequence still reads; 0: all."""
        return 0

    @classmethod
    @abstractmethod
    def inputs(cls, spec: StateSpec) -> tuple[tuple[int, ...], ...]:
        """Shape of a token's row in each tensor that ``write`` takes."""

    @abstractmethod
    def write(self, rows: Rows, view: PagedRows | Snapshots, query_offsets: Tensor) -> None:
        """Append rows [T, ...]: query_offsets[s] .. query_offsets[s + 1] are the next of sequence s of ``view``."""

    @abstractmethod
    def read(self, blocks: Sequence[int], length: int) -> Rows:
        """What a sequence of ``length`` tokens remembers, as copies; ``blocks``: its table, negative where not held."""

    @classmethod
    def block_bytes(cls, spec: StateSpec, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block of this layer takes."""
        return sum(kept.itemsize * torch.Size(shape).numel() for shape, kept in cls.entries(spec, block_size, dtype))

    @property
    def bytes(self) -> int:
        """Bytes of storage, asleep or not."""
        return sum(store.nbytes for store in self.stores)

    def fork(self, copies: Sequence[tuple[int, int]]) -> None:
        """Run the (source, destination) block copies of a fork, as if one after the other."""
        for group in independent(copies):
            source, destination = self._index([block for copy in group for block in copy]).view(-1, 2).unbind(1)
            for store in self.stores:
                store[destination] = store[source]

    def swap_out(self, blocks: Sequence[int]) -> Rows:
        """Copies of whole blocks on the host, one block per row."""
        index = self._index(blocks)
        return tuple(store[index].cpu() for store in self.stores)

    def swap_in(self, blocks: Sequence[int], host: Rows) -> None:
        """Put what ``swap_out`` returned into ``blocks`` (any blocks, as many as were swapped out)."""
        index = self._index(blocks)
        for store, saved in zip(self.stores, host, strict=True):
            store[index] = saved.to(store.device)

    def sleep(self) -> None:
        """Free the memory; contents are lost, tensors keep their identity."""
        for store in self.stores:
            store.untyped_storage().resize_(0)

    def wake(self) -> None:
        """Allocate the memory again, as zeros."""
        for store in self.stores:
            store.untyped_storage().resize_(store.nbytes)
            clear(store)

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self.stores[0].device)


def independent(copies: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Split a list of block copies into runs whose copies may happen all at once.

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
        raise ToolkitError(must_be_one_of("state kind", kind, allowed))
    return known[kind]
