"""The table of what every kernel compiles to: its cases, its file, and the fingerprint of the code it was made from."""

import ast
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, describe, write_aside
from tools.compile_kernels import (
    kernel_cases_attention,
    kernel_cases_matrix,
    kernel_cases_moe,
    kernel_cases_recurrence,
    kernel_cases_rowwise,
    kernel_cases_sample,
)
from tools.compile_kernels.compiler import Compiled

TABLE = ROOT / "benchmarks" / "results" / "kernels.json"


def cases() -> dict[str, Callable[[], Any]]:
    """Every kernel with every shipped tile: name -> the call that launches it."""
    modules = (
        kernel_cases_attention,
        kernel_cases_rowwise,
        kernel_cases_matrix,
        kernel_cases_moe,
        kernel_cases_sample,
        kernel_cases_recurrence,
    )
    return {name: call for module in modules for name, call in module.cases().items()}


def fingerprint() -> str:
    """A digest of the code that decides what the kernels compile to.

    Comments, docstrings and formatting do not count, nor does the version of Triton.
    """
    ops = ROOT / "toolkit" / "ops"
    kernels = {
        *ops.rglob("triton*.py"),
        *ops.rglob("tiles.py"),
        *ops.glob("*/kinds/*.py"),
        *ops.glob("*/modifiers/*.py"),
    }
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(kernels | {here / "compiler.py", *here.glob("kernel_cases_*.py")}):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(ast.dump(_without_docstrings(ast.parse(path.read_text()))).encode())
    return digest.hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return tree


def write(results: Iterable[tuple[str, Compiled]]) -> Path:
    """Write the table, one line per case: target -> the kernels that the case launches."""
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for case, made in results:
        entry = asdict(made)
        grouped.setdefault(case, {}).setdefault(entry.pop("arch"), []).append(entry)
    head = json.dumps({**describe(), "fingerprint": fingerprint()}, indent=2).removesuffix("\n}")
    lines = ",\n".join(f"    {json.dumps({'case': case, **targets})}" for case, targets in grouped.items())
    return write_aside(TABLE, f'{head},\n  "kernels": [\n{lines}\n  ]\n}}\n')


def read() -> tuple[str, list[tuple[str, Compiled]]]:
    """(fingerprint, (case, compiled kernel) pairs) of the committed table."""
    table = json.loads(TABLE.read_text())
    rows = [
        (line["case"], Compiled(arch=arch, **entry))
        for line in table["kernels"]
        for arch, entries in line.items()
        if arch != "case"
        for entry in entries
    ]
    return table["fingerprint"], rows
