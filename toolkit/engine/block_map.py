"""An engine's blocks and its prefix tree as a page shows them; no text is in it."""

from typing import Any

from toolkit.state.block_allocator import BlockAllocator
from toolkit.state.prefix_outline import prefix_runs

CELLS = 256
"""Most cells of a map; one stands for as many blocks as that takes."""
RUNS = 200
"""Most runs of the prefix tree."""


def block_maps(engine: Any) -> list[dict[str, Any]]:
    """A map of each group of blocks. Belongs to the thread that steps the engine."""
    return [_map(allocator) for allocator in engine.block_manager.allocators if allocator.num_blocks]


def _map(allocator: BlockAllocator) -> dict[str, Any]:
    """The allocator's blocks as cells, each (blocks held, blocks cached), and the runs of its prefix tree."""
    per_cell = -(-allocator.num_blocks // CELLS)
    index = allocator.prefix_index
    cells = []
    for first in range(0, allocator.num_blocks, per_cell):
        blocks = range(first, min(first + per_cell, allocator.num_blocks))
        held = sum(allocator.ref_count(block) > 0 for block in blocks)
        cached = sum(block in index and not allocator.ref_count(block) for block in blocks)
        cells.append([held, cached])
    runs = [run._asdict() for run in prefix_runs(allocator, RUNS)]
    return {"block_size": allocator.block_size, "per_cell": per_cell, "cells": cells, "runs": runs}
