"""Weights for other processes: each update is a folder that they read."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from torch import Tensor


class WeightFolders:
    """Folders ``update-N`` of safetensors files, which ``read_new_weights`` reads.

    A folder is written aside and renamed, so nobody reads half of one.

    Args:
        folder: where they are made, which their readers see under the same path.

    Attributes:
        folder: absolute.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self._number = 0

    def write(self, weights: "Mapping[str, Tensor]") -> Path:
        """The folder of a new update. Raises ToolkitError for no tensors."""
        from huggingface_hub import save_torch_state_dict

        if not weights:
            raise ToolkitError("the weights of an update must have >= 1 tensors, got none.")
        self._number += 1
        final, aside = self._path(self._number), self.folder / f".update-{self._number}"
        for old in (aside, final):
            shutil.rmtree(old, ignore_errors=True)
        aside.mkdir(parents=True)
        save_torch_state_dict({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, aside)
        aside.rename(final)
        return final

    def remove_previous(self) -> None:
        """Remove the folder before the last one, once its readers have the last one."""
        shutil.rmtree(self._path(self._number - 1), ignore_errors=True)

    def remove_last(self) -> None:
        """Remove the last folder."""
        shutil.rmtree(self._path(self._number), ignore_errors=True)

    def remove_left(self) -> None:
        """Remove what a process that was killed has left."""
        for left in (*self.folder.glob("update-*"), *self.folder.glob(".update-*")):
            shutil.rmtree(left)

    def _path(self, number: int) -> Path:
        return self.folder / f"update-{number}"
