"""What shows that a tensor was written, read as a few numbers."""

import ctypes

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_WORD = ctypes.sizeof(ctypes.c_int32)


class WriteStamp:
    """Where a tensor was, and torch's count of writes to it, when the stamp was made.

    Two equal stamps of a tensor show no write between them. Storages are remembered weakly: memory is not kept, and
    what was allocated again at the same address is told apart.

    Args:
        tensor: of any class. What it does not have (memory, a version counter) is left out.
    """

    __slots__ = ("_storage", "address", "sample", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.version = _version(tensor)
        self.address, self._storage = _memory(tensor)
        word = word_at(tensor) if self._storage is not None else None
        self.sample = None if word is None else word.value

    def __eq__(self, other: object) -> bool:
        """Whether both are of the same memory, written as often."""
        return isinstance(other, WriteStamp) and self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]

    def _values(self) -> tuple[object, ...]:
        # The number of a storage is not given to another one while this remembers it.
        storage = None if self._storage is None else self._storage.cdata
        return self.version, self.address, storage, self.sample


def word_at(tensor: Tensor) -> ctypes.c_int32 | None:
    """Four bytes in the middle of a CPU tensor, as a number to be read while its memory lasts; None for another one.

    A whole tensor that is written past the counters (``data.copy_``) all but surely changes them.
    """
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < _WORD or not tensor.is_contiguous():
        return None
    try:
        storage, address = tensor.untyped_storage(), tensor.data_ptr()
        begin = storage.data_ptr()
    except (RuntimeError, NotImplementedError):
        return None
    # A wrapper (a DTensor, say) has the size of what it stands for, and memory of another size or none.
    if not begin or not begin <= address <= begin + storage.nbytes() - size:
        return None
    return ctypes.c_int32.from_address(address + size // 2 // _WORD * _WORD)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _memory(tensor: Tensor) -> tuple[int | None, StorageWeakRef | None]:
    try:
        return tensor.data_ptr(), StorageWeakRef(tensor.untyped_storage())
    except (RuntimeError, NotImplementedError):  # a wrapper around other tensors, or one that is not strided
        return None, None
