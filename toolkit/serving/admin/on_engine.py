"""What an administrator asks for, on the engine's thread; what it refuses is about a field of the request."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from toolkit.engine import AsyncEngine, EngineUnavailable
from toolkit.errors import ToolkitError
from toolkit.serving.errors import RequestError

Result = TypeVar("Result")


async def on_engine(engine: AsyncEngine, function: Callable[[], Result], fields: Sequence[str]) -> Result:
    """What ``function`` returns, which runs between two steps.

    Args:
        fields: of the request. An error that begins with the name of one is about it, others are about the last.

    Raises:
        RequestError: ``function`` raised ToolkitError.
        EngineUnavailable: the engine has ended.
    """
    try:
        return await asyncio.to_thread(engine.call, function)
    except EngineUnavailable:
        raise
    except ToolkitError as error:
        field = next((name for name in fields if str(error).startswith(f"{name} ")), fields[-1])
        raise RequestError(str(error), field) from None
