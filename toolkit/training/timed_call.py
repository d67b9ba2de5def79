"""A call of a plain function that ends after some seconds."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any


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
