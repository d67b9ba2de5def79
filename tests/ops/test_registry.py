"""What holds for every registered op."""

import importlib
import os
import re
import subprocess
import sys
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
    by_tokens = name.replace("_chunked", "")  # what serves the chunked form of a recurrence on CPU
    assert native.load() is None or registry.has_native(by_tokens)
    assert op.triton is not None
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"toolkit::{name}", "CUDA")


@pytest.mark.parametrize("name", sorted(registry._OPS))
def test_its_triton_function_is_there(name):
    pytest.importorskip("triton")
    module, _, function = registry._OPS[name].triton.__name__.rpartition(".")
    assert callable(getattr(importlib.import_module(module), function))


def test_without_a_native_library_the_reference_serves_and_says_so_once(tmp_path):
    script = """
import torch
from toolkit.ops.linear import linear
from toolkit.ops.rms_norm import rms_norm
from toolkit.ops import registry
assert not registry._NATIVE
print(rms_norm(linear(torch.ones(2, 3), torch.eye(3)), None, 0.0).tolist())
"""
    environment = os.environ | {"TOOLKIT_NATIVE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([[1.0] * 3] * 2)
    assert done.stderr.count("toolkit runs on its reference kernels: the native CPU library is missing") == 1


@pytest.mark.parametrize("folder", FOLDERS)
def test_lies_in_the_house_form(folder):
    names = {path.name for path in (Path(toolkit.ops.__file__).parent / folder).iterdir()}
    assert {"__init__.py", "reference.py", "cpu.cpp"} <= names
    kernels = [op.triton.__name__ for op in registry._OPS.values() if op.triton is not None]
    own = [name for name in kernels if name.startswith(f"toolkit.ops.{folder}.")]
    composed = bool(own) and all(name.startswith(f"toolkit.ops.{folder}.reference.") for name in own)
    assert composed != ("triton.py" in names)  # an op made of others has no kernels but theirs
