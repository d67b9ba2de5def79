"""GPTQ: codes packed along the inputs, zeros along the outputs and, in its first version, stored less one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.quantised.stored.parts import int4_weight, unpacked
from toolkit.quantised.weight import QuantisedWeight

METHOD = "gptq"
MARKS = ("qweight",)


def read(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> QuantisedWeight:
    """``(code - zero) * scale``; qweight int32 [K/8, N], qzeros int32 [G, N/8], scales [G, N], g_idx [K]."""
    if settings.get("bits", 4) != 4:
        raise ToolkitError(f"bits of GPTQ must be 4, got {settings.get('bits')}.")
    codes = unpacked(tensors["qweight"].t(), 4)
    zero = unpacked(tensors["qzeros"], 4).t()
    if settings.get("checkpoint_format", "gptq") == "gptq":
        zero = zero + 1
    group_of, count = tensors.get("g_idx"), len(tensors["scales"])
    if group_of is not None:
        size = -(-codes.shape[1] // count)
        if not torch.equal(group_of.long().cpu(), torch.arange(len(group_of)) // size):
            raise ToolkitError("desc_act of GPTQ must be false, got groups of inputs in another order.")
    return int4_weight(codes, zero, tensors["scales"].t(), dtype)
