"""Saved weights: PEFT folders under one root, written aside and renamed, by paths of Tinker's form.

``tinker://RUN/weights/NAME`` has the optimizer's state beside the adapter, ``tinker://RUN/sampler_weights/NAME`` the
adapter alone. RUN is the id of the training client. The folder is ``ROOT/RUN/KIND/NAME``.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.files import sync
from toolkit.live.adam import AdamState
from toolkit.live.lora import LoraSettings, write_adapter
from toolkit.sentences import shown

KINDS = ("weights", "sampler_weights")
JOURNAL = "journal"
"""The folder beside them for a client's journal."""
SCHEME = "tinker://"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_RUN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._:-]{0,255}")
_ABOUT, _OPTIMIZER = "tinker.json", "optimizer.safetensors"


@dataclass(frozen=True)
class Saved:
    """What is in a checkpoint.

    Args:
        base_model: name of the model that it was trained on.
        settings: of its LoRA.
        factors: by the names of a PEFT file.
        optimizer: its state; None where there is none.
    """

    base_model: str
    settings: LoraSettings
    factors: Mapping[str, Tensor]
    optimizer: AdamState | None = None


class Checkpoints:
    """The checkpoints below a folder.

    Args:
        root: where they are; made where there is none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def save(self, run: str, kind: str, name: str, saved: Saved, overwrite: bool = False) -> str:
        """Write a checkpoint, and return its path. After a crash it is there whole or not at all.

        Args:
            overwrite: whether it may take the place of one of this name.

        Raises:
            ToolkitError: for a name that is none, or is taken.
        """
        if not _NAME.fullmatch(name):
            raise ToolkitError(f"path must be a name of letters, digits, '.', '_' and '-', got {shown(name)}.")
        folder = self.root / run / kind / name
        if folder.exists() and not overwrite:
            raise ToolkitError(f"path must be a name that no checkpoint of {run} has, got {shown(name)}.")
        write_folder(folder, lambda inside: write_saved(inside, saved))
        return f"{SCHEME}{run}/{kind}/{name}"

    def path_of(self, run: str, kind: str, name: str) -> str | None:
        """The path of a checkpoint; None where there is none of this name."""
        known = _NAME.fullmatch(name) and (self.root / run / kind / name / _ABOUT).is_file()
        return f"{SCHEME}{run}/{kind}/{name}" if known else None

    def folder(self, path: str) -> Path:
        """The folder of a path. Raises ToolkitError for a path that is none, or of no checkpoint."""
        parts = path.removeprefix(SCHEME).split("/")
        fits = path.startswith(SCHEME) and len(parts) == 3 and parts[1] in KINDS
        if not fits or not _RUN.fullmatch(parts[0]) or not _NAME.fullmatch(parts[2]):
            allowed = " or ".join(f"{SCHEME}RUN/{kind}/NAME" for kind in KINDS)
            raise ToolkitError(f"path must be {allowed}, got {shown(path)}.")
        folder = self.root.joinpath(*parts)
        if not (folder / _ABOUT).is_file():
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


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make ``folder`` with what ``write`` puts into an empty one: aside, flushed, renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    staging.mkdir()
    try:
        write(staging)
        for file in staging.iterdir():
            sync(file)
        sync(staging)
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


def write_saved(folder: Path, saved: Saved) -> None:
    """Write a checkpoint's files into a folder that there is."""
    from safetensors.torch import save_file

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
    return Saved(base_model, settings, load_file(folder / "adapter_model.safetensors"), state)


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
