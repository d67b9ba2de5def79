"""Routes a framework's methods on a model elsewhere, and back; shared by the frameworks."""

import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from toolkit.errors import ToolkitError
from toolkit.patching import report_of


class Route:
    """Functions bound on one model in front of its methods, until ``undo()`` or the end of a ``with`` block.

    A copy of the model has the functions but no route; they must run the model's own methods there.
    Raises ToolkitError for a model that is not patched, or that has a route of this kind.
    """

    of: ClassVar["weakref.WeakKeyDictionary[nn.Module, Any]"]
    """The routes of this kind, by model."""

    def __init_subclass__(cls) -> None:
        cls.of = weakref.WeakKeyDictionary()

    def __init__(self, model: nn.Module, *functions: Callable[..., Any]) -> None:
        names = [function.__name__ for function in functions]
        if report_of(model) is None:
            raise ToolkitError(f"model {type(model).__name__} is not patched; call toolkit.patch(model) first.")
        if model in self.of:
            raise ToolkitError(
                f"{names[0]} of {type(model).__name__} is routed already; call undo() of that route first."
            )
        self._model = weakref.ref(model)
        self._before = {name: model.__dict__.get(name) for name in names}
        self.of[model] = self
        for name, function in zip(names, functions, strict=True):
            model.__dict__[name] = types.MethodType(function, model)

    def own(self, model: nn.Module, name: str) -> Callable[..., Any]:
        """What stood in the place of a function: most often the method of the model's class."""
        return self._before[name] or types.MethodType(getattr(type(model), name), model)

    def undo(self) -> None:
        """Give the model its own methods back. Does nothing when undone."""
        model = self._model()
        if model is None or self.of.get(model) is not self:
            return
        del self.of[model]
        for name, before in self._before.items():
            if before is None:
                del model.__dict__[name]
            else:
                model.__dict__[name] = before

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
