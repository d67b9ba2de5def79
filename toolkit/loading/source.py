"""From what a user names to the folder that holds it; nothing is loaded yet."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError, first_line
from toolkit.loading.run import served
from toolkit.sentences import shown

ADAPTER = "adapter_config.json"
CONFIG = "config.json"
_REPOSITORY = re.compile(r"^[\w.-]+/[\w.-]+$")
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    Attributes:
        folder: a local folder with the files.
        gguf: the name of the GGUF file in it, if that is the model.
        base: of adapters, the model that they belong to, which may be adapters of another one.
        trust_remote_code: run Python code that lies in the folder.
        repository: the Hub's name of it, if it comes from there.
    """

    folder: Path
    gguf: str | None = None
    base: "Source | None" = None
    trust_remote_code: bool = False
    repository: str | None = None

    @property
    def whole(self) -> "Source":
        """The model below all adapters: the source itself without any."""
        return self if self.base is None else self.base.whole

    @property
    def name(self) -> str:
        """What names the model from any directory: a repository of the Hub, or an absolute path."""
        path = self.folder if self.gguf is None else self.folder / self.gguf
        return str(path.absolute()) if self.repository is None else self.repository

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of every ``from_pretrained`` of transformers."""
        file = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"local_files_only": True, "trust_remote_code": self.trust_remote_code, **file}


def find_source(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    field: str = "model",
    cached: bool = False,
) -> Source:
    """The source of a model, downloaded if it is a repository of the Hub that the cache lacks.

    Args and errors as for ``load_model``; ``cached``: nothing is downloaded.
    """
    if not isinstance(name_or_path, str | Path):
        raise ToolkitError(f"{field} must be a folder, a GGUF file or org/name, got {shown(name_or_path)}.")
    path, repository = Path(name_or_path), None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ToolkitError(f"{field} must be a folder, a GGUF file or org/name, got the file '{path}'.")
        return Source(path.parent, path.name, trust_remote_code=trust_remote_code)
    if path.is_dir():
        folder = _model_folder(path, field)
    elif isinstance(name_or_path, str) and _REPOSITORY.match(name_or_path):
        folder, repository = _snapshot(name_or_path, revision, trust_remote_code, field, cached), name_or_path
    else:
        raise ToolkitError(
            f"{field} must be a folder, a GGUF file or a repository of the Hub such as org/name, got "
            f"'{name_or_path}', which does not exist."
        )
    if (folder / CONFIG).is_file() or not (folder / ADAPTER).is_file():
        return Source(folder, trust_remote_code=trust_remote_code, repository=repository)
    name = read_json(folder / ADAPTER).get("base_model_name_or_path")
    try:
        if not isinstance(name, str):
            raise ToolkitError("a name must be text")
        base = find_source(name, trust_remote_code=trust_remote_code, field="base_model_name_or_path")
    except ToolkitError as error:
        raise ToolkitError(f"'{folder / ADAPTER}' names the base model {name!r}: {first_line(error)}.") from None
    return Source(folder, base=base, trust_remote_code=trust_remote_code, repository=repository)


def adapter_folder(name_or_path: str, field: str) -> Path:
    """The folder of adapters that a folder, a run or a repository of the Hub has; that of their base model is not
    looked for.

    Raises:
        ToolkitError: naming ``field``, where there is none.
    """
    path = Path(name_or_path)
    if path.is_dir():
        folder = _model_folder(path, field)
    elif _REPOSITORY.match(name_or_path):
        folder = _snapshot(name_or_path, None, False, field, False)
    else:
        raise ToolkitError(f"{field} must be a folder of adapters, got '{name_or_path}', which does not exist.")
    if not (folder / ADAPTER).is_file():
        raise ToolkitError(f"{field} must be a folder of adapters, got '{name_or_path}', which has no {ADAPTER}.")
    return folder


def _model_folder(path: Path, field: str) -> Path:
    """``path`` if it holds a model, or the latest checkpoint of the training run there."""
    if _holds_model(path):
        return path
    for folder in (path / "checkpoints", path):
        checkpoint = served(folder)
        if checkpoint is not None:
            if not _holds_model(checkpoint):
                raise ToolkitError(f"Checkpoint '{checkpoint}' has no {CONFIG}.")
            return checkpoint
    raise ToolkitError(
        f"{field} must be the folder of a model or of a training run, got '{path}', which has neither a {CONFIG} nor "
        "checkpoints/latest."
    )


def _holds_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or (folder / ADAPTER).is_file()


def _snapshot(name: str, revision: str | None, code: bool, field: str, cached: bool) -> Path:
    """The folder of a repository of the Hub in the local cache."""
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    at = f"'{name}'" if revision is None else f"'{name}' at revision '{revision}'"
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[*_FILES, "*.py"] if code else _FILES,
            ignore_patterns=["*/*"],
            local_files_only=cached or is_offline_mode(),
        )
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hub cannot be reached"
        raise ToolkitError(
            f"{field} must be a folder or a repository in the local cache while {why}, got {at}; download "
            f"it first with `hf download {name}`."
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise ToolkitError(
            f"{field} must be a folder or a repository of the Hub that you may read, got {at}."
        ) from None
    except Exception as error:  # the network fails in many ways
        raise ToolkitError(f"{field} {at} cannot be downloaded ({first_line(error)}).") from None
    if not _holds_model(Path(folder)):
        raise ToolkitError(f"{field} must be a repository with a {CONFIG}, got {at}.")
    return Path(folder)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file, or a ToolkitError."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise ToolkitError(f"'{file}' is not valid JSON ({first_line(error)}).") from None
    if not isinstance(content, dict):
        raise ToolkitError(f"'{file}' does not hold a JSON object.")
    return content
