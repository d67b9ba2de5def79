"""AWQ: codes and zeros packed along the outputs, interleaved."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.quantised.stored.parts import int4_weight, unpacked
from toolkit.quantised.weight import QuantisedWeight

METHOD = "awq"
MARKS = ("qweight",)
_OFFSETS = (0, 4, 1, 5, 2, 6, 3, 7)  # of output j of eight


def read(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> QuantisedWeight:
    """``(code - zero) * scale``; qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N]."""
    if settings.get("bits", 4) != 4 or settings.get("version", "gemm").lower() != "gemm":
        raise ToolkitError(
            f"AWQ must have 4 bits and version gemm, got {settings.get('bits')} and {settings.get('version')}."
        )
    codes, zero = (unpacked(tensors[name], 4, _OFFSETS).t() for name in ("qweight", "qzeros"))
    return int4_weight(codes, zero, tensors["scales"].t(), dtype)
