"""The specification of ``adamw_8bit`` in plain torch."""

import math

import torch
from torch import Tensor

from toolkit.ops.dynamic_map import dynamic_map, nearest_code

BLOCK = 256  # consecutive elements that share a scale


def dequantise(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """``map[codes] * scale``, scale of its block of 256: float32 in the shape of codes."""
    values = dynamic_map(signed).to(codes.device)[codes.reshape(-1).long()]
    return (values * scale.repeat_interleave(BLOCK)[: codes.numel()]).view(codes.shape)


def quantise(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 of the shape of values; scales float32 [ceil(numel / 256)], each block's largest magnitude."""
    flat = torch.nn.functional.pad(values.reshape(-1), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1) if flat.numel() else flat.new_zeros(0)
    shares = torch.where(scale[:, None] > 0, flat / scale[:, None], 0.0)
    return nearest_code(shares, signed).view(-1)[: values.numel()].view(values.shape), scale


def adamw_8bit(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """``toolkit.ops.adamw_8bit.adamw_8bit``."""
    mean = dequantise(exp_avg, exp_avg_scale, True) * beta1 + grad * (1 - beta1)
    square = dequantise(exp_avg_sq, exp_avg_sq_scale, False) * beta2 + (grad * grad) * (1 - beta2)
    root = torch.sqrt(square) * (1 / math.sqrt(1 - beta2**step)) + eps
    kept = weight * (1 - lr * weight_decay)
    weight.copy_(kept - mean / root * (lr / (1 - beta1**step)))
    for codes, scales, values, signed in (
        (exp_avg, exp_avg_scale, mean, True),
        (exp_avg_sq, exp_avg_sq_scale, square, False),
    ):
        for kept_as, new in zip((codes, scales), quantise(values, signed)):
            kept_as.copy_(new)
