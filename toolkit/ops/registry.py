"""One way to register an op: schema, fake, autograd and one implementation per device.

An op ``toolkit::name`` has a specification in plain torch (``reference``), optionally a native CPU kernel
(registered by the C++ library under the same name) and optionally a Triton one. The default goes by device:
CPU takes the native kernel when the library is there and the reference otherwise; CUDA takes Triton when the
op has one and the reference otherwise. An explicit ``impl=`` never falls back. Inside transforms of ``torch.func`` and
forward-mode AD the default is the reference.

``register`` defines one op. ``register_differentiable`` defines an op and its backward op, and derives the autograd
formula from their schemas.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.ops import native
from toolkit.ops.transforms import first_derivative_only, transformed
from toolkit.ops.triton_devices import on_device_of

_LIBRARY = torch.library.Library("toolkit", "DEF")
R = TypeVar("R")
_OPS: dict[str, "Op[Any]"] = {}
_NATIVE: set[str] = set()


@dataclass(frozen=True)
class Op(Generic[R]):
    """A registered op with results of type R. Calling it dispatches by device; ``select`` names an implementation."""

    name: str
    reference: Callable[..., R]
    triton: Callable[..., R] | None
    overload: Any

    def __call__(self, *args: Any) -> R:
        result: R = self.reference(*args) if transformed() else self.overload(*args)
        return result

    def gradient(self, *args: Any) -> Sequence[Any]:
        """The results of this op as the backward of another op; their own derivative is an error."""
        given: Any = self.overload(*args)
        results = given if isinstance(given, tuple) else (given,)
        return first_derivative_only(self.name.removesuffix("_backward"), results, args)

    def select(self, impl: str | None) -> Callable[..., R]:
        """The callable for ``impl``: None (by device), "reference", "cpu" or "triton"."""
        by_device: Callable[..., R] = self.overload
        if impl is None and transformed():
            return self.reference
        if impl is None or (impl == "cpu" and has_native(self.name)):
            return by_device
        if impl == "reference":
            return self.reference
        if impl == "triton" and self.triton is not None:
            return self.triton
        allowed = ["reference"] + ["cpu"] * has_native(self.name) + ["triton"] * (self.triton is not None)
        raise ToolkitError(must_be_one_of(f"impl of op {self.name}", impl, allowed))


def _imported_late(path: str) -> Callable[..., Any]:
    """The function of this dotted name, whose module is imported at its first call.

    It runs with the device of its first tensor as the current one: Triton launches in the context of that.
    """
    module, _, name = path.rpartition(".")

    @functools.cache
    def load() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function

    def call(*args: Any) -> Any:
        with on_device_of(args):
            return load()(*args)

    call.__name__ = path
    return call


def has_native(name: str) -> bool:
    """Whether the loaded native library holds a kernel for this op, which must be registered."""
    return name in _NATIVE


def register(
    schema: str,
    *,
    reference: Callable[..., R],
    fake: Callable[..., Any],
    triton: str | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Op[R]:
    """Define ``toolkit::<schema>`` and give it its implementations.

    Args:
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
    op: Op[R] = Op(name, reference, gpu, getattr(torch.ops.toolkit, name).default)
    _OPS[name] = op
    return op


def register_differentiable(
    schema: str,
    backward_schema: str,
    *,
    gradients: Sequence[str | tuple[str, ...]],
    reference: ModuleType,
    triton: str,
    triton_backward: str | None = None,
) -> tuple[Op[Any], Op[Any]]:
    """Define an op and its backward op, and register the one as the gradient of the other.

    ``reference`` holds ``<name>``, ``<name>_fake``, ``<name>_backward`` and ``<name>_backward_fake``.

    Args:
        schema: the forward op, as for ``register``. Outputs that the backward reads have names.
        backward_schema: ``<name>_backward``. Its first arguments are the gradients of the outputs, ``grad`` or
            ``grad_<output>``; an output without one is not differentiable. The others are inputs or outputs of the
            forward by their names, which are saved for the backward, or ``need_<input>``: whether a gradient is needed.
        gradients: for each result of the backward the input that it is the gradient of, or several that share it.
        triton: dotted name of the module of the Triton functions ``<name>`` and ``<name>_backward``.
        triton_backward: the module of ``<name>_backward``, where it is another one.

    Returns:
        The forward op and the backward op; their variables declare the types of the results.
    """
    name, backward_name = (text.split("(", 1)[0] for text in (schema, backward_schema))
    backward_op = register(
        backward_schema,
        reference=getattr(reference, backward_name),
        fake=getattr(reference, f"{backward_name}_fake"),
        triton=f"{triton_backward or triton}.{backward_name}",
    )
    formula = _Formula(schema, backward_op, gradients)
    forward_op = register(
        schema,
        reference=getattr(reference, name),
        fake=getattr(reference, f"{name}_fake"),
        triton=f"{triton}.{name}",
        backward=formula.backward,
        setup_context=formula.setup_context,
    )
    return forward_op, backward_op


class _Formula:
    """The autograd formula that the schemas of an op and of its backward op give."""

    def __init__(self, schema: str, backward_op: Op[Any], gradients: Sequence[str | tuple[str, ...]]) -> None:
        parsed = torch._C.parse_schema(schema)
        inputs = [argument.name for argument in parsed.arguments]
        outputs = [result.name for result in parsed.returns]
        arguments = backward_op.overload._schema.arguments
        self.op, self.num_inputs = backward_op, len(inputs)
        grads = [argument.name for argument in arguments if argument.name.split("_")[0] == "grad"]
        # A single gradient ``grad`` is that of the first output.
        self.differentiable = (
            [0] if grads == ["grad"] else [outputs.index(name.removeprefix("grad_")) for name in grads]
        )
        # Where each other argument of the backward comes from: an index into inputs + outputs, or a needed gradient.
        saved = [argument for argument in arguments[len(grads) :] if not argument.name.startswith("need_")]
        names = [*inputs, *outputs]
        is_tensor = [str(argument.type) in ("Tensor", "Optional[Tensor]") for argument in saved]
        self.tensors = [names.index(argument.name) for argument, yes in zip(saved, is_tensor) if yes]
        self.attributes = [names.index(argument.name) for argument, yes in zip(saved, is_tensor) if not yes]
        self.is_tensor = is_tensor
        self.needs = [
            inputs.index(argument.name.removeprefix("need_"))
            for argument in arguments
            if argument.name.startswith("need_")
        ]
        self.targets = [
            [inputs.index(name) for name in ((names,) if isinstance(names, str) else names)] for names in gradients
        ]

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        fixed = [result for i, result in enumerate(results) if i not in self.differentiable]
        if fixed:
            ctx.mark_non_differentiable(*fixed)
        values = [*inputs, *results]
        ctx.present = [value is not None for value in inputs]
        ctx.attributes = [values[i] for i in self.attributes]
        ctx.save_for_backward(*(values[i] for i in self.tensors))

    def backward(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        tensors, attributes = iter(ctx.saved_tensors), iter(ctx.attributes)
        saved = [next(tensors) if yes else next(attributes) for yes in self.is_tensor]
        upstream = [grads[i] for i in self.differentiable]
        results = self.op.gradient(*upstream, *saved, *(needs[i] for i in self.needs))
        found: list[Tensor | None] = [None] * self.num_inputs
        for targets, result in zip(self.targets, results):
            for i in targets:
                # The gradient of an input that was not given, or asked for, is an empty tensor.
                found[i] = result if ctx.present[i] and (needs[i] or i not in self.needs) else None
        return tuple(found)
