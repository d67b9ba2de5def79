"""Files in a folder, with what is known of each beside it."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Generic, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from toolkit.errors import ToolkitError
from toolkit.files import replacing
from toolkit.sentences import shown
from toolkit.serving.batches.schemas import FileObject
from toolkit.serving.errors import RequestError

Record = TypeVar("Record", bound=BaseModel)


class Records(Generic[Record]):
    """Objects by id, each in a JSON file of a folder, oldest first.

    Args:
        folder: of the files.
        kind: of the objects.
        name: of one, for errors.
    """

    def __init__(self, folder: Path, kind: type[Record], name: str) -> None:
        self.folder, self._name = folder, name
        folder.mkdir(parents=True, exist_ok=True)
        self._of: dict[str, Record] = {}
        for path in sorted(folder.glob("*.json"), key=lambda path: path.name):
            try:
                self._of[path.stem] = kind.model_validate_json(path.read_bytes())
            except ValidationError as error:
                raise ToolkitError(f"'{path}' must be a {name} of this server, got something else: {error}.") from None

    def __iter__(self) -> Iterator[Record]:
        return iter(self._of.values())

    def get(self, identity: str, field: str | None = None) -> Record:
        """The object of an id, which a ``field`` of the request has. Raises RequestError where there is none."""
        if identity not in self._of:
            raise RequestError(f"There is no {self._name} {shown(identity)}.", field, status=404)
        return self._of[identity]

    def put(self, identity: str, record: Record) -> None:
        """Keep an object, also when the server ends."""
        with written_aside(self.folder / f"{identity}.json") as file:
            file.write(record.model_dump_json().encode())
        self._of[identity] = record

    def remove(self, identity: str) -> None:
        """Forget an object."""
        self.get(identity)
        del self._of[identity]
        (self.folder / f"{identity}.json").unlink(missing_ok=True)

    def page(
        self, after: str | None, limit: int, newest_first: bool = True, keep: Callable[[Record], bool] = lambda _: True
    ) -> tuple[list[Record], bool]:
        """(objects behind ``after`` in order that are to be kept, whether there are more)."""
        order = [identity for identity, one in self._of.items() if keep(one) or identity == after]
        order = order[::-1] if newest_first else order
        first = 0
        if after is not None:
            self.get(after, "after")
            first = order.index(after) + 1
        return [self._of[one] for one in order[first : first + limit]], len(order) > first + limit


class Files:
    """Contents and descriptions of files, in a folder. Those that have expired are deleted when the next is asked for.

    Args:
        folder: of the files.
        in_use: whether a file of an id must stay for now.
    """

    def __init__(self, folder: Path, in_use: Callable[[str], bool] = lambda identity: False) -> None:
        self._records = Records(folder, FileObject, "file")
        self._in_use = in_use

    @property
    def records(self) -> Records[FileObject]:
        """Descriptions of the files that have not expired."""
        now = time.time()
        expired = [one.id for one in self._records if one.expires_at is not None and one.expires_at <= now]
        for identity in expired:
            if not self._in_use(identity):
                self._delete(identity)
        return self._records

    def path(self, identity: str) -> Path:
        """Where the content of a file is. Raises RequestError where there is no such file."""
        return self._path(self.records.get(identity).id)

    @contextmanager
    def adding(
        self, filename: str, purpose: Literal["batch", "batch_output"], lifetime: int | None = None
    ) -> Iterator[tuple[str, BinaryIO]]:
        """The id of a new file, and where to write it; it is there once the block ends well.

        Args:
            filename: what the description says.
            purpose: likewise.
            lifetime: seconds until it expires; None for no end.
        """
        identity = new_id("file-")
        with written_aside(self._path(identity)) as file:
            yield identity, file
        size = self._path(identity).stat().st_size
        now = int(time.time())
        about = FileObject(
            id=identity, bytes=size, created_at=now, filename=filename, purpose=purpose,
            expires_at=None if lifetime is None else now + lifetime,
        )  # fmt: skip
        self._records.put(identity, about)

    def remove(self, identity: str) -> None:
        """Delete a file."""
        self.records.get(identity)
        self._delete(identity)

    def _delete(self, identity: str) -> None:
        self._records.remove(identity)
        self._path(identity).unlink(missing_ok=True)

    def _path(self, identity: str) -> Path:
        return self._records.folder / f"{identity}.jsonl"


def new_id(prefix: str) -> str:
    """An id that no other object has; those made later come later in order."""
    return f"{prefix}{time.time_ns():016x}{uuid.uuid4().hex[:8]}"


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` once it is whole; nothing of it is left after an error."""
    with replacing(path, uuid.uuid4().hex[:8]) as aside, aside.open("xb") as file:
        yield file
