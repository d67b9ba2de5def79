"""An exact oracle: stock transformers code in float64 throughout.

transformers computes norms, softmax and rotary tables in float32 for every dtype of the model, so a float64 model is
exact to 1e-7 only. Inside ``lifted_to_double`` those casts go to float64 instead, and eager attention is an oracle to
1e-14 that shares no code with this project.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def lifted_to_double() -> Iterator[None]:
    """Inside, ``torch.float32``, ``Tensor.float()`` and ``torch.float`` mean float64. Not thread-safe."""
    saved = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved  # type: ignore[method-assign]


def eager(model: Any) -> Any:
    """``model`` with transformers' own plain code for attention and experts."""
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model
