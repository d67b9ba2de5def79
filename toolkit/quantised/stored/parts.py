"""What the layouts have in common: codes packed in 32 bits, groups of any multiple of 32, and the formats they make.

N outputs, K inputs, G groups of an output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.quantised_linear.packing import pack_codes, pack_groups
from toolkit.quantised.weight import QuantisedWeight


def unpacked(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """uint8 [..., n 32 / bits] of int32 [..., n]: code j of a word begins at bit ``bits * j``.

    Args:
        order: of each code of a word, where it lies instead.
    """
    offsets = torch.arange(32 // bits) if order is None else torch.tensor(order)
    codes = (words.unsqueeze(-1) >> (offsets * bits).to(torch.int32)) & ((1 << bits) - 1)
    return codes.flatten(-2).to(torch.uint8)


def packed(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers of ``bits`` bits, int32 [rows, columns], in int32 words, the first in the lowest bits."""
    each = 32 // bits
    padding = -values.shape[-1] % each
    words = F.pad(values, (0, padding)).unflatten(-1, (-1, each)).to(torch.int64)
    total = (words << (torch.arange(each) * bits)).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def int4_weight(codes: Tensor, zero: Tensor, scale: Tensor, dtype: torch.dtype) -> QuantisedWeight:
    """``(code - zero) * scale`` in the format int4.

    Args:
        codes: [N, K] 0 to 15.
        zero: [N, G] 0 to 16, as integers.
        scale: [N, G] float16, bfloat16 or float32.
    """
    outputs, inputs = codes.shape
    group, times = _group(inputs, scale.shape[1], (128, 64, 32))
    count = -(-inputs // group)
    zero, scale = (part.repeat_interleave(times, 1)[:, :count] for part in (zero, scale))
    return QuantisedWeight(
        "int4", pack_codes(codes, 4), [pack_groups(scale), pack_groups(zero.to(torch.uint8))], (outputs, inputs), dtype
    )


def int8_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> QuantisedWeight:
    """``code * scale``: in the format int8 where each output has one scale, else in q8_0.

    Args:
        codes: [N, K] int8.
        scale: [N, G].
    """
    outputs, inputs = codes.shape
    packed = pack_codes(codes, 8)
    if scale.shape[1] == 1:
        return QuantisedWeight("int8", packed, [pack_groups(scale.float())], (outputs, inputs), dtype)
    group, times = _group(inputs, scale.shape[1], (32,))
    half = scale.half()
    if not torch.equal(half.float(), scale.float()):
        raise ToolkitError("int8 codes in groups must have scales that float16 holds, got others.")
    spread = half.repeat_interleave(times, 1)[:, : -(-inputs // group)]
    return QuantisedWeight("q8_0", packed, [pack_groups(spread)], (outputs, inputs), dtype)


def fp8_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype, block_rows: int = 128) -> QuantisedWeight:
    """``code * scale`` in the format fp8.

    Args:
        codes: [N, K] float8_e4m3fn.
        scale: of all, [N, 1] or [N], or of blocks of ``block_rows`` outputs and a multiple of 128 inputs.
    """
    outputs, inputs = codes.shape
    if codes.dtype != torch.float8_e4m3fn:
        raise ToolkitError(f"8-bit floats must be float8_e4m3fn, got {str(codes.dtype).removeprefix('torch.')}.")
    grid = scale.float().reshape(-1, 1) if scale.dim() < 2 else scale.float()
    each = {1: outputs, outputs: 1}.get(grid.shape[0], block_rows)
    rows = grid.repeat_interleave(each, 0)[:outputs]  # the last block of outputs may be smaller
    group, times = _group(inputs, grid.shape[1], (128,))
    spread = rows.repeat_interleave(times, 1)[:, : -(-inputs // group)]
    return QuantisedWeight("fp8", pack_codes(codes, 8), [pack_groups(spread)], (outputs, inputs), dtype)


def _group(inputs: int, count: int, allowed: tuple[int, ...]) -> tuple[int, int]:
    """A format's group size that cuts ``count`` groups of ``inputs`` into equal parts, and into how many."""
    if count == 1:
        return allowed[0], -(-inputs // allowed[0])
    for group in allowed:
        if -(-inputs // group) == count:  # the last group may be smaller
            return group, 1
    size = -(-inputs // count)
    for group in allowed:
        if size % group == 0:
            return group, size // group
    raise ToolkitError(f"groups must have a multiple of {allowed[-1]} inputs, got {size}.")
