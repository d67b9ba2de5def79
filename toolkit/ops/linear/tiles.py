"""Tiles of the Triton ``linear``, as data: by (architecture, dtype, N), and for few rows by what was measured.

At few rows a tile of many columns leaves most of a device idle. A decode tile stands in for it there only on the
devices, and with the Triton, on which it was measured to give every row the bits of the tile that it stands for:
``measured_tiles.json`` says where and how fast. ``python -m tools.tile_sweep`` measures and writes it. No entry for a
device means not measured there, and one tile serves every number of rows.
"""

import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from toolkit.ops import triton_devices
from toolkit.ops.tiles import DECODE_ROWS, Choices, GemmTile, TileTable

MEASURED = Path(__file__).with_name("measured_tiles.json")

_ENTRIES: dict[str, dict[int, Choices[GemmTile]]] = {
    "sm_80": {
        2: ((4096, GemmTile(128, 128, 32, 4, 4)), (None, GemmTile(128, 256, 32, 8, 3))),
        4: ((None, GemmTile(128, 64, 16, 8, 3)),),
    },
    "sm_90": {
        2: ((4096, GemmTile(128, 128, 64, 4, 3)), (None, GemmTile(128, 256, 64, 8, 4))),
        4: ((None, GemmTile(128, 64, 16, 8, 3)),),
    },
    "sm_100": {
        2: ((4096, GemmTile(128, 128, 64, 4, 3)), (None, GemmTile(128, 256, 64, 8, 4))),
        4: ((None, GemmTile(128, 64, 16, 8, 3)),),
    },
    "gfx942": {
        2: ((4096, GemmTile(128, 128, 64, 4, 2)), (None, GemmTile(256, 256, 64, 8, 2))),
        4: ((None, GemmTile(128, 128, 16, 8, 2)),),
    },
    "interpreter": {
        2: ((24, GemmTile(16, 16, 16, 1, 1, 2)), (None, GemmTile(32, 16, 32, 1, 1, 2))),
        4: ((24, GemmTile(16, 16, 16, 1, 1, 2)), (None, GemmTile(32, 16, 32, 1, 1, 2))),
    },
}

_UNALIGNED = {
    "sm_80": {2: GemmTile(64, 64, 32, 4, 2)},
    "sm_90": {2: GemmTile(64, 64, 32, 4, 2)},
    "sm_100": {2: GemmTile(64, 64, 32, 4, 2)},
    "gfx942": {2: GemmTile(64, 64, 32, 4, 1)},
}

TABLE = TileTable("linear", _ENTRIES, _UNALIGNED)

# Tiles for few rows: of few columns, so that there are many programs, and with deep pipelines. On sm_90 they keep
# wgmma, whose 64 rows are the smallest, and so may be bitwise identical. Used only where they are in MEASURED.
_FEW_ROWS = tuple(GemmTile(64, columns, 128, 4, stages) for columns in (32, 16) for stages in (5, 4))
DECODE_CANDIDATES: dict[str, dict[int, tuple[GemmTile, ...]]] = {
    "sm_80": {2: (GemmTile(64, 32, 64, 4, 5), GemmTile(64, 16, 64, 4, 5)), 4: ()},
    "sm_90": {2: _FEW_ROWS, 4: ()},
    "sm_100": {2: (GemmTile(64, 32, 128, 4, 5), GemmTile(64, 32, 128, 4, 4)), 4: ()},
    "gfx942": {2: (GemmTile(64, 32, 64, 4, 2),), 4: ()},
    "interpreter": {2: (GemmTile(16, 16, 16, 1, 1, 2),), 4: (GemmTile(16, 16, 16, 1, 1, 2),)},
}


def find(device: torch.device, dtype: torch.dtype, outputs: int, depth: int, rows: int) -> GemmTile:
    """The tile of a GEMM of ``rows`` [., K = depth] with a weight [N = outputs, K] on ``device``."""
    base = TABLE.find(triton_devices.architecture(device), dtype, outputs, row_widths=(depth,))
    if rows > DECODE_ROWS:
        return base
    return _decode_tiles(triton_devices.device_name(device)).get((dtype.itemsize, base), base)


@cache
def _decode_tiles(device: str) -> dict[tuple[int, GemmTile], GemmTile]:
    """(bytes per element, tile) -> the decode tile that was measured to be bitwise identical on this device."""
    return decode_tiles(json.loads(MEASURED.read_text(encoding="utf-8")), device, _triton())


def decode_tiles(entries: list[dict[str, Any]], device: str, triton: str) -> dict[tuple[int, GemmTile], GemmTile]:
    """Those of ``entries`` (of MEASURED) that hold for a device and a version of Triton."""
    return {
        (entry["itemsize"], GemmTile(**entry["base"])): GemmTile(**entry["tile"])
        for entry in entries
        if (entry["device"], entry["triton"]) == (device, triton)
    }


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:  # built into another package, as for AMD
        return ""
