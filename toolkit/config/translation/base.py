"""A recipe in the making from other programs' settings: every key is used, or noted."""

import copy
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from toolkit.config.load import annotation_of, field_names, validate
from toolkit.config.objective import OBJECTIVES
from toolkit.errors import ToolkitError

NO_FIELD = "recipes have no field for it"


class Note(NamedTuple):
    """What became of a key that is not in the recipe as it was.

    Args:
        key: of the settings.
        value: its value.
        text: why.
        lost: whether the run differs without it; otherwise nothing is to do.
    """

    key: str
    value: Any
    text: str
    lost: bool


class Translation:
    """A recipe of an objective, and the settings that are left.

    Args:
        settings: of the other program.
        kind: of the objective.
        names: of keys in the settings, by the name that ``take`` and ``get`` are called with.

    Attributes:
        values: the recipe's, nested.
        adapters: whether adapters are trained.
        notes: in the order of the settings.
    """

    def __init__(self, settings: Mapping[str, Any], kind: str, names: Mapping[str, str] | None = None) -> None:
        OBJECTIVES.find("objective.kind", kind)
        self.kind, self.adapters = kind, False
        self.values: dict[str, Any] = {"objective": {"kind": kind}}
        self._notes: list[Note] = []
        self._settings, self._left = dict(settings), dict(settings)
        self._names = dict(names or {})
        self._fields = set(field_names(kind=kind))

    def key(self, name: str) -> str:
        """The settings' own name of a key."""
        return next((one for one in (self._names.get(name, name), name) if one in self._settings), name)

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, which is left; ``default`` where it is not given or null."""
        value = self._settings.get(self.key(name))
        return default if value is None else value

    def take(self, name: str, default: Any = None) -> Any:
        """A setting that is dealt with."""
        self._left.pop(self.key(name), None)
        return self.get(name, default)

    def add(self, settings: Mapping[str, Any]) -> None:
        """Take in further settings, of a section whose keys have the same names."""
        for key, value in settings.items():
            self._settings.setdefault(key, value)
            self._left.setdefault(key, value)

    def left(self) -> Iterator[tuple[str, Any]]:
        """Settings that nothing has taken."""
        yield from list(self._left.items())

    def has(self, path: str) -> bool:
        """Whether the recipe has a field."""
        return path in self._fields

    def put(self, path: str, value: Any, name: str | None = None) -> None:
        """Set a field of the recipe, dotted. Where there is none, or none of this value, ``name`` is noted as lost."""
        allowed, several = self.choices(path), isinstance(value, list) and self.takes_several(path)
        if not self.has(path):
            self.lose(name or path, NO_FIELD, value)
        elif allowed and not (set(value) <= set(allowed) if several else value in allowed):
            self.lose(name or path, f"{path} is one of {', '.join(map(str, allowed))}", value)
        else:
            target = self.values
            *parents, last = path.split(".")
            for parent in parents:
                target = target.setdefault(parent, {})
            target[last] = value

    def put_where_valid(self, path: str, value: Any, name: str) -> None:
        """``put``; where the recipe so far, which must be valid, does not go with it, ``name`` is noted as lost."""
        self._validated()
        before = copy.deepcopy(self.values)
        self.put(path, value, name)
        self._left.pop(name, None)
        try:
            self._validated()
        except ToolkitError as error:
            self.values = before
            self.lose(name, str(error).rstrip("."), value)

    def move(self, name: str, path: str) -> None:
        """Take a setting, where it is given, and put it."""
        value = self.take(name)
        if value is not None:
            self.put(path, value, name)

    def lose(self, name: str, text: str, value: Any = None) -> None:
        """Note that a setting has no counterpart."""
        self._note(name, text, value, lost=True)

    def unneeded(self, name: str, text: str) -> None:
        """Note that a setting, where it is given, needs none."""
        if self.key(name) in self._settings:
            self._note(name, text, None, lost=False)

    def _note(self, name: str, text: str, value: Any, lost: bool) -> None:
        key = self.key(name)
        self._left.pop(key, None)
        self._notes.append(Note(key, self._settings.get(key, value), text, lost))

    @property
    def notes(self) -> list[Note]:
        order = {key: at for at, key in enumerate(self._settings)}
        return sorted(self._notes, key=lambda note: order.get(note.key, len(order)))

    def choices(self, path: str) -> tuple[Any, ...]:
        """The values that a field is one of; none where it takes others too."""
        literals = [one for one in self._members(path) if typing.get_origin(one) is typing.Literal]
        return tuple(value for one in literals for value in typing.get_args(one))

    def takes_several(self, path: str) -> bool:
        """Whether a field of such values may be a list of them."""
        return len(self._members(path)) > 1

    def _members(self, path: str) -> tuple[Any, ...]:
        """The types of a field that are not None."""
        annotation = annotation_of(path, self.kind)
        union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        return tuple(one for one in typing.get_args(annotation) if one is not type(None)) if union else (annotation,)

    def finish(self, unneeded: Mapping[str, str]) -> None:
        """Deal with what is left: a key that one field of the recipe is called by is that field, where it is valid.

        Args:
            unneeded: why keys, or all that begin with one that ends in ``*``, need no counterpart.

        Raises:
            ToolkitError: the recipe is not valid without the keys that are left.
        """
        self._validated()
        for key, value in self.left():
            reason = next((text for name, text in unneeded.items() if _matches(key, name)), None)
            paths = [path for path in self._fields if path.rpartition(".")[2] == key]
            if reason is not None:
                self.unneeded(key, reason)
            elif value is None or value is False or value == [] or value == {}:
                self.unneeded(key, "off in both")
            elif len(paths) == 1 and "." in paths[0]:
                self.put_where_valid(paths[0], value, key)
            else:
                self.lose(key, NO_FIELD)

    def _validated(self) -> None:
        validate(copy.deepcopy(self.values))


def _matches(key: str, name: str) -> bool:
    return key.startswith(name[:-1]) if name.endswith("*") else key == name
