"""Saved weights that requests sample: adapters in the engine beside those that are trained.

A saved version is loaded when it is sampled for the first time, and leaves the model when others have been sampled
since; its folder is read again then.
"""

import itertools
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from toolkit.engine import AsyncEngine, EngineUnavailable
from toolkit.errors import ToolkitError
from toolkit.live.tenant import Tenant
from toolkit.sentences import shown

Content = tuple[Path, int, int]
"""A folder with what it had when it was loaded: another checkpoint of the same name is another one."""


@dataclass(frozen=True)
class SamplingTarget:
    """What a sampling session samples.

    Args:
        folder: of saved weights.
        tenant: whose weights of now are sampled, where ``folder`` is None; None for the base model.
        path: of saved weights, as clients name it.
        version: of the tenant's weights, the only ones that are sampled; None for any.
    """

    folder: Path | None = None
    tenant: Tenant | None = None
    path: str | None = None
    version: str | None = None

    def check(self) -> None:
        """Raise ToolkitError where the tenant's weights are others by now."""
        if self.tenant is not None and self.version not in (None, self.tenant.version):
            raise ToolkitError(
                "sampling_session_id must be of the weights as they are now: full fine-tuning (rank 0) keeps no older "
                'ones to sample. Make a sampler after each step, or one of kind "inflight".'
            )


@dataclass
class _Loaded:
    adapter: str
    uses: int = 0
    last_used: int = 0


class Samplers:
    """Saved versions in the engine.

    Args:
        engine: that samples them.
        most: how many stay in the model while nobody samples them.
    """

    def __init__(self, engine: AsyncEngine, most: int) -> None:
        self._engine, self._most = engine, most
        self._loaded: dict[Content, _Loaded] = {}
        self._clock = itertools.count(1)
        self._lock = threading.Lock()

    @contextmanager
    def adapter(self, folder: Path) -> Iterator[str]:
        """Inside, the engine has the adapter of this folder under the name that is given. Waits for the engine.

        Raises:
            ToolkitError: the folder is no adapter of the model, or was removed.
        """
        one = self._enter(folder)
        try:
            yield one.adapter
        finally:
            with self._lock:
                one.uses -= 1

    def _enter(self, folder: Path) -> _Loaded:
        content = _content(folder)
        with self._lock:
            one = self._loaded.get(content)
            if one is None:
                self._leave_room()
                one = _Loaded(f"sampler-{uuid.uuid4().hex}")
                adapter = one.adapter
                self._engine.call(lambda: self._engine.engine.load_adapter(adapter, folder))
                self._loaded[content] = one
            one.uses += 1
            one.last_used = next(self._clock)
            return one

    def close(self) -> None:
        """Take all of them out of the model, those that are sampled once that has ended."""
        with self._lock, suppress(EngineUnavailable):  # the engine has ended, and its model is nobody's
            for content in list(self._loaded):
                self._unload(content)

    def _leave_room(self) -> None:
        idle = sorted((one.last_used, content) for content, one in self._loaded.items() if not one.uses)
        for _, content in idle[: max(0, len(self._loaded) + 1 - self._most)]:
            self._unload(content)

    def _unload(self, content: Content) -> None:
        adapter = self._loaded.pop(content).adapter
        self._engine.call(lambda: self._engine.engine.unload_adapter(adapter))


def _content(folder: Path) -> Content:
    try:
        about = (folder / "adapter_model.safetensors").stat()
    except FileNotFoundError:
        raise ToolkitError(f"path must be a checkpoint that was not removed, got {shown(folder.name)}.") from None
    return folder, about.st_ino, about.st_mtime_ns
