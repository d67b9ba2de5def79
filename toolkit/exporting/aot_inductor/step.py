"""A patched model's step as a function of tensors alone, which ``torch.export`` traces.

Shapes: T new tokens, S sequences, R rows, W columns of a block table, N stored states, B blocks, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from toolkit.patching.forward import context_forward
from toolkit.state import PagedContext, PagedRows, RaggedBatch, Snapshots, StatePool, StateSpec
from toolkit.state.pool import groups_of

BLOCK_SIZE = 16
_SMALLEST = 2
"""Of every dynamic size: torch.export specialises programs for 0 and 1."""
_COMMON = (
    ("tokens", ("T",)),
    ("positions", ("T",)),
    ("query_offsets", ("S+1",)),
    ("kv_lengths", ("S",)),
    ("rows", ("R",)),
)


class Input(NamedTuple):
    """An argument of the step. sizes: a letter of a dynamic size, "S+1", or a number."""

    name: str
    sizes: tuple[str | int, ...]
    dtype: torch.dtype


class Step(nn.Module):
    """Logits [R, V] at ``rows`` of a ragged batch, whose state is written in place into the tensors that are given.

    Its arguments are the tensors of ``inputs``, in that order.

    Args:
        model: patched.
        specs: what its layers remember.
        dtype: of its activations.
    """

    def __init__(self, model: nn.Module, specs: Sequence[StateSpec], dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        # One block each: the shapes are read, the memory is not.
        self.pool = StatePool(specs, dict.fromkeys(groups_of(specs), 1), BLOCK_SIZE, dtype)

    @property
    def inputs(self) -> list[Input]:
        """What the step takes: the batch, where it lies in each group of layers, and the stores of every state."""
        found = [Input(name, sizes, torch.int64) for name, sizes in _COMMON]
        views: dict[str, tuple[str, ...]]
        for at, group in enumerate(self.pool.groups):
            if group.snapshot_interval:
                views = {"load_blocks": ("S",), "store_rows": (f"N{at}",), "store_blocks": (f"N{at}",)}
            else:
                views = {"block_tables": ("S", f"W{at}"), "slot_mapping": ("T",)}
            found += [Input(f"{name}.{at}", sizes, torch.int64) for name, sizes in views.items()]
        for state, member in zip(self.pool.states, self.pool.members):
            for at, store in enumerate(state.stores):
                name = f"state.{member}.{state.kind}.{state.spec.layer}.{state.spec.part}.{at}"
                found.append(Input(name, (f"B{member}", *store.shape[1:]), store.dtype))
        return found

    def forward(self, *given: Tensor) -> Tensor:
        tensors = iter(given)
        tokens, positions, query_offsets, kv_lengths, rows = (next(tensors) for _ in _COMMON)
        views: list[PagedRows | Snapshots] = []
        for group in self.pool.groups:
            if group.snapshot_interval:
                views.append(Snapshots(next(tensors), next(tensors), next(tensors)))
            else:
                views.append(PagedRows(next(tensors), next(tensors)))
        stores = [tuple(next(tensors) for _ in state.stores) for state in self.pool.states]
        batch = RaggedBatch(
            tokens, positions, query_offsets, torch.zeros_like(kv_lengths), kv_lengths, views=tuple(views)
        )
        return context_forward(self.model, PagedContext(batch, self.pool.with_stores(stores)), rows)


def example(inputs: Sequence[Input]) -> tuple[list[Tensor], list[Any]]:
    """Arguments of a step, and their dynamic shapes.

    They are those of a prefill: two sequences of two tokens and one of three rows that are padding.
    """
    sizes = {"T": 7, "S": 3, "S+1": 4, "R": 5}
    letters: dict[str, Any] = {one: Dim(f"size_{one}", min=_SMALLEST) for one in _letters(inputs) if one != "S+1"}
    letters["S+1"] = letters["S"] + 1
    offsets, lengths = torch.tensor([0, 2, 4, 4]), torch.tensor([2, 2, 0])
    arguments, shapes = [], []
    for one in inputs:
        shape = [sizes.get(size, 6) if isinstance(size, str) else size for size in one.sizes]
        plain = torch.zeros(shape, dtype=one.dtype)
        arguments.append({"query_offsets": offsets, "kv_lengths": lengths}.get(one.name, plain))
        shapes.append({at: letters[size] for at, size in enumerate(one.sizes) if isinstance(size, str)})
    return arguments, shapes


def _letters(inputs: Sequence[Input]) -> dict[str, None]:
    return {size: None for one in inputs for size in one.sizes if isinstance(size, str)}
