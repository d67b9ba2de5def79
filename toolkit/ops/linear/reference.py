"""The specification of ``linear`` in plain torch; also what runs on CPU without the native library."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

_MULTIPLE = 8  # of k, with zeros
_ROWS = 32  # per call of the MKL GEMM: the bits of a row depend on how many rows it is called for


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x @ weight.T + bias``: x ``[..., K]``, weight ``[N, K]``, bias ``[N]`` or None, y ``[..., N]``.

    On CPU, rows go to MKL 32 at a time, the last ones padded with zeros, as K is to a multiple of 8; bfloat16 and
    float16 are computed in float32 and rounded once. MKL is then batch-invariant with a given number of threads:
    measured on AVX2 and AVX-512 with torch 2.13 for float32 and float64, not guaranteed by it elsewhere. On other
    devices this is ``torch.nn.functional.linear``.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    count, inner = x.shape[:-1].numel(), x.shape[-1]
    rows = F.pad(x.reshape(count, inner).to(compute), (0, -inner % _MULTIPLE, 0, -count % _ROWS)).contiguous()
    matrix = F.pad(weight.to(compute), (0, -inner % _MULTIPLE)).contiguous()
    shift = None if bias is None else bias.to(compute).contiguous()
    out = torch.cat([F.linear(some, matrix, shift) for some in rows.split(_ROWS)])
    # No view: a model may write into it.
    return out[:count].reshape(*x.shape[:-1], weight.shape[0]).to(x.dtype, copy=True)


def linear_group_reference(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """``linear_reference`` of one x with several weights, each with its bias or None."""
    return [linear_reference(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
