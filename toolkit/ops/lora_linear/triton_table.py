"""Where the adapters of a batch lie, as a table on the device, and which of its entries each row takes.

A unit is one slice of an adapter. Kernels read the addresses, strides and rank of a unit from the table, so that
adapters of any rank stay where they are. The table is a function of those numbers and kept by them: a step with
the adapters of an earlier one uploads nothing.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from toolkit.ops.lora_linear import tiles
from toolkit.ops.tiles import ALIGNMENT

# Columns of the table: an address, and the elements from one row to the next.
A_ADDRESS, A_STRIDE, B_ADDRESS, B_STRIDE, RANK, SCALE_ADDRESS = (tl.constexpr(at) for at in range(6))
FIELDS = tl.constexpr(8)
_KEPT = 4096  # tables; a layer has one, or a few
_TABLES: "OrderedDict[Any, Units]" = OrderedDict()


@triton.jit
def field(table, unit, FIELD: tl.constexpr):
    """One number of a unit, int64."""
    return tl.load(table + unit.to(tl.int64) * FIELDS + FIELD)


@triton.jit
def rows_at(table, unit, ADDRESS: tl.constexpr, STRIDE: tl.constexpr, like, ALIGNED: tl.constexpr):
    """(pointer to the first element, elements from one row to the next) of a unit's matrix of the dtype of ``like``."""
    address, stride = field(table, unit, ADDRESS), field(table, unit, STRIDE)
    if ALIGNED:
        address, stride = tl.multiple_of(address, 16), tl.multiple_of(stride, 16)
    return address.to(tl.pointer_type(like.dtype.element_ty)), stride


@dataclass(frozen=True)
class Units:
    """The units of a list of adapters.

    table: [units, FIELDS] int64. factors: [units] float32, the scaling.
    first, slices: [adapters] int64, an adapter's first unit and how many it has.
    firsts: the same first units on the host, and how many there are in all.
    width: columns that hold every rank: a whole number of blocks of ranks.
    """

    table: torch.Tensor
    factors: torch.Tensor
    first: torch.Tensor
    slices: torch.Tensor
    firsts: tuple[int, ...]
    width: int

    @property
    def count(self) -> int:
        return self.firsts[-1]


@dataclass(frozen=True)
class Grouped:
    """Rows by unit: ``order`` [T] lists them, ``starts`` [units + 2] is where the group of each unit begins.

    Group 0 holds the rows without adapter, group u + 1 those of unit u; from starts[units + 1] on are the rows of
    adapters, or slices, that do not exist.
    """

    order: torch.Tensor
    starts: torch.Tensor
    units: int
    rows: int

    def tiles(self, size: int) -> int:
        """A bound on the tiles of ``size`` rows, from shapes."""
        return self.rows // size + self.units + 2


def group_rows(units: torch.Tensor, count: int) -> Grouped:
    """Group rows by unit on their device, in their order, with no host sync."""
    ids, order = torch.sort(units, stable=True)
    bounds = torch.searchsorted(ids, torch.arange(count + 1, device=ids.device))
    return Grouped(order, torch.cat([bounds.new_zeros(1), bounds]), count, units.numel())


def unit_of_rows(adapters: torch.Tensor, groups: torch.Tensor | None, units: Units) -> torch.Tensor:
    """The unit of each row; negative: no adapter, ``units.count``: none that exists."""
    adapters_count = len(units.firsts) - 1
    if groups is None and units.count == adapters_count:
        return adapters
    adapter = adapters.clamp(0, adapters_count - 1)
    group = torch.zeros_like(adapters) if groups is None else groups
    exists = (adapters < adapters_count) & (group >= 0) & (group < units.slices[adapter])
    unit = torch.where(exists, units.first[adapter] + group, units.count)
    return torch.where(adapters < 0, adapters, unit)


def readable(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The adapters as the kernels read them: rows adjacent within, those of a aligned where their length allows it.

    One that lies otherwise is copied.
    """
    return [_rows(one, one.shape[-1] % ALIGNMENT == 0) for one in a], [_rows(one, False) for one in b]


def _rows(one: torch.Tensor, aligned: bool) -> torch.Tensor:
    adjacent = one.shape[-1] <= 1 or one.stride(-1) == 1
    outer = one.stride()[:-1]
    odd = aligned and (one.data_ptr() % 16 != 0 or any(stride % ALIGNMENT for stride in outer))
    return one if adjacent and not odd else one.clone(memory_format=torch.contiguous_format)


def units_of(
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scaling: Sequence[float],
    column_scales: Sequence[torch.Tensor],
    device: torch.device,
) -> Units:
    """The units of adapters that are ``readable``; column_scales are adjacent, empty for plain LoRA."""
    scales = [scale.data_ptr() if scale.numel() else 0 for scale in column_scales] or [0] * len(a)
    key = device, tuple(scaling), tuple(scales), *(_layout(one) for one in (*a, *b))
    found = _TABLES.get(key)
    if found is None:
        found = _TABLES[key] = _build(a, b, scaling, scales, device)
        if len(_TABLES) > _KEPT:
            _TABLES.popitem(last=False)
    else:
        _TABLES.move_to_end(key)
    return found


def _layout(one: torch.Tensor) -> tuple[Any, ...]:
    return one.data_ptr(), one.shape, one.stride(), one.itemsize


def _build(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scaling: Sequence[float], scales: list[int],
    device: torch.device,
) -> Units:  # fmt: skip
    lines, factors, firsts, slices = [], [], [0], []
    for first, second, factor, scale in zip(a, b, scaling, scales, strict=True):
        count = first.shape[0] if first.dim() == 3 else 1
        steps = [one.stride(0) * one.itemsize if one.dim() == 3 else 0 for one in (first, second)]
        for at in range(count):
            a_address, b_address = (one.data_ptr() + at * step for one, step in zip((first, second), steps))
            lines.append([a_address, first.stride(-2), b_address, second.stride(-2), first.shape[-2], scale, 0, 0])
        factors += [factor] * count
        slices.append(count)
        firsts.append(firsts[-1] + count)
    return Units(
        torch.tensor(lines, dtype=torch.int64).to(device),
        torch.tensor(factors, dtype=torch.float32).to(device),
        torch.tensor(firsts[:-1], dtype=torch.int64).to(device),
        torch.tensor(slices, dtype=torch.int64).to(device),
        tuple(firsts),
        tiles.padded_ranks(max(one.shape[-2] for one in a)),
    )
