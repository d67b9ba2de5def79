"""What a case of the table of compiled kernels was made from, as a digest: sources of its kernels, and their launches.

Comments, docstrings and formatting do not count, nor does the version of Triton.
"""

import ast
import builtins
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from tools.compile_kernels.compiler import Launch, recording, specialised


def of_case(call: Callable[[], Any], arch: str) -> str:
    """The digest of every launch that ``call`` makes for ``arch``."""
    with recording(arch) as launches:
        call()
    if not launches:
        raise RuntimeError("a case must launch a kernel, got none; is Triton's interpreter on (TRITON_INTERPRET)?")
    return _digest(*(_of_launch(launch) for launch in launches))


def _of_launch(launch: Launch) -> str:
    signature, constants, attributes = specialised(launch)
    values = [f"{name}={_of_value(value)}" for name, value in constants.items()]
    return _digest(
        of_kernel(launch.kernel), str(signature), *values, str(attributes), str(sorted(launch.options.items()))
    )


@cache
def of_kernel(kernel: Any) -> str:
    """The digest of a kernel: its code, that of every function it calls, and the values that it takes from modules."""
    return _digest(*(f"{name}={part}" for name, part in sorted(_parts(kernel, set()))))


def _parts(function: Any, seen: set[Any]) -> Iterator[tuple[str, str]]:
    """(name, code or value) of a Triton function and of what it refers to."""
    name = f"{function.fn.__module__}.{function.fn.__qualname__}"
    if name in seen:
        return
    seen.add(name)
    tree = without_docstrings(ast.parse(textwrap.dedent(inspect.getsource(function.fn))))
    noinline = getattr(function, "noinline", False)
    yield name, f"{ast.dump(tree)} {noinline}"
    for path, value in _references(tree, function.fn):
        if _is_triton(value):
            yield from _parts(value, seen)
        else:
            yield f"{name}:{path}", _of_value(value)


def _references(tree: ast.Module, function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """What names of a function's code refer to outside of it, but for Triton's own language and Python's builtins."""
    scope = {**vars(builtins), **function.__globals__, **inspect.getclosurevars(function).nonlocals}
    nodes = list(ast.walk(tree))
    local = {node.arg for node in nodes if isinstance(node, ast.arg)}
    local |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        path = _path(node)
        if not path or path[0] not in scope or path[0] in local:
            continue
        value = scope[path[0]]
        for at, name in enumerate(path[1:], 1):
            if inspect.ismodule(value) and hasattr(value, name):
                value = getattr(value, name)
                continue
            path = path[:at]
            break
        if not inspect.ismodule(value) and not _is_language(value):
            yield ".".join(path), value


def _path(node: ast.AST) -> list[str]:
    """``a.b.c`` as its names; empty for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    inner = _path(node.value) if isinstance(node, ast.Attribute) else []
    return [*inner, node.attr] if inner and isinstance(node, ast.Attribute) else []


def _is_triton(value: Any) -> bool:
    """Whether it is a function that Triton compiles, of the project rather than of Triton."""
    return hasattr(value, "fn") and hasattr(value, "arg_names")


def _is_language(value: Any) -> bool:
    """Whether it belongs to Triton or Python, whose versions do not count."""
    of = value.fn if _is_triton(value) else value
    module: str = getattr(of, "__module__", None) or type(of).__module__
    if isinstance(value, _PLAIN) or type(value).__name__ == "constexpr":
        return False
    return module.split(".")[0] in ("triton", "builtins")


_PLAIN = (bool, int, float, str, bytes, type(None), tuple, list, dict, torch.dtype)


def _of_value(value: Any) -> str:
    """A value that a kernel was made with; TypeError for one that no digest is known for."""
    if type(value).__name__ == "constexpr":
        return _of_value(value.value)
    if _is_triton(value):
        return of_kernel(value)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_of_value, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_of_value(of)}' for key, of in value.items())}}}"
    if isinstance(value, _PLAIN) or _is_language(value) or inspect.isclass(value):
        return repr(value)
    raise TypeError(f"a kernel refers to {value!r}, for which tools/compile_kernels/fingerprints.py has no digest.")


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The same code without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return tree


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
