"""bitsandbytes: NF4 in blocks of 64, whose scales may be quantised again, and LLM.int8's codes without its outliers."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.quantised_linear.packing import pack_codes, pack_groups
from toolkit.quantised.stored.parts import int8_weight
from toolkit.quantised.weight import QuantisedWeight

METHOD = "bitsandbytes"
_STATE = "weight.quant_state.bitsandbytes__"
MARKS = (f"{_STATE}nf4", f"{_STATE}fp4", "SCB")
_BLOCK, _NESTED_BLOCK = 64, 256


def read(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> QuantisedWeight:
    """NF4: ``table[code] * absmax``; 8 bits: ``code * (SCB / 127)``, of which bitsandbytes divides the product."""
    if "SCB" in tensors:
        return int8_weight(tensors["weight"], tensors["SCB"].float()[:, None] / 127, dtype)
    name = next(name for name in tensors if name.startswith(_STATE))
    state = json.loads(bytes(tensors[name].tolist()))
    if state["quant_type"] != "nf4" or state["blocksize"] != _BLOCK:
        raise ToolkitError(
            f"bitsandbytes' 4 bits must be nf4 in blocks of 64, got {state['quant_type']} in blocks of "
            f"{state['blocksize']}."
        )
    outputs, inputs = state["shape"]
    if inputs % _BLOCK:
        raise ToolkitError(f"blocks of bitsandbytes must end with an output's inputs, of which there are {inputs}.")
    packed = tensors["weight"].reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], -1).view(outputs, inputs)
    absmax = tensors["weight.absmax"].view(outputs, inputs // _BLOCK)
    if "weight.nested_absmax" not in tensors:
        scales = [pack_groups(absmax.float())]
    elif state["nested_blocksize"] == _NESTED_BLOCK:
        nested, table = tensors["weight.nested_absmax"].float(), tensors["weight.nested_quant_map"].float()
        scales = [pack_groups(absmax), nested, torch.tensor(state["nested_offset"], dtype=torch.float32), table]
    else:
        raise ToolkitError(f"nested_blocksize of bitsandbytes must be 256, got {state['nested_blocksize']}.")
    return QuantisedWeight("nf4", pack_codes(codes, 4), scales, (outputs, inputs), dtype)
