"""What a request may cost before the engine sees it.

JSON objects are built, and texts converted, while Python's lock is held, which every stream of the server waits for. So
each thing that a body can hold many of has a bound, and is counted before it is built or after the first step that can
count it.
"""

import ctypes
import re

from toolkit.errors import ToolkitError

MAX_BODY_SIZE = 4 * 2**20
SMALL_BODY = 2**18
"""Bytes of a body that is parsed without a look at its structure: at worst that takes some hundredths of a second."""
MAX_ITEMS = {b"[": 2**15, b"{": 2**15, b":": 2**16, b",": 2**19, b'"': 2**18}
"""Of a larger body's lists, objects, fields, values and quotes."""
MAX_DIGITS = 400
"""Of one number of a larger body; float64 has no more."""
_LONG_NUMBER = re.compile(rb"\d{%d}" % (MAX_DIGITS + 1))


def check_structure(raw: bytes) -> None:
    """Raise ToolkitError for a body that takes too long to parse. Texts in it may be as long as the body."""
    if len(raw) <= SMALL_BODY:
        return
    # Backslashes stand in texts only.
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
    _count(plain, b'"')
    outside = b"".join(plain.split(b'"')[::2])
    for mark in MAX_ITEMS:
        _count(outside, mark)
    if _LONG_NUMBER.search(outside):
        raise ToolkitError(f"The request body must have numbers of <= {MAX_DIGITS} digits.")


def _count(text: bytes, mark: bytes) -> None:
    count, most = text.count(mark), MAX_ITEMS[mark]
    if count > most:
        raise ToolkitError(f"The request body must have '{mark.decode()}' <= {most} times, got {count}.")


def give_back_memory() -> None:
    """Hand freed memory to the operating system, where the C library keeps it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
