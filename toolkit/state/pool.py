"""What the blocks of every layer hold. The numbers of the blocks are ``BlockManager``'s; their contents are here."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from toolkit.state import kinds
from toolkit.state.block_manager import Group
from toolkit.state.kinds import Rows, StateKind, StateSpec


def group_of(spec: StateSpec) -> Group:
    """The group that a layer's state belongs to."""
    kind = kinds.find(spec.kind)
    return Group(kind.lookback(spec), kind.snapshot_interval)


def groups_of(specs: Sequence[StateSpec]) -> tuple[Group, ...]:
    """The groups of a model: those that keep everything first, then by lookback."""
    return tuple(sorted({group_of(spec) for spec in specs}, key=lambda group: (group.lookback != 0, -group.lookback)))


class StatePool:
    """Storage of all layers of a model, for kinds that remember differently.

    Args:
        specs: what each layer remembers; a layer may have several, of different kinds.
        num_blocks: of each of ``groups_of(specs)``.
        block_size: tokens per block.
        dtype: of the model's activations; a kind may store another one.
        device: of the storage.

    Attributes:
        states: of each spec, its storage.
        members: of each spec, the index of its group.
    """

    def __init__(
        self,
        specs: Sequence[StateSpec],
        num_blocks: Mapping[Group, int],
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.specs = tuple(specs)
        self.groups = groups_of(specs)
        self.block_size = block_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.states: list[StateKind] = [
            kinds.find(spec.kind)(spec, num_blocks[group_of(spec)], block_size, dtype, self.device)
            for spec in self.specs
        ]
        self.capturable = all(state.capturable for state in self.states)
        self.members = [self.groups.index(group_of(spec)) for spec in self.specs]
        self._serving = self._by_op()

    def _by_op(self) -> dict[tuple[int, str, int], tuple[Any, int]]:
        return {
            (state.spec.layer, state.op, state.spec.part): (state, group)
            for state, group in zip(self.states, self.members, strict=True)
        }

    def with_stores(self, stores: Sequence[Rows]) -> Self:
        """The same layers over other memory: of each state its tensors, of any number of blocks."""
        other = copy.copy(self)
        other.states = [state.with_stores(given) for state, given in zip(self.states, stores, strict=True)]
        other._serving = other._by_op()
        return other

    @staticmethod
    def block_bytes(specs: Sequence[StateSpec], block_size: int, dtype: torch.dtype) -> dict[Group, int]:
        """Bytes of one block of each group over all its layers."""
        totals: dict[Group, int] = {}
        for spec in specs:
            group = group_of(spec)
            totals[group] = totals.get(group, 0) + kinds.find(spec.kind).block_bytes(spec, block_size, dtype)
        return totals

    @property
    def bytes(self) -> int:
        """Bytes of all storage."""
        return sum(state.bytes for state in self.states)

    def has(self, layer: int, op: str) -> bool:
        """Whether a layer has state of an op (``StateKind.op``)."""
        return (layer, op, 0) in self._serving

    def find(self, layer: int, op: str, part: int = 0) -> tuple[Any, int]:
        """The state that serves an op of a layer, a kind with that op's methods, and the index of its group."""
        return self._serving[layer, op, part]

    def recorded(self, op: str, blocks: Sequence[Sequence[int]], length: int) -> Tensor | None:
        """[length, L, K] int32 on the CPU: what each of L layers recorded of every token of a sequence.

        Args:
            op: "record_routing" (experts of layers of experts) or "record_selection" (positions of layers with an
                indexer, -1 behind the last one).
            blocks: the sequence's table in each group.
            length: tokens of the sequence.

        Returns:
            None where no layer records that.
        """
        layers = sorted(layer for layer, found, _ in self._serving if found == op)
        if not layers:
            return None
        with torch.inference_mode(False):  # what training reads later must be an ordinary tensor
            serving = [self._serving[layer, op, 0] for layer in layers]
            return torch.cat([state.read(blocks[group], length)[0] for state, group in serving], 1).cpu()

    def copy_blocks(self, copies: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Run each group's (source, destination) block copies in its layers, as if one after the other."""
        for state, group in zip(self.states, self.members, strict=True):
            if copies[group]:
                state.fork(copies[group])

    def swap_out(self, blocks: Sequence[Sequence[int]]) -> list[Rows]:
        """Copies of each group's ``blocks`` on the CPU, tensors of each state; the blocks may then be freed."""
        return [state.swap_out(blocks[group]) for state, group in zip(self.states, self.members, strict=True)]

    def swap_in(self, blocks: Sequence[Sequence[int]], host: Sequence[Rows]) -> None:
        """Put what ``swap_out`` returned into each group's ``blocks``: any blocks, as many as were swapped out."""
        for state, group, saved in zip(self.states, self.members, host, strict=True):
            state.swap_in(blocks[group], saved)

    @property
    def group_bytes(self) -> list[int]:
        """Bytes of a block of each group over all its layers."""
        totals = [0] * len(self.groups)
        for state, group in zip(self.states, self.members, strict=True):
            totals[group] += state.block_bytes(state.spec, self.block_size, self.dtype)
        return totals

    def pack(self, group: int, blocks: Sequence[int]) -> Tensor:
        """[B, bytes] uint8 on the CPU: the contents of ``blocks`` of a group, all of its layers in a row."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self.device)
        parts = [store[index].view(len(blocks), -1).view(torch.uint8) for store in self._stores(group)]
        return torch.cat(parts, 1).cpu()

    def unpack(self, group: int, blocks: Sequence[int], packed: Sequence[Tensor]) -> None:
        """Put blocks that ``pack`` returned into ``blocks`` of that group."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self.device)
        stores = self._stores(group)
        sizes = [store[0].nbytes for store in stores]
        parts = torch.stack(list(packed)).to(self.device).split(sizes, 1)
        for store, part in zip(stores, parts, strict=True):
            aligned = part.clone(memory_format=torch.contiguous_format)
            store[index] = aligned.view(store.dtype).view(-1, *store.shape[1:])

    def _stores(self, group: int) -> list[Tensor]:
        return [store for state, member in zip(self.states, self.members) if member == group for store in state.stores]

    def sleep(self) -> None:
        """Free all memory; contents are lost. The tensors stay the same objects, so captured graphs stay valid."""
        for state in self.states:
            state.sleep()

    def wake(self) -> None:
        """Allocate the memory again."""
        for state in self.states:
            state.wake()
