"""``GET /page/blocks``: the blocks of the engine and its prefix tree, as the page draws them; no text is in it."""

import asyncio
from typing import Any

from toolkit.serving.base import Base
from toolkit.serving.errors import Json
from toolkit.state.block_allocator import BlockAllocator
from toolkit.state.prefix_outline import prefix_runs

CELLS = 256
"""Most cells of the drawing; one stands for as many blocks as that takes."""
RUNS = 200
"""Most runs of the prefix tree."""


def drawing(allocator: BlockAllocator) -> Json:
    """The allocator's blocks as cells, and the runs of its prefix tree."""
    per_cell = -(-allocator.num_blocks // CELLS) or 1
    index = allocator.prefix_index
    cells = []
    for first in range(0, allocator.num_blocks, per_cell):
        blocks = range(first, min(first + per_cell, allocator.num_blocks))
        held = sum(allocator.ref_count(block) > 0 for block in blocks)
        cached = sum(block in index and not allocator.ref_count(block) for block in blocks)
        cells.append([held, cached])
    runs = [run._asdict() for run in prefix_runs(allocator, RUNS)]
    return {"block_size": allocator.block_size, "per_cell": per_cell, "cells": cells, "runs": runs}


def add_blocks(base: Base) -> None:
    """Add the route to an application whose engine has blocks."""
    engine: Any = base.engine

    def drawn() -> list[Json]:
        return [drawing(allocator) for allocator in engine.engine.block_manager.allocators if allocator.num_blocks]

    @base.app.get("/page/blocks", dependencies=base.guarded, include_in_schema=False)
    async def blocks() -> Json:
        return {"groups": await asyncio.to_thread(engine.call, drawn)}
