"""Cached prefixes in files, for other processes with the same model."""

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.engine.backend import Backend
from toolkit.engine.fingerprint import fingerprint_text, numerics_fingerprint
from toolkit.errors import ToolkitError
from toolkit.patching.weights.fingerprint import model_fingerprint
from toolkit.state import BlockManager, PrefixKey, StatePool, WeightKeys
from toolkit.state.offloading import PrefixOffloading
from toolkit.state.offloading.entries import Entry, EntryId, node_digest
from toolkit.state.offloading.files import read_entries, write_entries

_FILE_BYTES = 1 << 26
_AT_ONCE = 64  # blocks that are copied out of the pool together


@dataclass(frozen=True, slots=True)
class PrefixFiles:
    """What was saved or loaded.

    Args:
        num_blocks: of state.
        num_bytes: of their contents.
        num_skipped: blocks that were not loaded: of damaged files, of files that are no prefixes or those of another
            model, adapter, numerics mode, layout of state, version or device. A file that cannot be read counts as one.
        fingerprint_seconds: that it took to hash the model; 0 where it was known.
    """

    num_blocks: int
    num_bytes: int
    num_skipped: int = 0
    fingerprint_seconds: float = 0.0


class SavedPrefixes:
    """Saves and loads the cached prefixes of an engine.

    Args:
        backend: the model.
        pool: of the state.
        block_manager: of its blocks.
        offloading: behind them; None for none.
    """

    def __init__(
        self, backend: Backend, pool: StatePool, block_manager: BlockManager, offloading: PrefixOffloading | None
    ) -> None:
        self._backend = backend
        self._pool = pool
        self._block_manager = block_manager
        self._offloading = offloading
        self._known: tuple[WeightKeys, str] | None = None

    def save(self, folder: str | Path, current: WeightKeys) -> PrefixFiles:
        """Write the cached prefixes of the ``current`` weights, offloaded ones too, into a folder.

        They take the place of those that were saved there for the same model. The model is hashed, once for each
        version of its weights: all of its bytes are read.

        Raises:
            ToolkitError: for a backend that is no Hugging Face model.
        """
        fingerprint, seconds = self._fingerprint(current)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"prefixes-{fingerprint[:16]}"
        before = set(folder.glob(f"{name}-*.safetensors"))
        run = hashlib.sha256(str(time.time_ns()).encode()).hexdigest()[:8]
        written, num_blocks, num_bytes = set(), 0, 0
        for at, entries in enumerate(_in_files(self._entries(current))):
            path = folder / f"{name}-{run}-{at:05d}.safetensors"
            write_entries(path, entries, fingerprint, sync=True)
            written.add(path)
            num_blocks += len(entries)
            num_bytes += sum(one.content.nbytes for one in entries)
        for path in before - written:
            path.unlink(missing_ok=True)
        return PrefixFiles(num_blocks, num_bytes, fingerprint_seconds=seconds)

    def load(self, folder: str | Path, current: WeightKeys) -> PrefixFiles:
        """Read what ``save`` wrote, perhaps in another process, into host memory and disk.

        Only what this model computed counts, with the same weights, settings, versions and kind of device; all else is
        skipped and counted. The adapters in the model are a part of it.

        Raises:
            ToolkitError: without kv_host_space and kv_disk_space, for no folder, or for a backend that is no Hugging
                Face model.
        """
        if self._offloading is None:
            raise ToolkitError("kv_host_space must be > 0 or None to load prefixes, got 0.")
        if not Path(folder).is_dir():
            raise ToolkitError(f"folder must be one that save_prefixes wrote, got '{folder}'.")
        fingerprint, seconds = self._fingerprint(current)
        keys = {key.adapter: key for key in _keys(current)}
        num_blocks = num_bytes = num_skipped = 0
        for path in sorted(Path(folder).glob("*.safetensors")):
            entries, skipped = read_entries(path, fingerprint, keys, self._offloading.sizes)
            num_skipped += skipped
            for one in entries:
                num_blocks += 1
                num_bytes += one.content.nbytes
                self._offloading.put(one)
        return PrefixFiles(num_blocks, num_bytes, num_skipped, seconds)

    def _fingerprint(self, current: WeightKeys) -> tuple[str, float]:
        """(the fingerprint of everything that state depends on besides keys and tokens, seconds to make it)."""
        if self._known is not None and self._known[0] == current:
            return self._known[1], 0.0
        backend: Any = self._backend
        if not hasattr(backend, "model"):
            raise ToolkitError(
                "model must be a Hugging Face model to save or load prefixes, whose weights are hashed, got a backend."
            )
        started = time.perf_counter()
        parts = [model_fingerprint(backend.model), fingerprint_text(numerics_fingerprint(backend))]
        parts += [str(self._pool.dtype), str(self._pool.block_size)]
        parts += [repr(self._pool.groups), repr(self._pool.specs), repr([type(one) for one in self._pool.states])]
        fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        self._known = current, fingerprint
        return fingerprint, time.perf_counter() - started

    def _entries(self, current: WeightKeys) -> Iterator[Entry]:
        """What is computed under ``current``, each block once: of the offloading, then of the pool."""
        there: set[EntryId] = set()
        weights = {_weights_of(key) for key in _keys(current)}
        for one in self._offloading.entries() if self._offloading is not None else ():
            if _weights_of(one.key) in weights:
                there.add(one.id)
                yield one
        for group, allocator in enumerate(self._block_manager.allocators):
            nodes = [
                node
                for node in allocator.prefix_index.registered()
                if _weights_of(node.key) in weights and (group, node_digest(node)) not in there
            ]
            for start in range(0, len(nodes), _AT_ONCE):
                some = nodes[start : start + _AT_ONCE]
                packed = self._pool.pack(group, [node.block for node in some if node.block is not None])
                for node, content in zip(some, packed, strict=True):
                    yield Entry((group, node_digest(node)), node.key, content.clone())


def _keys(current: WeightKeys) -> list[PrefixKey]:
    return [current.active, *(key for key, _ in current.adapters.values())]


def _weights_of(key: PrefixKey) -> tuple[int, str | None, int]:
    return key.weights, key.adapter, key.adapter_version


def _in_files(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """The entries of each file."""
    some: list[Entry] = []
    size = 0
    for one in entries:
        some.append(one)
        size += one.content.nbytes
        if size >= _FILE_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some
