"""Fixtures of every test. Without a CUDA device the Triton kernels run in Triton's interpreter, on CPU tensors."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported and whenever a kernel is decorated, so it is set before any test file is read.
    os.environ["TRITON_INTERPRET"] = "1"

from tests.helpers.implementations import PARAMETERS, Implementation


@pytest.fixture(params=PARAMETERS)
def impl(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """An implementation of the ops. While the test runs, ``impl=impl.option`` selects it, through autograd."""
    implementation: Implementation = request.param
    if implementation.name == "triton":
        pytest.importorskip("triton", reason="the Triton kernels need triton")
    with implementation.active():
        yield implementation
