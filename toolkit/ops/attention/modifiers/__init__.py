"""Small functions that attention inlines into its kernels, one file each: a score's, a mask's, or both.

A file of this folder *is* a modifier: its name is the file's, and the folder is listed, here for the reference and for
Triton, in setup.py for the native library. Scores come scaled and soft-capped; positions are counted from the first
token of the sequence; the parameters, if any, are the head's own. The file holds some of

``score(s, query, key, *parameters)``, ``derivative(s, query, key, *parameters)``
    The new score and d score / d s in plain torch, of scores [heads, queries, keys], positions [queries, 1] and
    [1, keys] (int64) and one tensor [heads, 1, 1] a parameter. ``score`` is differentiable by autograd.
``visible(query, key, *parameters)``
    Whether the query sees the key, beside what causality and a window allow; bool, broadcastable to the scores.
``first(query, *parameters)``
    Beside ``visible``: a bound below which the query sees no key, which never falls as the query moves on. Triton
    skips tiles of keys below it, which changes no bit, and the reference such keys.
``triton_score(s, query, key, p)``, ``triton_both(s, query, key, p)``, ``triton_visible(query, key, p)``,
``triton_first(query, p)``
    Triton functions of float32 tiles and int32 positions: the score, (score, derivative), the mask, the bound.
    Parameter i is ``tl.load(p + i)`` (float32; a tile that broadcasts). They see ``tl``, imported under
    ``TYPE_CHECKING`` only, for triton is not loaded before a kernel is.

The header of the same name beside it holds the C++ functor ``Modifier_<name>`` of the native library: ``kScores``,
``kMasks``, ``kParameters``, and templates ``score``, ``both`` (``ScoreAndSlope<V>``: value and derivative) and
``visible`` (a mask as comparisons give it) of vectors ``(s, query, key, p)`` or ``(query, key, p)``; parameter i is
``p[i]``. Positions are numbers of the vectors' type: in float exact below 2^24.

A key that a modifier alone hides takes part with weight 0, so what stands there must be finite.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from toolkit.errors import ToolkitError, must_be_one_of


@dataclass(frozen=True)
class Modifier:
    """One modifier. Of ``score`` and ``derivative``, ``visible`` and ``first``, None stands for what the file lacks."""

    name: str
    parameters: int
    score: Callable[..., Tensor] | None
    derivative: Callable[..., Tensor] | None
    visible: Callable[..., Tensor] | None
    first: Callable[..., Tensor] | None
    module: ModuleType

    def device(self) -> dict[str, Any]:
        """``triton_<name>`` for each of ``NAMES`` as Triton functions; None for what is not there."""
        if self.name not in _DEVICE:
            from toolkit.ops.attention import triton_modifiers

            _DEVICE[self.name] = triton_modifiers.build(self.module, NAMES)
        return _DEVICE[self.name]


NAMES = ("score", "both", "visible", "first")
_DEVICE: dict[str, dict[str, Any]] = {}
MODIFIERS: dict[str, Modifier] = {}


def _read(name: str, module: ModuleType) -> Modifier:
    score, visible = getattr(module, "score", None), getattr(module, "visible", None)
    counts = {len(inspect.signature(f).parameters) - own for f, own in ((score, 3), (visible, 2)) if f is not None}
    if len(counts) != 1:
        raise ToolkitError(
            f"attention modifier '{name}' must have score or visible or both, of the same number of parameters,"
            f" got {sorted(counts)}."
        )
    first = getattr(module, "first", None)
    return Modifier(name, counts.pop(), score, getattr(module, "derivative", None), visible, first, module)


def discover() -> None:
    """Fill ``MODIFIERS`` from the files of this package's folders, by name."""
    names = [entry.name for entry in pkgutil.iter_modules(__path__)]
    found = {name: _read(name, importlib.import_module(f"{__name__}.{name}")) for name in names}
    MODIFIERS.clear()
    MODIFIERS.update(sorted(found.items()))


def find(name: str) -> Modifier | None:
    """The modifier of this name, None for ""; ToolkitError names the nearest one otherwise."""
    if not name:
        return None
    if name not in MODIFIERS:
        raise ToolkitError(must_be_one_of("modifier", name, MODIFIERS))
    return MODIFIERS[name]


def check(name: str, parameters: Tensor | None, heads: int) -> None:
    """One sentence for a modifier that is not there, and for parameters that it does not take."""
    modifier = find(name)
    count = 0 if modifier is None else modifier.parameters
    if (parameters is None) != (count == 0) or (parameters is not None and list(parameters.shape) != [heads, count]):
        given = "None" if parameters is None else f"shape {list(parameters.shape)}"
        needed = f"have shape {[heads, count]}" if count else "be None"
        raise ToolkitError(f"parameters of modifier '{name}' must {needed}, got {given}.")


discover()
