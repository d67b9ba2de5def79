"""Values beside a module that go with it: they live as long as the module, and may refer to it."""

from typing import Any

from torch import nn


class Attached:
    """Holds a value in a module's ``__dict__``. Deep copies and pickles of the module hold none.

    A ``WeakKeyDictionary`` would keep a module alive whose value refers to it, and with it the weights.
    """

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attached":
        return Attached()

    def __reduce__(self) -> tuple[Any, ...]:
        return Attached, ()


def attach(module: nn.Module, name: str, value: Any = None) -> None:
    """Keep a value under a name, which begins with an underscore: other attributes are settings of the module.

    Where there is room for it (``attach`` of None), no attribute of the module is another object afterwards.
    """
    room = module.__dict__.get(name)
    if room is not None and room.value is None:
        room.value = value
    else:
        module.__dict__[name] = Attached(value)


def attached(module: nn.Module, name: str) -> Any:
    """The value under a name; None where there is none."""
    found = module.__dict__.get(name)
    return None if found is None else found.value


def detach(module: nn.Module, name: str) -> Any:
    """The value under a name, which is none afterwards."""
    found = module.__dict__.pop(name, None)
    return None if found is None else found.value
