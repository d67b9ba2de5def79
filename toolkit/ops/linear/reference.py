"""The specification of ``linear`` in plain torch; also what runs on CPU without the native library."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# The vendor's CPU product keeps a row's bits while the numbers of rows and of k are multiples of this.
_MULTIPLE = 8


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x @ weight.T + bias``: x ``[..., K]``, weight ``[N, K]``, bias ``[N]`` or None, y ``[..., N]``.

    On CPU, rows and K are padded with zeros to multiples of 8, and bfloat16 and float16 are computed in float32 and
    rounded once. The vendor's library then gives a row the same bits for any number of rows and any place among them:
    measured on AVX2 with torch 2.13 for float32 and float64, not promised by that library elsewhere. On other devices
    this is ``torch.nn.functional.linear``.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    count, inner = x.shape[:-1].numel(), x.shape[-1]
    rows = F.pad(x.reshape(count, inner).to(compute), (0, -inner % _MULTIPLE, 0, -count % _MULTIPLE)).contiguous()
    matrix = F.pad(weight.to(compute), (0, -inner % _MULTIPLE)).contiguous()
    out = F.linear(rows, matrix, None if bias is None else bias.to(compute).contiguous())
    return out[:count].to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def linear_group_reference(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """``linear_reference`` of one x with several weights, each with its bias or None."""
    return [linear_reference(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
