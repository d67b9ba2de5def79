"""Tensors that are looked at again and again for writes: by the native library as one call, or else by passes in C.

After a step that read all weights nothing of this is in a cache, and reading one number after the other waits for each.
The native library asks for all of it at once (``ask_for_all``).
"""

import ctypes
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from toolkit.ops import native
from toolkit.ops.write_stamp import word_at

_VERSION = Tensor._version.__get__  # type: ignore[attr-defined]
_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]
_EXPIRED = torch.UntypedStorage._expired
_VALUE = attrgetter("value")


class TensorWatch(Protocol):
    """What some tensors with memory and version counters were when last looked at; keeps none of them alive.

    Storages are remembered weakly, so that what was allocated again at an old address is told apart.
    """

    def look(self, tensors: Sequence[Tensor]) -> list[int] | None:
        """Indices of those written since the last look, by torch's version counters or a word of their memory.

        None where one is another tensor than at first, or has other memory, shape or strides. Raises RuntimeError or
        TypeError where one is no tensor or has no memory any more.
        """

    def stamps(self) -> list[Any]:
        """Of each tensor what shows a write, at the last look."""

    def ask_for_all(self) -> None:
        """Request the memory that ``look`` reads."""


def watch_tensors(tensors: Sequence[Tensor], impl: str | None = None) -> TensorWatch:
    """A watch of ``tensors``, which all have a version counter (none of them is an inference tensor).

    Of wrappers around other tensors, which have no memory, it sees the counter, the shape and the strides.

    Args:
        tensors: in the order in which they are looked at.
        impl: "cpu" or "reference"; None for the native library where it is there.
    """
    watch = None if impl == "reference" else _class("TensorWatch")
    if watch is None:
        return _PythonWatch(tensors)
    words = [word_at(tensor) for tensor in tensors]
    return _NativeWatch(watch(list(tensors), [0 if word is None else ctypes.addressof(word) for word in words]))


class MemoryHints:
    """Memory of Python objects that is about to be read: requested at once. Nothing without the native library.

    Args:
        dicts: kept alive by this; what they point to is requested too.
        addresses: of objects that may be gone when they are requested (``id``).
    """

    def __init__(self, dicts: Sequence[dict[str, Any]], addresses: Sequence[int]) -> None:
        self._dicts = {id(one): one for one in dicts}
        hints = _class("MemoryHints")
        words = dict.__basicsize__ // ctypes.sizeof(ctypes.c_void_p)
        self._hints = None if hints is None else hints(list(self._dicts), words, _DICT_BYTES, list(addresses))

    def ask_for_all(self) -> None:
        """Request it."""
        if self._hints is not None:
            self._hints.ask_for_all()


_DICT_BYTES = 192  # of a dict's keys or values: some 20 entries


class _NativeWatch:
    def __init__(self, watch: Any) -> None:
        self._watch = watch
        self.ask_for_all = watch.ask_for_all

    def look(self, tensors: Sequence[Tensor]) -> list[int] | None:
        written: list[int] = self._watch.look(tensors)
        return None if written == [-1] else written

    def stamps(self) -> list[Any]:
        return list(self._watch.stamps())


class _PythonWatch:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._ids = list(map(id, tensors))
        self._plain = [at for at, one in enumerate(tensors) if not is_traceable_wrapper_subclass(one)]
        plain = [tensors[at] for at in self._plain]
        self._storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in plain]
        self._storage_ids = [storage.cdata for storage in self._storages]
        self._addresses = list(map(Tensor.data_ptr, plain))
        self._shapes, self._strides, self._versions = _read(tensors)
        words = [(at, word) for at, tensor in enumerate(tensors) if (word := word_at(tensor)) is not None]
        self._rows, self._words = [at for at, _ in words], [word for _, word in words]
        self._samples = list(map(_VALUE, self._words))

    def look(self, tensors: Sequence[Tensor]) -> list[int] | None:
        if (
            list(map(id, tensors)) != self._ids
            or [tensors[at].data_ptr() for at in self._plain] != self._addresses
            or any(map(_EXPIRED, self._storage_ids))
        ):
            return None
        shapes, strides, versions = _read(tensors)
        if (shapes, strides) != (self._shapes, self._strides):
            return None
        samples = list(map(_VALUE, self._words))
        written = {at for at, old, new in zip(range(len(versions)), self._versions, versions) if old != new}
        written |= {at for at, old, new in zip(self._rows, self._samples, samples) if old != new}
        self._versions, self._samples = versions, samples
        return sorted(written)

    def stamps(self) -> list[Any]:
        samples = dict(zip(self._rows, self._samples))
        return [(version, samples.get(at)) for at, version in enumerate(self._versions)]

    def ask_for_all(self) -> None:
        pass


def _read(tensors: Sequence[Tensor]) -> tuple[list[Any], list[Any], list[int]]:
    """Shapes, strides and versions."""
    with torch._C.DisableTorchFunctionSubclass():  # which a wrapper's every attribute would go through
        return list(map(_SHAPE, tensors)), list(map(Tensor.stride, tensors)), list(map(_VERSION, tensors))


def _class(name: str) -> Any | None:
    """A class of the native library; None where the library, or this class of it, is not there."""
    if native.load() is None:
        return None
    try:
        return getattr(torch.classes.toolkit_native, name)
    except RuntimeError:  # a library built from older sources
        return None
