"""Fixtures of every test. Without a CUDA device the Triton kernels run in Triton's interpreter, on CPU tensors."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Read when OpenMP is loaded, with torch: threads that spin while they wait take the CPU of the other worker process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported and whenever a kernel is decorated, so it is set before any test file is read.
    os.environ["TRITON_INTERPRET"] = "1"

from tests.helpers.implementations import PARAMETERS, Implementation

# Who is started in the background ignores them, and so would the processes that the tests send them to.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Written by tools/long_tests.py: cases that run one level later than their marks say, for their length.
LONG = {level: Path(__file__).with_name(f"{level}_tests.txt") for level in ("sweep", "soak")}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for level, path in LONG.items():
        long = set(path.read_text(encoding="utf-8").splitlines())
        for item in items:
            if item.nodeid in long and not any(item.iter_markers("soak")):
                item.add_marker(level)


@pytest.fixture(autouse=True)
def same_number_of_threads() -> Iterator[None]:
    """No test leaves another number of threads to the tests after it."""
    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before, f"the test leaves {after} threads to those after it"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small work by one thread, so that a busy machine does not make the tests wait for the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=PARAMETERS)
def impl(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """An implementation of the ops. While the test runs, ``impl=impl.option`` selects it, through autograd."""
    implementation: Implementation = request.param
    if implementation.name == "triton":
        pytest.importorskip("triton", reason="the Triton kernels need triton")
    with implementation.active():
        yield implementation
