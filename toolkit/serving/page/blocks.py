"""``GET /page/blocks``: the blocks of the engine and its prefix tree, for the page."""

import asyncio
from typing import Any

from toolkit.engine.block_map import block_maps
from toolkit.serving.base import Base
from toolkit.serving.errors import Json


def add_blocks(base: Base) -> None:
    """Add the route to an application whose engine has blocks."""
    engine: Any = base.engine

    @base.app.get("/page/blocks", dependencies=base.guarded, include_in_schema=False)
    async def blocks() -> Json:
        return {"groups": await asyncio.to_thread(engine.call, lambda: block_maps(engine.engine))}
