"""The import direction of the packages, and what importing them may pull in."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    # package: toolkit packages it may import from
    "ops": {"ops"},
    "quantised": {"quantised", "ops"},
    "state": {"state", "ops"},
    "moe": {"moe", "ops"},
    "modules": {"modules", "ops", "state", "moe"},
    "patching": {"patching", "modules", "state", "moe", "quantised", "ops"},
    "engine": {"engine", "patching", "state", "ops"},
    "training": {
        "training",
        "config",
        "engine",
        "patching",
        "state",
        "moe",
        "quantised",
        "ops",
        "exporting",
        "loading",
    },
    "live": {"live", "engine", "patching", "state"},
    "serving": {"serving", "engine", "live"},
    "exporting": {"exporting", "engine", "patching", "quantised", "loading", "state", "ops"},
    "config": {"config"},
    "loading": {"loading", "quantised"},
    "chat": set(),
    "llm": {"llm", "engine", "loading"},
}
EVERYWHERE = {
    "lazy",
    "chat",
    "errors",
    "files",
    "machine",
    "numerics",
    "packing",
    "registry",
    "sentences",
    "strict_json",
    "whole_shapes",
}
KNOW_TRANSFORMERS = {"patching", "exporting", "testing", "cli", "training", "loading", "chat"}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_downwards_only(package):
    files = sorted((ROOT / "toolkit" / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imports_of(path):
            if name.startswith("toolkit."):
                part = name.split(".")[1]
                assert part in PACKAGES[package] | EVERYWHERE, f"{path.relative_to(ROOT)} imports {name}"


def test_only_some_packages_know_transformers():
    for path in (ROOT / "toolkit").rglob("*.py"):
        part = path.relative_to(ROOT / "toolkit").parts[0]
        if part not in KNOW_TRANSFORMERS:
            assert not any(n.split(".")[0] == "transformers" for n in imports_of(path)), path


def test_framework_patches_do_not_import_each_other():
    for mine, other in (("train_patches", "infer_patches"), ("infer_patches", "train_patches")):
        for path in (ROOT / mine).rglob("*.py"):
            assert not any(name.split(".")[0] == other for name in imports_of(path)), path


# (module, imported module) of imports inside functions that are there to delay something heavy, with the reason.
DELAYED: dict[tuple[str, str], str] = {}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path, modules: set[str]) -> Iterator[str]:
    """What a file imports of ``modules``, inside functions too; not what it imports for type checkers alone."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield from [submodule] if submodule in modules else {node.module or ""} & modules
        else:
            pending.extend(ast.iter_child_nodes(node))


def test_no_import_circle_between_modules():
    modules = {module_name(path): path for path in (ROOT / "toolkit").rglob("*.py")}
    names = set(modules)
    graph = {
        name: {other for other in imported_modules(path, names) if (name, other) not in DELAYED}
        for name, path in modules.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError("import circle: " + " <- ".join(error.args[1])) from None


def test_importing_the_ops_needs_neither_transformers_nor_triton_and_patches_nothing():
    code = (
        "import sys, toolkit, toolkit.ops.linear, toolkit.ops.attention, toolkit.state;"
        "print([m for m in ('transformers', 'triton', 'accelerate', 'fastapi') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_files_stay_small():
    for folder in ("toolkit", "train_patches", "infer_patches", "benchmarks", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path
