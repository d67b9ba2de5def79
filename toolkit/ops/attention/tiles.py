"""Tile sizes of the Triton attention kernels, as data.

Chosen by (architecture, dtype, head_dim), never by the number of tokens, queries or sequences: the tile of
keys fixes the order in which a row is summed, so a size that followed the batch would change bits with it.

``rows``    query rows of a program (queries x the query heads that share a key/value head)
``keys``    keys of a step, anchored at key 0 of the sequence
``warps``, ``stages``   what Triton calls num_warps and num_stages
``slice``   how much of the head dimension a product of the dq kernel takes at a time; 0: all of it
"""

from dataclasses import dataclass

import torch

from toolkit.errors import ToolkitError

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Tile:
    rows: int
    keys: int
    warps: int
    stages: int
    slice: int = 0


# architecture -> bytes an element -> ((largest head_dim, tile), ...), smallest head_dim first.
Table = dict[str, dict[int, tuple[tuple[int, Tile], ...]]]

FORWARD: Table = {
    "sm_80": {
        2: ((64, Tile(64, 64, 4, 3)), (128, Tile(64, 32, 4, 2)), (256, Tile(64, 32, 8, 2))),
        4: ((64, Tile(32, 32, 4, 2)), (128, Tile(32, 16, 4, 1)), (256, Tile(16, 16, 4, 1))),
    },
    "sm_90": {
        2: ((64, Tile(64, 64, 4, 3)), (128, Tile(64, 64, 4, 3)), (256, Tile(64, 64, 8, 2))),
        4: ((64, Tile(32, 32, 4, 2)), (128, Tile(32, 16, 4, 1)), (256, Tile(16, 16, 4, 1))),
    },
    "sm_100": {
        2: ((64, Tile(64, 64, 4, 3)), (128, Tile(64, 64, 4, 2)), (256, Tile(64, 32, 8, 2))),
        4: ((64, Tile(32, 32, 4, 2)), (128, Tile(32, 16, 4, 1)), (256, Tile(16, 16, 8, 1))),
    },
    "gfx942": {
        2: ((64, Tile(64, 64, 4, 1)), (128, Tile(64, 64, 4, 1)), (256, Tile(32, 32, 4, 1))),
        4: ((64, Tile(32, 32, 4, 1)), (128, Tile(32, 32, 4, 1)), (256, Tile(32, 16, 4, 1))),
    },
    "interpreter": {
        2: ((256, Tile(16, 16, 1, 1)),),
        4: ((256, Tile(16, 16, 1, 1)),),
    },
}

# The kernel that owns rows of queries and gives dq. NVIDIA's matrix units have no IEEE float32 product: a thread
# holds whole rows of both operands, so float32 takes its products in slices of the head, or it would spill.
BACKWARD_QUERIES: Table = {
    "sm_80": {
        2: ((64, Tile(32, 64, 4, 2)), (128, Tile(32, 64, 4, 1)), (256, Tile(16, 32, 4, 1))),
        4: ((64, Tile(16, 16, 4, 1, 32)), (128, Tile(16, 16, 8, 1)), (256, Tile(32, 16, 8, 1, 64))),
    },
    "sm_90": {
        2: ((64, Tile(64, 64, 4, 2)), (128, Tile(64, 64, 8, 1)), (256, Tile(32, 32, 8, 1))),
        4: ((64, Tile(16, 16, 4, 1, 32)), (128, Tile(16, 16, 8, 1)), (256, Tile(32, 16, 8, 1, 64))),
    },
    "sm_100": {
        2: ((64, Tile(64, 64, 4, 2)), (128, Tile(64, 64, 8, 1)), (256, Tile(64, 32, 8, 1))),
        4: ((64, Tile(16, 16, 4, 1, 32)), (128, Tile(16, 16, 8, 1)), (256, Tile(32, 16, 8, 1, 64))),
    },
    "gfx942": {
        2: ((64, Tile(32, 32, 4, 1)), (128, Tile(32, 32, 4, 1)), (256, Tile(16, 16, 4, 1))),
        4: ((64, Tile(16, 16, 4, 1)), (128, Tile(16, 16, 4, 1)), (256, Tile(16, 16, 4, 1))),
    },
    "interpreter": {
        2: ((256, Tile(16, 16, 1, 1)),),
        4: ((16, Tile(16, 16, 1, 1)), (256, Tile(16, 16, 1, 1, 16))),
    },
}

# The kernel that owns rows of keys and gives dk, dv.
BACKWARD_KEYS: Table = {
    "sm_80": {
        2: ((64, Tile(32, 64, 4, 2)), (128, Tile(32, 64, 8, 1)), (256, Tile(16, 32, 8, 1))),
        4: ((64, Tile(16, 16, 4, 1)), (128, Tile(16, 16, 8, 1)), (256, Tile(16, 16, 8, 1))),
    },
    "sm_90": {
        2: ((64, Tile(32, 64, 4, 2)), (128, Tile(32, 64, 8, 1)), (256, Tile(32, 32, 8, 1))),
        4: ((64, Tile(16, 16, 4, 1)), (128, Tile(16, 16, 8, 1)), (256, Tile(16, 16, 8, 1))),
    },
    "sm_100": {
        2: ((64, Tile(64, 64, 8, 1)), (128, Tile(64, 64, 8, 1)), (256, Tile(32, 32, 8, 1))),
        4: ((64, Tile(16, 16, 4, 1)), (128, Tile(16, 16, 8, 1)), (256, Tile(16, 16, 8, 1))),
    },
    "gfx942": BACKWARD_QUERIES["gfx942"],
    "interpreter": FORWARD["interpreter"],
}


def architecture(device: torch.device) -> str:
    """The row of the tables that serves ``device``; CPU tensors mean Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # 12.x is consumer Blackwell: mma.sync and about 100 KiB of shared memory, so it takes sm_80's tiles.
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def tile(table: Table, arch: str, dtype: torch.dtype, head_dim: int) -> Tile:
    """The tile for an architecture, an element type and the larger of the two head dimensions."""
    if arch == "interpreter" and dtype == torch.bfloat16:  # it would multiply the raw 16-bit integers
        raise ToolkitError("attention got dtype bfloat16 on CPU; Triton's interpreter takes float32 and float16.")
    for limit, choice in table[arch].get(dtype.itemsize, ()):
        if head_dim <= limit:
            return choice
    raise ToolkitError(
        f"attention has no Triton tile for dtype {dtype} with head_dim {head_dim}; "
        f"allowed are float32, bfloat16 and float16 with head_dim up to {MAX_HEAD_DIM}."
    )
