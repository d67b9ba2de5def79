"""Tiles of the Triton GEMM kernels, and how one is looked up.

A kernel's table is data, in the ``tiles.py`` of its op. A tile is chosen by the architecture, the dtype and the sizes
of the weight (N, K), never by the number of tokens, rows or sequences: the tile fixes the reduction order, so a tile
that followed the batch would change bits with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from toolkit.errors import ToolkitError
from toolkit.ops.triton_devices import check_gemm_dtype

T = TypeVar("T")

# Elements. Rows whose width is no multiple of this are not aligned: loads go element by element, and a large tile
# would spill.
ALIGNMENT = 16
# Rows for which a decode tile may stand in at most.
DECODE_ROWS = 64


@dataclass(frozen=True)
class GemmTile:
    """The tile of one program: ``rows`` x ``columns`` outputs (M x N), in steps of ``depth`` along K.

    warps, stages: Triton's num_warps and num_stages.
    group: row tiles that run together, column by column, so that the weights they read stay in L2.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8

    def options(self) -> dict[str, Any]:
        """The launch options, as keywords. Floating-point contraction is off in every kernel."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}


# Choices by size, smallest limit first: ((largest size, choice), ...); a limit of None takes every size.
Choices = tuple[tuple[int | None, T], ...]


@dataclass(frozen=True)
class TileTable(Generic[T]):
    """The tiles of one kernel.

    op, size_name: the op and what its choices go by, for error sentences.
    entries: architecture -> bytes per element -> choices by N (or by the head dimension).
    unaligned: architecture -> bytes per element -> the tile for matrices whose rows are not aligned.
    measured: architecture -> the device, the version of Triton and the day of the measurement that chose its tiles.
        Those of an architecture that is not in it were measured nowhere: they are what compiles without spills.
    """

    op: str
    entries: Mapping[str, Mapping[int, Choices[T]]]
    unaligned: Mapping[str, Mapping[int, T]] = field(default_factory=dict)
    size_name: str = "N"
    measured: Mapping[str, str] = field(default_factory=dict)

    def find(self, arch: str, dtype: torch.dtype, size: int = 0, *, row_widths: tuple[int, ...] = ()) -> T:
        """The tile for an architecture and a dtype.

        Args:
            size: N of the GEMM, or the larger head dimension of attention.
            row_widths: elements per row of each matrix that the kernel loads along its rows.

        Raises:
            ToolkitError: for a dtype that the kernel does not take, or a size above the largest limit.
        """
        check_gemm_dtype(self.op, dtype, arch)
        unaligned = self.unaligned.get(arch, {}).get(dtype.itemsize)
        if unaligned is not None and any(width % ALIGNMENT for width in row_widths):
            return unaligned
        largest: int | None = 0
        for largest, choice in self.entries[arch][dtype.itemsize]:
            if largest is None or size <= largest:
                return choice
        raise ToolkitError(f"{self.size_name} must be <= {largest} in the Triton kernels of {self.op}, got {size}.")


def for_any_size(tiles: Mapping[str, Mapping[int, T]]) -> dict[str, dict[int, Choices[T]]]:
    """Table entries of one tile per architecture and dtype, for every size."""
    return {arch: {itemsize: ((None, tile),) for itemsize, tile in row.items()} for arch, row in tiles.items()}


def float32_precision(arch: str, dtype: torch.dtype) -> str:
    """The input precision of a GEMM of float32 sums with ``dtype``.

    Three TF32 GEMMs on NVIDIA, which are exact beyond the rounding of 16-bit dtypes. float32 is IEEE everywhere (AMD's
    matrix units have such an instruction).
    """
    return "tf32x3" if arch.startswith("sm_") and dtype.itemsize == 2 else "ieee"
