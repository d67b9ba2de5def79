"""Classes by name, each added by its own file: objectives, tasks, export targets."""

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Generic, TypeVar

from toolkit.errors import ToolkitError, must_be_one_of

T = TypeVar("T")


class Registry(Generic[T]):
    """The classes of one sort. The files of ``package`` are imported when a name is first looked up.

    A base class calls ``add`` in its ``__init_subclass__``, so a new file in the package is all that a new class takes.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._classes: dict[str, type[T]] = {}
        self._complete = False

    def add(self, name: str, kind: type[T]) -> None:
        """Add a class. A name that another class has is a ValueError."""
        known = self._classes.setdefault(name, kind)
        if known is not kind and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(f"{name!r} is the name of {known.__module__}.{known.__qualname__}")
        self._classes[name] = kind

    def names(self) -> list[str]:
        """All names, sorted."""
        if not self._complete:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._complete = True
        return sorted(self._classes)

    def get(self, name: str) -> type[T] | None:
        """The class of a name, or None."""
        return self._classes[name] if name in self.names() else None

    def find(self, field: str, name: object, also: Sequence[str] = ()) -> type[T]:
        """The class of a name that ``field`` gives.

        Raises:
            ToolkitError: there is none. ``also``: what else the field may hold.
        """
        found = self.get(name) if isinstance(name, str) else None
        if found is None:
            raise ToolkitError(must_be_one_of(field, name, [*self.names(), *also]))
        return found
