"""One way to register an op: schema, fake, autograd and one implementation a device.

An op ``toolkit::name`` has a specification in plain torch (``reference``), optionally a native CPU kernel
(registered by the C++ library under the same name) and optionally a Triton one. The default goes by device:
CPU takes the native kernel when the library is there and the reference otherwise; CUDA takes Triton when the
op has one and the reference otherwise. An explicit ``impl=`` never falls back.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.errors import ToolkitError
from toolkit.ops import native

_LIBRARY = torch.library.Library("toolkit", "DEF")
_OPS: dict[str, "Op"] = {}
_NATIVE: set[str] = set()


@dataclass(frozen=True)
class Op:
    """A registered op. Calling it dispatches by device; ``select`` names an implementation."""

    name: str
    reference: Callable[..., Any]
    triton: Callable[..., Any] | None
    overload: Any

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def select(self, impl: str | None) -> Callable[..., Any]:
        """The callable for ``impl``: None (by device), "reference", "cpu" or "triton"."""
        if impl is None:
            return self.overload
        if impl == "reference":
            return self.reference
        if impl == "cpu" and has_native(self.name):
            return self.overload
        if impl == "triton" and self.triton is not None:
            return self.triton
        allowed = ["reference"] + ["cpu"] * has_native(self.name) + ["triton"] * (self.triton is not None)
        raise ToolkitError(f"impl is {impl!r} for op {self.name}; available here are {', '.join(allowed)}.")


def _imported_late(path: str) -> Callable[..., Any]:
    """The function of this dotted name, whose module is imported when it is called."""
    module, _, name = path.rpartition(".")

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    call.__name__ = path
    return call


def has_native(name: str) -> bool:
    """Whether the loaded native library holds a kernel for this op, which must be registered."""
    return name in _NATIVE


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Op:
    """Define ``toolkit::<schema>`` and give it its implementations.

    schema: torch schema without the namespace, e.g. ``"linear(Tensor x, Tensor weight) -> Tensor"``.
    reference: the specification, plain torch, differentiable by autograd, any device.
    fake: shapes and dtypes only.
    triton: dotted name of a function of the same arguments for CUDA tensors, imported at its first call.
    backward, setup_context: as ``torch.library.register_autograd`` takes them; None for ops without gradient.
    """
    name = schema.split("(", 1)[0].split(".", 1)[0]
    qualified = f"toolkit::{name}"
    _LIBRARY.define(schema)
    # Asked before the reference may take the place: a library built from older sources lacks the newer ops.
    if native.load() is not None and torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU"):
        _NATIVE.add(name)
    else:
        _LIBRARY.impl(name, reference, "CPU")
    gpu = None if triton is None else _imported_late(triton)
    _LIBRARY.impl(name, gpu or reference, "CUDA")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    op = Op(name, reference, gpu, getattr(torch.ops.toolkit, name).default)
    _OPS[name] = op
    return op
