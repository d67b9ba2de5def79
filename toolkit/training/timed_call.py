"""Calls of functions that end after some seconds."""

import asyncio
import ctypes
import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from toolkit.training.background_loop import is_async


class TookTooLong(Exception):
    """A call did not return within its time."""


class _Stopped(BaseException):
    """Raised inside of a function whose time is over."""


def timed_call(function: Callable[[], Any], timeout: float) -> Any:
    """What ``function`` returns, or raises.

    It runs on a separate thread. When its time is over an exception is raised in that thread, which ends code in
    Python; code in C (``time.sleep``, a socket) ends when it returns, and what it returns is ignored.

    Args:
        timeout: seconds.

    Raises:
        TookTooLong: the time is over.
    """
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result["value"] = function()
        except _Stopped:
            pass
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=run, name="toolkit-timed-call", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stopped))
        raise TookTooLong
    if "error" in result:
        raise result["error"]
    return result["value"]


async def called_within(
    timeout: float | None, field: str, function: Callable[..., Any], *args: Any, **options: Any
) -> Any:
    """What a plain or an asynchronous function returns. Plain ones run one at a time.

    Args:
        timeout: seconds; None is no bound.
        field: of the recipe, for the error.

    Raises:
        TimeoutError: the time is over.
    """
    try:
        if timeout is None or is_async(function):
            value = function(*args, **options)
        else:
            async with _one_at_a_time:
                value = await asyncio.to_thread(timed_call, lambda: function(*args, **options), timeout)
        return await awaited_within(timeout, value) if inspect.isawaitable(value) else value
    except TookTooLong:
        raise TimeoutError(f"it took longer than {field}, which is {timeout:g} seconds") from None


async def awaited_within(timeout: float | None, awaitable: Awaitable[Any]) -> Any:
    """What is awaited. Raises TookTooLong where it is not there in time; None is no bound."""
    try:
        async with asyncio.timeout(timeout) as bound:
            return await awaitable
    except TimeoutError:
        if bound.expired():
            raise TookTooLong from None
        raise  # the function's own


_one_at_a_time = asyncio.Lock()
"""Of the loop that functions of users run on."""
