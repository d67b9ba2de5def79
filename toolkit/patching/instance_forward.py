"""Forwards on instances: those that others put there before a patch, and what became of a patch's own.

Quantisers, offloaders and other patchers set ``forward`` on a module. No probe runs such a forward, so a module with
one keeps it. accelerate's hooks keep the forward that they call in ``_old_forward``; a patch goes inside of them.
"""

import copy
import functools
from collections.abc import Iterable
from itertools import repeat
from operator import attrgetter
from typing import Any

from torch import nn

from toolkit.patching.claim import HOOKED, Claim
from toolkit.patching.settings import changed_settings

UNPROVEN = "its instance has another forward than its class, {}, which no probe runs"
"""The reason why such a module is skipped."""


def foreign_forward(module: nn.Module) -> str | None:
    """The name of the forward that a call of ``module`` runs in place of its class's own; None where it runs that."""
    forward = called_forward(module)
    return None if forward is None else _name(forward)


def called_forward(module: nn.Module) -> Any:
    """The forward that a call of ``module`` runs in place of its class's own; None where it runs that."""
    forward = module.__dict__.get("forward")
    inner = module.__dict__.get(HOOKED)
    if forward is None or (inner is not None and _is_hook(forward)):
        forward = inner
    if forward is None or getattr(forward, "__func__", None) is type(module).forward:
        return None
    return forward


def _is_hook(forward: Any) -> bool:
    """Whether accelerate put it there."""
    called = forward.func if isinstance(forward, functools.partial) else forward
    return getattr(called, "__module__", "").split(".")[0] == "accelerate"


def _name(forward: Any) -> str:
    called = forward.func if isinstance(forward, functools.partial) else getattr(forward, "__func__", forward)
    module, name = getattr(called, "__module__", None), getattr(called, "__qualname__", type(called).__name__)
    return f"{module}.{name}" if module else name


_OTHER_CLASS = "forward of {} must be the one that was patched at {}, got {}; call toolkit.patch(model) again"
_OVER = "forward of {} must be the one that the patch put there, got {}; take that away"


class InstalledForwards:
    """The forwards that a patch put on modules.

    Args:
        entries: path, module, forward of the patch, class of the module when it was patched and its forward.
    """

    def __init__(self, entries: Iterable[tuple[str, nn.Module, Any, Any]]) -> None:
        self._entries = tuple(entries)
        self._modules = [module.__dict__ for _, module, _, _ in self._entries]
        self._types = list({type(module) for _, module, _, _ in self._entries})
        self._found: tuple[list[Any], list[Any]] | None = None

    @classmethod
    def of(cls, claims: Iterable[Claim]) -> "InstalledForwards":
        """Of claims that were installed."""
        entries = []
        for claim in claims:
            forward: Any = claim.module.__dict__.get(HOOKED) or claim.module.__dict__.get("forward")
            if claim.path and hasattr(forward, "__func__"):
                entries.append(
                    (claim.path, claim.module, forward.__func__, (type(claim.module), type(claim.module).forward))
                )
        return cls(entries)

    def __deepcopy__(self, memo: dict[int, Any]) -> "InstalledForwards":
        return InstalledForwards(copy.deepcopy(self._entries, memo))

    def replaced(self) -> list[str]:
        """A sentence for each module that runs another forward than the patch's."""
        now = list(map(dict.get, self._modules, repeat("forward"))), list(map(attrgetter("forward"), self._types))
        if self._found == now:
            return []
        found = []
        for path, module, forward, own in self._entries:
            if not _runs(module, forward):
                what = _name(module.__dict__["forward"]) if "forward" in module.__dict__ else "its class's"
                found.append(_OVER.format(path, what))
            # Another class (FSDP2 makes one) is no other forward.
            elif type(module) is own[0] and type(module).forward is not own[1]:
                name, now_is = type(module).__name__, _name(type(module).forward)
                found.append(_OTHER_CLASS.format(name, path, now_is))
        self._found = None if found else now
        return found

    def covered(self) -> list[str]:
        """A sentence for each module on whose instance there is another forward over the patch's."""
        found = []
        for path, module, forward, _ in self._entries:
            outer = module.__dict__.get("forward")
            hooked = HOOKED in module.__dict__ and _is_hook(outer)
            if outer is not None and getattr(outer, "__func__", None) is not forward and not hooked:
                found.append(_OVER.format(path, _name(outer)))
        return found

    def changed(self) -> list[str]:
        """``replaced``, and a sentence for each setting that is not what the patch was proven with."""
        settings = [(module, getattr(forward, "settings", ())) for _, module, forward, _ in self._entries]
        return self.replaced() + [text for module, given in settings for text in changed_settings(module, given)]


def _runs(module: nn.Module, forward: Any) -> bool:
    """Whether a call of ``module`` ends in ``forward``: directly, inside accelerate's hooks, or inside wrappers."""
    for name in ("forward", HOOKED):
        found = module.__dict__.get(name)
        while found is not None:
            if getattr(found, "__func__", found) is forward:
                return True
            found = getattr(found, "__wrapped__", None)
    return False
