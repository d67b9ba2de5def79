"""What the user has set for his own arithmetic does not change a probe."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def float32_arithmetic(device: torch.device) -> Iterator[None]:
    """Inside, gradients are on, autocast is off, tensors are float32 by default and products are not TF32.

    Args:
        device: of the tensors that are computed.
    """
    backends: Any = torch.backends
    products = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    rounded = [(one, one.fp32_precision) for one in products if one.fp32_precision == "tf32"]
    dtype = torch.get_default_dtype()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            torch.set_default_dtype(torch.float32)
            for one, _ in rounded:
                one.fp32_precision = "ieee"
            yield
        finally:
            torch.set_default_dtype(dtype)
            for one, precision in rounded:
                one.fp32_precision = precision
