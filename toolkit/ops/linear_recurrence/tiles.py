"""Tiles of the Triton kernels of the linear recurrence, as data: by (architecture, dtype of the sums, K, V).

A program holds a block of columns of a head's state, [K, columns], in registers and takes token after token; columns do
not touch each other, so blocks are what a head's work is shared by. Numbers of tokens or segments do not matter.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from toolkit.errors import ToolkitError
from toolkit.ops.tiles import Choices, GemmTile, TileTable
from toolkit.ops.triton_rows import power_of_2

MOST_DEPTH = 256
MOST_WARPS = 8
# Elements of the state that a lane holds. The backward has a state, its gradient and what it reads at hand.
FORWARD_ELEMENTS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "gfx942": 64, "interpreter": 64}
BACKWARD_ELEMENTS = {"sm_80": 16, "sm_90": 16, "sm_100": 16, "gfx942": 16, "interpreter": 16}
# Columns of a block at most. Those of the backward each have a copy of dq and dk, so there are fewer blocks.
FORWARD_COLUMNS = {"sm_80": 16, "sm_90": 16, "sm_100": 16, "gfx942": 32, "interpreter": 16}
BACKWARD_COLUMNS = {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 32, "interpreter": 16}
# Programs of the backward, each with room for the states of a few tokens: as many as are resident at once, about.
BACKWARD_PROGRAMS = {"sm_80": 216, "sm_90": 264, "sm_100": 296, "gfx942": 608, "interpreter": 3}


def tile(op: str, arch: str, depth: int, columns: int, *, backward: bool = False, heads: bool = False) -> GemmTile:
    """The tile for a state of ``depth`` x ``columns`` (K x V).

    Its rows are K, padded to a power of two; a step is one token. With ``heads`` columns are heads of V = 1, whose
    offsets take registers too.

    Raises:
        ToolkitError: for a K that no program holds.
    """
    if depth > MOST_DEPTH:
        raise ToolkitError(f"The head size of k must be <= {MOST_DEPTH} in the Triton kernels of {op}, got {depth}.")
    most, elements = (BACKWARD_COLUMNS, BACKWARD_ELEMENTS) if backward else (FORWARD_COLUMNS, FORWARD_ELEMENTS)
    lane_elements = (64 if arch.startswith("gfx") else 32) * elements[arch] // (4 if heads else 1)  # of a warp
    padded = power_of_2(depth)
    block = min(power_of_2(columns), most[arch], max(1, MOST_WARPS * lane_elements // padded))
    return GemmTile(padded, block, 1, max(1, padded * block // lane_elements), 1)


@dataclass(frozen=True)
class Columns:
    """Columns of V that a program of a chunked kernel takes at a time; warps and stages as Triton's."""

    columns: int
    warps: int
    stages: int = 1

    def options(self) -> dict[str, Any]:
        """The launch options, as keywords."""
        return {
            "COLUMNS": self.columns,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": False,
        }


@dataclass(frozen=True)
class ChunkTile:
    """How the chunked kernels split a call.

    chunk: tokens of a chunk. depth: K as a tile has it, set by ``chunk_tile``.
    parts, walk, back, grads: the kernels ``chunk_parts``, ``chunk_walk`` (and the paged one), ``chunk_walk_back`` and
        ``chunk_grads``.
    """

    chunk: int
    parts: Columns
    walk: Columns
    back: Columns
    grads: Columns
    depth: int = 0


def _by_depth(small: ChunkTile, large: ChunkTile) -> Choices[ChunkTile]:
    return (128, small), (MOST_DEPTH, large)


# Not measured on any device: chosen by what compiles without spills, which chunks of 64 do not on sm_90. There is no
# float32 on a device: it has no matrix unit on NVIDIA, and without one a chunk is not worth its products.
_HALF = _by_depth(
    ChunkTile(32, Columns(32, 4), Columns(32, 4), Columns(32, 4), Columns(16, 8)),
    ChunkTile(16, Columns(32, 4), Columns(16, 4), Columns(16, 4), Columns(16, 8)),
)
_AMD_HALF = _by_depth(
    ChunkTile(32, Columns(32, 4), Columns(32, 4), Columns(32, 4), Columns(16, 4)),
    ChunkTile(16, Columns(32, 4), Columns(16, 4), Columns(16, 4), Columns(16, 4)),
)
_SMALL = ChunkTile(16, Columns(16, 1), Columns(16, 1), Columns(16, 1), Columns(16, 1))
CHUNKS = TileTable(
    "linear_recurrence_chunked",
    {
        "sm_80": {2: _HALF},
        "sm_90": {2: _HALF},
        "sm_100": {2: _HALF},
        "gfx942": {2: _AMD_HALF},
        "interpreter": {2: _by_depth(_SMALL, _SMALL), 4: _by_depth(_SMALL, _SMALL)},
    },
    size_name="The head size of k",
)


def chunk_tile(arch: str, dtype: torch.dtype, depth: int) -> ChunkTile:
    """The tile for heads of K = ``depth``.

    Raises:
        ToolkitError: for a K that no program holds, or for float32 on a device.
    """
    if dtype.itemsize not in CHUNKS.entries[arch]:
        raise ToolkitError(f"dtype must be bfloat16 or float16 in the Triton kernels of {CHUNKS.op}, got {dtype}.")
    return replace(CHUNKS.find(arch, dtype, depth), depth=max(16, power_of_2(depth)))
