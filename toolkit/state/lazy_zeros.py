"""Zeros that take no memory until they are written. ``torch.zeros`` writes every page of the host's memory."""

import ctypes
import mmap
from functools import cache

import torch
from torch import Tensor


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As ``torch.zeros``; on the CPU a page is only taken once something is written to it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    made = torch.empty(shape, dtype=dtype)
    clear(made)
    return made


def clear(x: Tensor) -> None:
    """Fill a contiguous tensor with zeros; on the CPU its whole pages go back to the system, which reads them as 0."""
    size, page = x.nbytes, mmap.PAGESIZE
    if x.device.type != "cpu" or size < 2 * page or not x.is_contiguous():
        x.zero_()
        return
    start = x.data_ptr()
    first, end = -(-start // page) * page, (start + size) // page * page
    if _give_back(first, end - first):
        raw = x.view(-1).view(torch.uint8)
        raw[: first - start].zero_()
        raw[end - start :].zero_()
    else:
        x.zero_()


def _give_back(address: int, size: int) -> bool:
    """Whether the system took the pages: those of private memory are zeros when they are touched again."""
    madvise, advice = _madvise(), getattr(mmap, "MADV_DONTNEED", None)
    return madvise is not None and advice is not None and madvise(address, size, advice) == 0


@cache
def _madvise() -> "ctypes._NamedFuncPointer | None":
    # Only Linux promises zeros afterwards.
    function = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_DOFORK") else None
    if function is not None:
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function
