"""What a patch replaces, and what it skips.

A claim is collected on the original model, carries the errors of its probe, and knows how to install and undo itself.
"""

import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from toolkit.state.rotary_regimes import RotaryRegimes

Undo = Callable[[], None]

# Two fp32 computations of one formula differ by a few roundings, another formula by far more (gelu and its tanh form:
# 2e-4). Gradients cancel where outputs do not (of queries and keys, say), which multiplies the roundings.
FORWARD_TOLERANCE = 2e-5
BACKWARD_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ProbeError:
    """Relative errors ‖candidate - original‖ / ‖original‖ on random inputs: of outputs, and of gradients.

    Args:
        where: the condition under which they are largest, for a skip reason.
    """

    forward: float
    backward: float
    where: str = ""

    def passes(self) -> bool:
        """Whether rounding explains both. NaN never passes."""
        return self.forward <= FORWARD_TOLERANCE and self.backward <= BACKWARD_TOLERANCE

    def worst(self) -> float:
        """The larger of the two."""
        return max(self.forward, self.backward)

    def worse(self, other: "ProbeError", where: str = "") -> "ProbeError":
        """The larger of each, where ``other`` is that of the condition ``where``."""
        larger = other.worst() > self.worst()
        return ProbeError(
            max(self.forward, other.forward), max(self.backward, other.backward), where if larger else self.where
        )


@dataclass(frozen=True)
class Claim:
    """A proven replacement.

    Args:
        role: what the module is in the model.
        path: its dotted name; "" for a setting of the model as a whole.
        module: the module itself, or the model.
        op: what replaces it, for the report.
        error: of the probe.
        install: makes the replacement and returns its undo step.
        rotary_regimes: of rotary tables that depend on the length of the sequence; None elsewhere.
        keeps_prompt: whether it is a layer that sees a prompt, and a window of what was written after it.
        bidirectional: whether it is a layer whose tokens see those after them.
    """

    role: str
    path: str
    module: nn.Module
    op: str
    error: ProbeError
    install: Callable[[], Undo]
    rotary_regimes: RotaryRegimes | None = None
    keeps_prompt: bool = False
    bidirectional: bool = False


@dataclass(frozen=True)
class Skipped:
    """A module that looked like ``role`` and keeps its own forward, with the reason."""

    role: str
    path: str
    reason: str


# Installers and undo steps are partial functions of their modules and not closures: in a deep copy of a model they
# refer to the copy's modules.


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], Undo]:
    """An installer that puts ``forward`` on the instance, in front of the class's own; undo removes it."""
    forward.__name__ = "forward"  # pickle keeps no functions; under this name it finds the class's own
    return partial(_put_forward, module, types.MethodType(forward, module))


# Where accelerate's hooks keep the forward that they call between moving inputs and outputs.
HOOKED = "_old_forward"


def _put_forward(module: nn.Module, forward: Any) -> Undo:
    name = HOOKED if HOOKED in module.__dict__ else "forward"
    before = module.__dict__.get(name)
    module.__dict__[name] = forward
    return partial(_remove_forward, module, forward, before)


def _remove_forward(module: nn.Module, forward: Any, before: Any) -> None:
    """Put ``before`` back in place of ``forward``; hooks may have been added or removed since."""
    if module.__dict__.get(HOOKED) == forward:
        module.__dict__[HOOKED] = before or types.MethodType(type(module).forward, module)
    else:
        _restore(module, "forward", before)


def install_all(installs: Iterable[Callable[[], Undo]]) -> tuple[Undo, ...]:
    """The undo steps of ``installs``, in order. Where one fails, those before it are undone."""
    steps: list[Undo] = []
    try:
        for install in installs:
            steps.append(install())
    except BaseException:
        undo_all(steps)
        raise
    return tuple(steps)


def undo_all(steps: Sequence[Undo]) -> None:
    """Take back what ``install_all`` installed, the last first."""
    for step in reversed(steps):
        step()


def together(*installs: Callable[[], Undo]) -> Callable[[], Undo]:
    """One installer for several."""
    return partial(_install_together, installs)


def _install_together(installs: Sequence[Callable[[], Undo]]) -> Undo:
    return partial(undo_all, install_all(installs))


def set_attribute(module: nn.Module, name: str, value: Any) -> Undo:
    """The undo step, after setting an attribute of the instance past ``nn.Module.__setattr__``."""
    if module.__dict__.get(name, value) is None:
        undo = partial(_set_none, module, name)
    else:
        undo = partial(_restore, module, name, module.__dict__.get(name))
    module.__dict__[name] = value
    return undo


def put_pre_hook(module: nn.Module, hook: Callable[..., Any]) -> Undo:
    """The undo step, after putting ``hook``, which gets keywords too, before the module's forward."""
    module.register_forward_pre_hook(hook, with_kwargs=True)
    return partial(_remove_pre_hooks, module, type(hook))


def _remove_pre_hooks(module: nn.Module, kind: type) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, kind):
            module._forward_pre_hooks.pop(key)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _set_none(module: nn.Module, name: str) -> None:
    module.__dict__[name] = None


def _restore(module: nn.Module, name: str, before: Any) -> None:
    if before is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = before
