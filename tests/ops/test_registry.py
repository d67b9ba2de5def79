"""What holds for every registered op."""

import re
from pathlib import Path

import pytest
import torch

import toolkit.ops
from toolkit.ops import native, registry

FOLDERS = sorted(path.parent.name for path in Path(toolkit.ops.__file__).parent.glob("*/reference.py"))
for folder in FOLDERS:
    __import__(f"toolkit.ops.{folder}")
TESTS = {path: path.read_text() for path in Path(__file__).parent.glob("test_*.py")}


@pytest.mark.parametrize("name", sorted(registry._OPS))
def test_is_checked_by_opcheck(name):
    """Schema, fake, autograd registration and aliasing: in the op's own tests, where its inputs are."""
    call = re.compile(rf"\.{name}\.default")
    assert any("opcheck" in text and call.search(text) for text in TESTS.values())


@pytest.mark.parametrize("name", sorted(registry._OPS))
def test_has_kernels(name):
    op = registry._OPS[name]
    assert native.load() is None or registry.has_native(name)
    assert op.triton is not None
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"toolkit::{name}", "CUDA")


@pytest.mark.parametrize("folder", FOLDERS)
def test_lies_in_the_house_form(folder):
    names = {path.name for path in (Path(toolkit.ops.__file__).parent / folder).iterdir()}
    assert {"__init__.py", "reference.py", "cpu.cpp", "triton.py"} <= names
