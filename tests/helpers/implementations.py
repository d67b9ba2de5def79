"""What a test of an op is parametrised over: the reference, the native CPU kernels and the Triton kernels.

The Triton kernels run on the CUDA device where there is one, and in Triton's interpreter on CPU tensors otherwise.
``@impl_and_dtype()`` gives a test every pair of an implementation and a dtype that it takes; the fixture ``impl`` alone
gives it every implementation. ``@impl_and`` leaves to the sweep what would repeat a long test in the interpreter.
"""

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.gpu.device import mend_interpreter
from tests.helpers import interpreter, rowwise
from toolkit import ops
from toolkit.ops import registry

_Generator = torch.Generator
CUDA = torch.cuda.is_available()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SMALL = not CUDA  # sizes for the interpreter
HALF = torch.bfloat16 if CUDA else torch.float16  # a 16-bit dtype that every implementation takes


@dataclass(frozen=True)
class Implementation:
    """One implementation of the ops.

    option: what the ops' ``impl=`` takes for it. None dispatches by device: to the native kernels where the library was
        built, and to Triton while ``active()``. An explicit "triton" would pass autograd by.
    dtypes: floating-point dtypes that it takes, the most precise one first.
    """

    name: str
    option: str | None
    device: torch.device
    dtypes: tuple[torch.dtype, ...]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Default dispatch goes to this implementation, and new tensors to its device."""
        with ExitStack() as stack:
            if self.name == "triton":
                bounds = {dtype: (bound, 2 * bound) for dtype, bound in interpreter.TOLERANCE.items()}
                stack.enter_context(mock.patch.multiple(rowwise, BOUNDS=bounds, THREADS=(1,), WIDEST=self.dtypes[0]))
                stack.enter_context(interpreter.poisoned())
                if CUDA:
                    stack.enter_context(torch.device(self.device))
                    stack.enter_context(mock.patch.object(torch, "Generator", partial(_generator, self.device)))
                else:
                    mend_interpreter()
                    stack.enter_context(serving("triton"))
                    from triton.runtime.interpreter import InterpreterBuilder

                    stack.enter_context(mock.patch.object(InterpreterBuilder, "create_dot", interpreter.row_by_row))
            elif self.name == "reference":
                stack.enter_context(serving("reference"))
            yield

    def near(self, float64: float, float32: float = 3e-6) -> float:
        """The bound of an error at the most precise dtype of this implementation."""
        return float64 if self.dtypes[0] == torch.float64 else float32


CPU = torch.device("cpu")
REFERENCE = Implementation("reference", "reference", CPU, (torch.float64, torch.float32, torch.bfloat16, torch.float16))
NATIVE = Implementation("native", None, CPU, REFERENCE.dtypes)
TRITON = Implementation(
    "triton",
    None,
    torch.device("cuda" if CUDA else "cpu"),
    # The interpreter computes with numpy, which has no bfloat16.
    (torch.float32, torch.bfloat16, torch.float16) if CUDA else (torch.float32, torch.float16),
)
IMPLEMENTATIONS = (REFERENCE, NATIVE, TRITON)


def parameter(implementation: Implementation, *values: Any, marks: Sequence[pytest.MarkDecorator] = ()) -> Any:
    """A parameter set of a test; on a CUDA device it belongs to the GPU suite."""
    marks = [*marks, *([pytest.mark.gpu] if implementation.device.type == "cuda" else [])]
    names = [str(value).removeprefix("torch.") for value in values]
    return pytest.param(implementation, *values, marks=marks, id="-".join([implementation.name, *names]))


PARAMETERS = [parameter(implementation) for implementation in IMPLEMENTATIONS]


def impl_and_dtype(
    dtypes: Sequence[torch.dtype] | None = None, implementations: Sequence[Implementation] = IMPLEMENTATIONS
) -> pytest.MarkDecorator:
    """Parametrise a test by ``impl`` and ``dtype``: of ``dtypes`` (all) those that an implementation takes.

    In Triton's interpreter the first one is of the fast level, the others of the sweep.
    """
    pairs = [parameter(one, dtype, marks=_swept(one, again)) for one, dtype, again in _pairs(dtypes, implementations)]
    return pytest.mark.parametrize(("impl", "dtype"), pairs, indirect=["impl"])


def impl_and(
    names: str, cases: Iterable[Any], fast: Container[Any], implementations: Sequence[Implementation] = IMPLEMENTATIONS
) -> pytest.MarkDecorator:
    """Parametrise a test by ``impl`` and ``names``: in the interpreter only ``fast`` cases are of the fast level.

    names: of one argument, whose values the cases are, or of several, as in "window, softcap": the cases are tuples.
    """
    cases = list(cases)
    sets = [
        parameter(one, *_values(names, case), marks=_swept(one, case not in fast))
        for one in implementations
        for case in cases
    ]
    return pytest.mark.parametrize(f"impl, {names}", sets, indirect=["impl"])


def impl_dtype_and(
    names: str,
    cases: Iterable[Any],
    fast: Container[Any],
    dtypes: Sequence[torch.dtype] | None = None,
    implementations: Sequence[Implementation] = IMPLEMENTATIONS,
) -> pytest.MarkDecorator:
    """``impl_and_dtype`` and ``impl_and`` at once."""
    cases = list(cases)
    sets = [
        parameter(one, dtype, *_values(names, case), marks=_swept(one, again or case not in fast))
        for one, dtype, again in _pairs(dtypes, implementations)
        for case in cases
    ]
    return pytest.mark.parametrize(f"impl, dtype, {names}", sets, indirect=["impl"])


def _values(names: str, case: Any) -> Sequence[Any]:
    return case if "," in names else [case]


def _swept(implementation: Implementation, again: bool) -> Sequence[pytest.MarkDecorator]:
    """The marks of a case that repeats another one: the interpreter takes seconds for a test."""
    return [pytest.mark.sweep] if SMALL and implementation is TRITON and again else []


def _pairs(
    dtypes: Sequence[torch.dtype] | None, implementations: Sequence[Implementation]
) -> Iterator[tuple[Implementation, torch.dtype, bool]]:
    """Each implementation with each of its dtypes, and whether it is a further one."""
    for one in implementations:
        taken = [dtype for dtype in one.dtypes if dtypes is None or dtype in dtypes]
        for dtype in taken:
            yield one, dtype, dtype != taken[0]


def implementations(*chosen: Implementation) -> pytest.MarkDecorator:
    """Parametrise a test by ``impl`` over ``chosen`` only."""
    return pytest.mark.parametrize("impl", [parameter(one) for one in chosen], indirect=True)


only_triton = implementations(TRITON)
"""For a test of what only the Triton kernels do: of launchers, tiles and their limits."""


def needs_cuda(test: Callable[..., Any]) -> Callable[..., Any]:
    """For a test of the Triton kernels at sizes that only a device can hold: skipped where there is none."""
    return pytest.mark.skipif(not CUDA, reason="needs a CUDA device, and this machine has none")(only_triton(test))


def only_interpreter(test: Callable[..., Any]) -> Callable[..., Any]:
    """For a test of the Triton kernels that knows the interpreter's tiles or dtypes: skipped on a CUDA device."""
    return pytest.mark.skipif(CUDA, reason="needs Triton's interpreter, not a device")(only_triton(test))


def _generator(default: torch.device, device: str | torch.device | None = None) -> torch.Generator:
    """A generator of the device whose tensors it fills."""
    return _Generator(device or default)


@cache
def _every_op() -> tuple[registry.Op, ...]:
    for entry in pkgutil.iter_modules(ops.__path__):
        if entry.ispkg and entry.name != "native":
            importlib.import_module(f"toolkit.ops.{entry.name}")
    return tuple(registry._OPS.values())


@contextmanager
def serving(kind: str) -> Iterator[None]:
    """The implementations "reference" or "triton" serve the ops on CPU tensors, through the dispatcher and autograd."""
    with torch.library._scoped_library("toolkit", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of kernels that are replaced
            for op in _every_op():
                function = getattr(op, kind)
                if function is not None:
                    library.impl(op.name, function, "CPU", allow_override=True)
        yield
