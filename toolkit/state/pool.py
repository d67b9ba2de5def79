"""What the blocks of every layer hold. The numbers of the blocks are ``BlockManager``'s; their contents are here."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolkit.ops.attention import attention
from toolkit.state import kinds
from toolkit.state.block_manager import Group
from toolkit.state.kinds import PagedRows, Rows, StateKind, StateSpec

if TYPE_CHECKING:
    from toolkit.state.batch import RaggedBatch


def group_of(spec: StateSpec) -> Group:
    """The group that a layer's state belongs to."""
    kind = kinds.find(spec.kind)
    return Group(kind.lookback(spec), kind.snapshot_interval)


def groups_of(specs: Sequence[StateSpec]) -> tuple[Group, ...]:
    """The groups of a model: those that keep everything first, then by lookback."""
    return tuple(sorted({group_of(spec) for spec in specs}, key=lambda group: (group.lookback != 0, -group.lookback)))


class StatePool:
    """Storage of all layers of a model, one structure for kinds that remember differently.

    specs: what each layer remembers; a layer may have several, of different kinds. num_blocks: how many blocks each of
    ``groups_of(specs)`` has. states, members: each spec's memory, and the index of its group. It is a
    ``RaggedBatch``'s ``state``.
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
        self.recordable = all(state.recordable for state in self.states)
        self.members = [self.groups.index(group_of(spec)) for spec in self.specs]
        self._serving: dict[tuple[int, str], tuple[Any, int]] = {
            (state.spec.layer, state.op): (state, group) for state, group in zip(self.states, self.members, strict=True)
        }

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

    def attend(
        self, batch: "RaggedBatch", layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int,
        softcap: float, modifiers: Mapping[str, Any],
    ) -> Tensor:  # fmt: skip
        """Attention of new tokens over their blocks, after their own keys and values went there."""
        state, group = self._serving[layer, "attend"]
        view = batch.views[group]
        assert isinstance(view, PagedRows)
        state.write((k, v), view, batch.query_offsets)
        keys, values, tables = state.operands(view)
        out, _ = attention(
            q, keys, values, batch.query_offsets, batch.kv_offsets, batch.kv_lengths, tables, self.block_size,
            scale, window, softcap, **modifiers,
        )  # fmt: skip
        return out

    def scan(
        self, batch: "RaggedBatch", layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None,
        scale: float, delta: bool,
    ) -> Tensor:  # fmt: skip
        """A linear recurrence of new tokens from and to their blocks."""
        state, group = self._serving[layer, "scan"]
        return state.scan(q, k, v, g, beta, batch.views[group], batch.query_offsets, scale, delta)

    def convolve(
        self, batch: "RaggedBatch", layer: int, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        """A short convolution of new tokens from and to their blocks."""
        state, group = self._serving[layer, "convolve"]
        return state.convolve(x, weight, bias, activation, batch.views[group], batch.query_offsets)

    def record(self, batch: "RaggedBatch", layer: int, ids: Tensor) -> None:
        """Write the experts ids [T, K] of new tokens into their blocks, where a layer of experts has such."""
        if (layer, "record") in self._serving:
            state, group = self._serving[layer, "record"]
            state.write((ids[:, None],), batch.views[group], batch.query_offsets)

    def recorded_routing(self, blocks: Sequence[Sequence[int]], length: int) -> Tensor | None:
        """[length, L, K] int32 on the host: the experts of every token of a sequence, in each layer of experts.

        blocks: the sequence's table in each group. None where no layer records its routing.
        """
        layers = sorted(layer for layer, op in self._serving if op == "record")
        if not layers:
            return None
        with torch.inference_mode(False):  # what training reads later must be an ordinary tensor
            serving = [self._serving[layer, "record"] for layer in layers]
            return torch.cat([state.read(blocks[group], length)[0] for state, group in serving], 1).cpu()

    def copy_blocks(self, copies: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Run each group's (source, destination) block copies in its layers, as if one after the other."""
        for state, group in zip(self.states, self.members, strict=True):
            if copies[group]:
                state.fork(copies[group])

    def swap_out(self, blocks: Sequence[Sequence[int]]) -> list[Rows]:
        """Copies of each group's ``blocks`` on the host, tensors a state; the blocks may then be freed."""
        return [state.swap_out(blocks[group]) for state, group in zip(self.states, self.members, strict=True)]

    def swap_in(self, blocks: Sequence[Sequence[int]], host: Sequence[Rows]) -> None:
        """Put what ``swap_out`` returned into each group's ``blocks``: any blocks, as many as were swapped out."""
        for state, group, saved in zip(self.states, self.members, host, strict=True):
            state.swap_in(blocks[group], saved)

    def sleep(self) -> None:
        """Give all memory back; contents are lost. The tensors stay the same objects, so recordings stay valid."""
        for state in self.states:
            state.sleep()

    def wake(self) -> None:
        """Take the memory again."""
        for state in self.states:
            state.wake()
