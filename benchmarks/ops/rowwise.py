"""Row-wise ops against transformers' code, eager and compiled by ``torch.compile``, forward and backward."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import both_ways, gate, print_table
from benchmarks.ops.registry import GATE
from benchmarks.ops.timing import in_turns
from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.rms_norm import rms_norm
from toolkit.ops.rotary import rotary

TOKENS, WIDTH, HEADS, HEAD_DIM, GATED = 2048, 512, 8, 64, 1408


def rowwise_cases() -> dict[str, tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]]:
    """name -> (ours, transformers' own, inputs); shapes of the 32 M Llama at 2,048 tokens."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    norm = LlamaRMSNorm(WIDTH, 1e-6)

    def stock_norm(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    angles = torch.rand(TOKENS, HEAD_DIM) * 6.0
    cos, sin = angles.cos(), angles.sin()

    def our_rotary(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return tuple(rotary(x.view(TOKENS, HEADS, HEAD_DIM), cos, sin).view(1, TOKENS, -1) for x in (q, k))

    def stock_rotary(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        heads = (x.view(1, TOKENS, HEADS, HEAD_DIM).transpose(1, 2) for x in (q, k))
        turned = apply_rotary_pos_emb(*heads, cos[None].to(q.dtype), sin[None].to(q.dtype))
        return tuple(x.transpose(1, 2).reshape(1, TOKENS, -1) for x in turned)

    def tensors(*widths: int) -> list[Tensor]:
        return [torch.randn(1, TOKENS, width) for width in widths]

    return {
        "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), stock_norm, [*tensors(WIDTH), torch.randn(WIDTH)]),
        "rotary": (our_rotary, stock_rotary, tensors(WIDTH, WIDTH)),
        "gated_activation": (
            lambda g, u: gated_activation(g, u, "silu"),
            lambda g, u: F.silu(g) * u,
            tensors(GATED, GATED),
        ),
    }


def bench_rowwise(seconds: float) -> dict[str, Any]:
    """Ratios of forward plus backward to transformers' code, eager and compiled."""
    results, shown = {}, []
    for name, (ours, stock, inputs) in rowwise_cases().items():
        outputs = ours(*inputs)
        cotangents = [torch.randn_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]
        exact = both_ways(stock_in_double(name, stock), [x.double() for x in inputs], [g.double() for g in cotangents])
        error = gate(name, both_ways(ours, inputs, cotangents), exact, GATE)
        compiled = torch.compile(stock)
        calls = {
            key: lambda _, f=f, x=inputs, g=cotangents: both_ways(f, x, g)
            for key, f in (("ours", ours), ("eager", stock), ("compiled", compiled))
        }
        taken = in_turns(calls, 1, seconds)
        ratios = {peer: taken[peer] / taken["ours"] for peer in ("eager", "compiled")}
        results[name] = {"seconds": taken, "ratios": ratios, "gate": error}
        shown.append([name, taken["ours"] * 1e3, *(f"{ratio:.2f}x" for ratio in ratios.values()), f"{error:.0e}"])
    title = f"Row-wise ops, {TOKENS} tokens, fp32, forward and backward, over transformers' code"
    print_table(title, ["op", "ours ms", "over eager", "over torch.compile", "error"], shown)
    return results


def stock_in_double(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
    """The oracle: transformers' norm always computes in float32, so its formula is written out."""
    if name != "rms_norm":
        return stock
    return lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w
