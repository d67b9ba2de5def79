"""FP8 in blocks, as DeepSeek-V3 and transformers' ``FineGrainedFP8Config`` have it; activations are not rounded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.quantised.stored.parts import fp8_weight
from toolkit.quantised.weight import QuantisedWeight

METHOD = "fp8"
MARKS = ("weight_scale_inv",)


def read(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> QuantisedWeight:
    """``code * scale``; weight float8_e4m3fn [N, K], weight_scale_inv float32 [ceil(N/128), ceil(K/128)]."""
    rows = (settings.get("weight_block_size") or [128])[0]
    return fp8_weight(tensors["weight"], tensors["weight_scale_inv"], dtype, rows)
