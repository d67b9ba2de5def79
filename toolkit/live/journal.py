"""What a training client asked for, on disk before it is told so: a server that starts again continues where it was.

A folder holds ``created.json``, a file for each numbered request, ``state-N`` with the weights and Adam's state after
request N, and ``loaded-N`` with the checkpoint that request N read. Everything that a tenant computes is a function of
these, so requests behind a state are run again with bitwise identical results, which are there again.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from toolkit.files import replacing, write_atomic
from toolkit.live.checkpoints import JOURNAL, Saved, read_saved, write_folder, write_saved
from toolkit.live.examples import Example
from toolkit.live.lora import LoraSettings

RESULTS = 64
"""Requests before the last state whose results are there again at a start: they are run again from an older state."""
_CREATED, _STATE, _LOADED, _REQUEST = "created.json", "state-", "loaded-", "request-"


class Journal:
    """The journal of one training client.

    Args:
        folder: of it; made where there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def found(root: Path) -> list[Path]:
        """The folders of journals below the folders of clients in ``root``."""
        return sorted(path.parent for path in root.glob(f"*/{JOURNAL}/{_CREATED}"))

    def create(
        self, base_model: str, settings: LoraSettings, path: str | None, optimizer: bool, micro_batch_tokens: int
    ) -> None:
        """Note what the client began with."""
        about = {
            "base_model": base_model, "lora": asdict(settings), "path": path, "optimizer": optimizer,
            "micro_batch_tokens": micro_batch_tokens,
        }  # fmt: skip
        write_atomic(self.folder / _CREATED, json.dumps(about))

    def created(self) -> tuple[str, LoraSettings, str | None, bool, int]:
        """What ``create`` noted."""
        about = json.loads((self.folder / _CREATED).read_text(encoding="utf-8"))
        names = ("path", "optimizer", "micro_batch_tokens")
        path, optimizer, tokens = (about[name] for name in names)
        return about["base_model"], LoraSettings(**about["lora"]), path, optimizer, tokens

    def write(self, number: int, method: str, arguments: Mapping[str, Any]) -> None:
        """Note a request. Its arguments are JSON, and ``examples``."""
        from safetensors.torch import save_file

        plain = {name: value for name, value in arguments.items() if name != "examples"}
        examples = arguments.get("examples", ())
        about = {"method": method, "arguments": plain, "examples": len(examples)}
        tensors: dict[str, Tensor] = {}
        for at, example in enumerate(examples):
            tensors |= {f"{at}.tokens": example.tokens, f"{at}.targets": example.targets}
            tensors |= {f"{at}.inputs.{name}": values for name, values in example.inputs.items()}
        with replacing(self._file(_REQUEST, number)) as staging:
            # safetensors takes no tensors that share memory, as tokens and targets may
            contents = {name: one.clone().contiguous() for name, one in tensors.items()}
            save_file(contents, staging, metadata={"request": json.dumps(about)})

    def requests(self) -> list[tuple[int, str, dict[str, Any]]]:
        """(number, method, arguments) of every request that was noted, in order."""
        return [(_number(path), *self._read(path)) for path in sorted(self.folder.glob(f"{_REQUEST}*"))]

    def _read(self, path: Path) -> tuple[str, dict[str, Any]]:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["request"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        arguments: dict[str, Any] = about["arguments"]
        if about["method"] == "forward_backward":
            arguments["examples"] = [
                Example(
                    tensors[f"{at}.tokens"],
                    tensors[f"{at}.targets"],
                    {
                        name.removeprefix(f"{at}.inputs."): one
                        for name, one in tensors.items()
                        if name.startswith(f"{at}.inputs.")
                    },
                )
                for at in range(about["examples"])
            ]
        return about["method"], arguments

    def keep(self, number: int, saved: Saved) -> None:
        """Keep the state after a request, and forget the requests that no kept state needs."""
        write_folder(self._file(_STATE, number), lambda inside: write_saved(inside, saved))
        first = self._first()
        for kind in (_STATE, _REQUEST, _LOADED):
            for path in self.folder.glob(f"{kind}*"):
                if _number(path) < first or (_number(path) == first and kind != _STATE):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def state(self) -> tuple[int, Saved | None]:
        """The state that a start begins with, and the number of its request; (0, None) for the client's beginning."""
        first = self._first()
        return (first, read_saved(self._file(_STATE, first))) if first else (0, None)

    def _first(self) -> int:
        """The number of the last state that is ``RESULTS`` requests old; 0 for none."""
        numbers = [_number(path) for path in self.folder.glob(f"{_STATE}*")]
        return max((one for one in numbers if one <= max(numbers) - RESULTS), default=0)

    def loaded(self, number: int, read: Callable[[], Saved]) -> Saved:
        """The checkpoint that a request reads: as it was when the request ran first."""
        folder = self._file(_LOADED, number)
        if not folder.is_dir():
            saved = read()
            write_folder(folder, lambda inside: write_saved(inside, saved))
        return read_saved(folder)

    def remove(self) -> None:
        """Forget the client."""
        (self.folder / _CREATED).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}{number:012d}"


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
