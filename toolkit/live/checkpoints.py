"""Saved weights: PEFT folders, or folders of models, under one root, written aside and renamed, by Tinker's paths.

``tinker://RUN/weights/NAME`` has the optimizer's state beside the adapter, ``tinker://RUN/sampler_weights/NAME`` and
``tinker://RUN/external_weights/NAME``, which is for downloads, the adapter alone. RUN is the id of the training client.
The folder is ``ROOT/RUN/KIND/NAME``.
"""

import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.files import sync, write_atomic
from toolkit.live.adam import AdamState
from toolkit.live.lora import LoraSettings, write_adapter
from toolkit.sentences import shown

KINDS = ("weights", "sampler_weights", "external_weights")
JOURNAL = "journal"
"""The folder beside them for a client's journal."""
SCHEME = "tinker://"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_RUN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._:-]{0,255}")
_ABOUT, _DATES, _OPTIMIZER = "tinker.json", "dates.json", "optimizer.safetensors"
_WEIGHTS = "model.safetensors"
_REMOVED = ".removed"
"""The folder of the names of checkpoints that were removed: a request that runs again does not bring them back."""


@dataclass(frozen=True)
class Saved:
    """What is in a checkpoint.

    Args:
        base_model: name of the model that it was trained on.
        settings: of its LoRA.
        factors: by the names of a PEFT file; all weights by the names of the model where its rank is 0.
        optimizer: its state; None where there is none.
        config: of the model, where it is all weights.
    """

    base_model: str
    settings: LoraSettings
    factors: Mapping[str, Tensor]
    optimizer: AdamState | None = None
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Entry:
    """A checkpoint in a list.

    Args:
        path: of it.
        run: the training client that it is of.
        kind: one of ``KINDS``.
        name: that it was saved under.
        saved_at: seconds since the epoch.
        expires_at: the same, when it is gone; None for never.
        num_bytes: of its files.
    """

    path: str
    run: str
    kind: str
    name: str
    saved_at: float
    expires_at: float | None
    num_bytes: int


class Checkpoints:
    """The checkpoints below a folder. One whose time is over is no checkpoint any more, and is removed with the next.

    Args:
        root: where they are; made where there is none.
        clock: seconds since the epoch.
    """

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self.root, self._clock = root, clock
        self._lock = threading.RLock()  # of what is written, listed and removed
        root.mkdir(parents=True, exist_ok=True)

    def save(
        self, run: str, kind: str, name: str, saved: Saved, overwrite: bool = False, ttl_seconds: float | None = None
    ) -> str:
        """Write a checkpoint, and return its path. After a crash it is there whole or not at all.

        Args:
            overwrite: whether it may take the place of one of this name.
            ttl_seconds: how long it is kept; None for ever.

        Raises:
            ToolkitError: for a name that is none, or is taken.
        """
        if not _NAME.fullmatch(name):
            raise ToolkitError(f"path must be a name of letters, digits, '.', '_' and '-', got {shown(name)}.")
        folder, now = self.root / run / kind / name, self._clock()

        def write(inside: Path) -> None:
            write_saved(inside, saved)
            (inside / _DATES).write_text(_dates(now, now, ttl_seconds), encoding="utf-8")

        with self._lock:
            self._remove_expired()
            if folder.exists() and not overwrite:
                raise ToolkitError(f"path must be a name that no checkpoint of {run} has, got {shown(name)}.")
        write_folder(folder, write, self._renaming(folder))  # one thread saves; others read while it writes
        return path_to(run, kind, name)

    @contextmanager
    def _renaming(self, folder: Path) -> Iterator[None]:
        with self._lock:
            yield
            (folder.parent / _REMOVED / folder.name).unlink(missing_ok=True)

    def path_of(self, run: str, kind: str, name: str) -> str | None:
        """The path of a checkpoint that is there or was removed; None where none of this name was saved."""
        folder = self.root / run / kind
        known = _NAME.fullmatch(name) and ((folder / name / _ABOUT).is_file() or (folder / _REMOVED / name).is_file())
        return path_to(run, kind, name) if known else None

    def entries(self, run: str | None = None) -> list[Entry]:
        """All checkpoints, or those of a training client; the newest first."""
        with self._lock:
            found = [_entry(one) for one in self._remove_expired() if run in (None, one.parents[1].name)]
        return sorted(found, key=lambda one: (-one.saved_at, one.path))

    def set_ttl(self, path: str, seconds: float | None) -> None:
        """Keep a checkpoint for so long from now; None for ever."""
        with self._lock:
            folder = self.folder(path)
            write_atomic(folder / _DATES, _dates(_read_dates(folder)[0], self._clock(), seconds))

    def remove(self, path: str) -> None:
        """Remove a checkpoint. Raises ToolkitError for a path of none."""
        with self._lock:
            self._remove(self.folder(path))

    def files(self, path: str) -> list[Path]:
        """The files of a checkpoint that PEFT and other engines read, and the optimizer's state."""
        own = (_ABOUT, _DATES)
        return sorted(one for one in self.folder(path).iterdir() if one.name not in own and one.name[0] != ".")

    def _folders(self) -> list[Path]:
        return [one.parent for kind in KINDS for one in self.root.glob(f"*/{kind}/[!.]*/{_ABOUT}")]

    def _expired(self, folder: Path) -> bool:
        expires_at = _read_dates(folder)[1]
        return expires_at is not None and expires_at <= self._clock()

    def _remove_expired(self) -> list[Path]:
        """The folders of the checkpoints that are left."""
        left = []
        for folder in self._folders():
            if self._expired(folder):
                self._remove(folder)
            else:
                left.append(folder)
        return left

    def _remove(self, folder: Path) -> None:
        (folder.parent / _REMOVED).mkdir(exist_ok=True)
        write_atomic(folder.parent / _REMOVED / folder.name, "")
        _discard(folder)

    def folder(self, path: str) -> Path:
        """The folder of a path. Raises ToolkitError for a path that is none, or of no checkpoint."""
        parts = path.removeprefix(SCHEME).split("/")
        fits = path.startswith(SCHEME) and len(parts) == 3 and parts[1] in KINDS
        if not fits or not _RUN.fullmatch(parts[0]) or not _NAME.fullmatch(parts[2]):
            allowed = " or ".join(f"{SCHEME}RUN/{kind}/NAME" for kind in KINDS)
            raise ToolkitError(f"path must be {allowed}, got {shown(path)}.")
        folder = self.root.joinpath(*parts)
        with self._lock:
            if not (folder / _ABOUT).is_file() or self._expired(folder):
                raise ToolkitError(f"path must be a checkpoint that was saved here, got {shown(path)}.")
        return folder

    def about(self, path: str) -> tuple[str, LoraSettings]:
        """The base model and the LoRA's settings of a checkpoint."""
        return _about(self.folder(path))

    def read(self, path: str, optimizer: bool) -> Saved:
        """A checkpoint. Raises ToolkitError where it lacks the optimizer's state that is asked for."""
        saved = read_saved(self.folder(path))
        if optimizer and saved.optimizer is None:
            raise ToolkitError(f"path must be a checkpoint with the optimizer's state, got {shown(path)}.")
        return saved if optimizer else replace(saved, optimizer=None)


def path_to(run: str, kind: str, name: str) -> str:
    """The path of a checkpoint."""
    return f"{SCHEME}{run}/{kind}/{name}"


def write_folder(
    folder: Path, write: Callable[[Path], None], renaming: AbstractContextManager[None] | None = None
) -> None:
    """Make ``folder`` with what ``write`` puts into an empty one: aside, flushed, renamed inside of ``renaming``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    staging.mkdir()
    try:
        write(staging)
        for file in staging.iterdir():
            sync(file)
        sync(staging)
        with renaming or nullcontext():
            if folder.exists():
                old = folder.with_name(f"{staging.name}.old")
                os.rename(folder, old)
                os.rename(staging, folder)
                shutil.rmtree(old)
            else:
                os.rename(staging, folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _discard(folder: Path) -> None:
    """Take a folder away: after a crash it is there whole or not at all."""
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old")
    os.rename(folder, old)
    sync(folder.parent)
    shutil.rmtree(old)


def _dates(saved_at: float, now: float, ttl_seconds: float | None) -> str:
    return json.dumps({"saved_at": saved_at, "expires_at": None if ttl_seconds is None else now + ttl_seconds})


def _read_dates(folder: Path) -> tuple[float, float | None]:
    """(when it was saved, when it is gone) of a checkpoint."""
    dates = json.loads((folder / _DATES).read_text(encoding="utf-8"))
    return dates["saved_at"], dates["expires_at"]


def _entry(folder: Path) -> Entry:
    run, kind, name = folder.parts[-3:]
    num_bytes = sum(one.stat().st_size for one in folder.iterdir())
    return Entry(path_to(run, kind, name), run, kind, name, *_read_dates(folder), num_bytes)


def write_saved(folder: Path, saved: Saved) -> None:
    """Write a checkpoint's files into a folder that there is."""
    from safetensors.torch import save_file

    if saved.settings.full:
        contents = {name: one.detach().cpu().contiguous() for name, one in saved.factors.items()}
        save_file(contents, folder / _WEIGHTS, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(saved.config), encoding="utf-8")
    else:
        write_adapter(folder, saved.base_model, saved.factors)
    about = {"base_model": saved.base_model, "lora": asdict(saved.settings)}
    (folder / _ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    if saved.optimizer is not None:
        save_file(_tensors(saved.optimizer), folder / _OPTIMIZER)


def read_saved(folder: Path) -> Saved:
    """What ``write_saved`` wrote."""
    from safetensors.torch import load_file

    base_model, settings = _about(folder)
    optimizer = folder / _OPTIMIZER
    state = _state(load_file(optimizer)) if optimizer.is_file() else None
    factors = load_file(folder / (_WEIGHTS if settings.full else "adapter_model.safetensors"))
    return Saved(base_model, settings, factors, state)


def _about(folder: Path) -> tuple[str, LoraSettings]:
    about: dict[str, Any] = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    return str(about["base_model"]), LoraSettings(**about["lora"])


def _tensors(state: AdamState) -> dict[str, Tensor]:
    named = {"mean": state.mean, "square": state.square}
    found = {f"{kind}.{name}": one.cpu().contiguous() for kind, each in named.items() for name, one in each.items()}
    return {"step": torch.tensor(state.step), **found}


def _state(tensors: Mapping[str, Tensor]) -> AdamState:
    state = AdamState(int(tensors["step"]))
    for kind, each in (("mean", state.mean), ("square", state.square)):
        each |= {name.removeprefix(f"{kind}."): one for name, one in tensors.items() if name.startswith(f"{kind}.")}
    return state
