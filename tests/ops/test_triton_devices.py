"""Triton's launches go to the device of their tensors."""

import contextlib
import importlib
import pkgutil

import pytest
import torch
from torch._subclasses import FakeTensorMode

from toolkit import ops
from toolkit.ops import registry, triton_devices

current = [0]


def device_at_launch(*_):
    """Stands for a launcher of Triton, which launches on the current device."""
    return current[0]


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """Two CUDA devices, the first one current."""

    @contextlib.contextmanager
    def switched(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", switched)


def test_a_kernel_is_launched_on_the_device_of_its_tensors():
    launch = registry._imported_late(f"{__name__}.device_at_launch")
    with FakeTensorMode():
        first, second = (torch.empty(2, device=f"cuda:{index}") for index in range(2))
        cpu = torch.empty(2)
    assert [launch(x) for x in (first, second, cpu)] == [0, 1, 0]
    assert launch(0.5, None, [second, second]) == 1
    assert launch("silu", [], second) == 1
    assert launch(3) == 0
    assert current == [0]


def test_every_launcher_is_guarded():
    """``register`` is given names of Triton functions and hands out what the test above calls."""
    guard = registry._imported_late("module.function").__code__
    for entry in pkgutil.iter_modules(ops.__path__):
        if entry.ispkg and entry.name != "native":
            importlib.import_module(f"toolkit.ops.{entry.name}")
    assert {name for name, op in registry._OPS.items() if op.triton is None or op.triton.__code__ is not guard} == set()


def test_a_device_has_a_name():
    assert triton_devices.device_name(torch.device("cpu")) == "interpreter"
