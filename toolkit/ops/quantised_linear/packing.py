"""The packed layout of quantised weights: outputs in panels of 16, so that 16 lanes of a vector hold 16 outputs.

N outputs and K inputs; P = ceil(N / 16) panels; outputs beyond N have code 0 and scale 0, inputs beyond K code 0.

4-bit codes: int32 [P, ceil(K/8), 16]; element (p, i, l) holds k = 8i to 8i+7 of output 16p + l, k = 8i + j in bits 4j
to 4j+3. 8-bit codes: bytes [P, ceil(K/4), 16, 4]; (p, i, l, j) is k = 4i + j of output 16p + l. What is stored per
group of inputs (scales, zeros, offsets): [P, G, 16], G groups of an output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16
PER_WORD = {4: 8, 8: 4}  # codes of one output in 32 bits, by the bits of a code


def panels(outputs: int) -> int:
    """P, the panels of ``outputs`` outputs."""
    return -(-outputs // PANEL)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] in the packed layout.

    Args:
        codes: [N, K]; of 4 bits 0 to 15 in any integer dtype, of 8 bits in a dtype of one byte, which is kept.
        bits: 4 or 8.
    """
    per_word = PER_WORD[bits]
    outputs, inputs = codes.shape
    dtype = codes.dtype if bits == 8 else torch.int32
    data = codes.view(torch.uint8) if bits == 8 else codes.to(torch.uint8)
    padded = F.pad(data, (0, -inputs % per_word, 0, -outputs % PANEL))
    lanes = padded.view(panels(outputs), PANEL, -1, per_word).transpose(1, 2)
    if bits == 8:
        return lanes.contiguous().view(dtype)
    return (lanes[..., 0::2] | lanes[..., 1::2] << 4).contiguous().view(torch.int32).squeeze(-1)


def unpack_codes(packed: Tensor, bits: int, outputs: int, inputs: int) -> Tensor:
    """Codes [N, K] from the packed layout: uint8 for 4 bits, else in the dtype of ``packed``."""
    if bits == 8:
        lanes = packed.view(torch.uint8)
    else:
        pairs = packed.contiguous().view(torch.uint8).view(*packed.shape, 4)
        lanes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)
    rows = lanes.transpose(1, 2).reshape(lanes.shape[0] * PANEL, -1)
    codes = rows[:outputs, :inputs].contiguous()
    return codes.view(packed.dtype) if bits == 8 else codes


def pack_groups(data: Tensor) -> Tensor:
    """[N, G] as [P, G, 16], with zeros beyond N."""
    outputs, groups = data.shape
    padded = F.pad(data, (0, 0, 0, -outputs % PANEL))
    return padded.view(panels(outputs), PANEL, groups).transpose(1, 2).contiguous()


def unpack_groups(data: Tensor, outputs: int) -> Tensor:
    """[N, G] from [P, G, 16]."""
    return data.transpose(1, 2).reshape(-1, data.shape[1])[:outputs]


def spread(data: Tensor, group: int, inputs: int) -> Tensor:
    """[N, G] repeated to [N, K]: the value of each input's group of ``group`` inputs."""
    return data.repeat_interleave(group, dim=1)[:, :inputs]


def grouped(weight: Tensor, group: int) -> Tensor:
    """[N, K] as float32 [N, G, group], with zeros beyond K."""
    dense = F.pad(weight.to(torch.float32), (0, -weight.shape[1] % group))
    return dense.view(weight.shape[0], -1, group)
