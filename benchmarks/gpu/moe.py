"""MoE layers on a GPU, part of ``python -m benchmarks.gpu``: a layer's experts with their plan.

Many tokens, forward and backward, against torch's grouped GEMM and the kernels of Liger and SonicMoE where they
are installed; a missing peer is named. Few tokens, forward, against the time in which the weights of the experts that
were hit come from memory. Every measurement comes with a check against float64.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import both_ways, gate, print_table
from benchmarks.gpu import device
from benchmarks.gpu.device import DRY, GATE, HALF, doubles, median, normal
from benchmarks.gpu.section import Section
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.experts import experts
from toolkit.ops.route import route

# A layer of a Qwen3-30B-A3B: experts, H, I, K.
SIZES = (4, 32, 16, 2) if DRY else (128, 2048, 768, 8)
MANY = [6] if DRY else [2048, 32768]
FEW = [1, 3] if DRY else [1, 8, 32, 128]
COPIES = 1 if DRY else 2  # layers in turn, so that no weight is still in L2


def weights_of() -> list[Tensor]:
    """up [E, 2 I, H], down [E, H, I]."""
    count, width, inner, _ = SIZES
    return [normal(count, 2 * inner, width, scale=width**-0.5), normal(count, width, inner, scale=inner**-0.5)]


def ours(x: Tensor, topk_weights: Tensor, up: Tensor, down: Tensor, topk_ids: Tensor) -> Tensor:
    return experts(x, topk_weights, up, down, dispatch_plan(topk_ids, SIZES[0]), "silu")


def dense(x: Tensor, topk_weights: Tensor, up: Tensor, down: Tensor, topk_ids: Tensor) -> Tensor:
    """An expert after another in the dtype of its inputs: the oracle."""
    out = torch.zeros_like(x)
    for expert in topk_ids.unique().tolist():
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        gate_, rest = F.linear(x[token], up[expert]).chunk(2, -1)
        y = F.linear(F.silu(gate_) * rest, down[expert]) * topk_weights[token, slot, None]
        out = out.index_add(0, token, y)
    return out


def grouped_mm(x: Tensor, topk_weights: Tensor, up: Tensor, down: Tensor, topk_ids: Tensor) -> Tensor:
    """torch's grouped GEMM around sorted rows, as models are written with them."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm
    slots = topk_ids.shape[1]
    order = topk_ids.flatten().argsort(stable=True)
    ends = torch.bincount(topk_ids.flatten(), minlength=SIZES[0]).cumsum(0).to(torch.int32)
    gate_, rest = product(x[order // slots], up.mT, offs=ends).chunk(2, -1)
    y = product(F.silu(gate_) * rest, down.mT, offs=ends) * topk_weights.flatten()[order, None].to(x.dtype)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y[back].view(*topk_ids.shape, -1).sum(1)


def liger() -> Callable[..., Tensor]:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return lambda x, topk_weights, up, down, topk_ids: LigerFusedMoEFunction.apply(
        x, up, down, topk_ids.int(), topk_weights
    )


def sonic() -> Callable[..., Tensor]:
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    def call(x: Tensor, topk_weights: Tensor, up: Tensor, down: Tensor, topk_ids: Tensor) -> Tensor:
        token = torch.arange(len(topk_ids), device=topk_ids.device, dtype=torch.int32).repeat_interleave(
            topk_ids.shape[1]
        )
        stream = torch.cuda.current_stream().cuda_stream
        out, _ = moe_general_routing_inputs(
            x, topk_weights.flatten(), token, topk_ids.flatten().int(), up.permute(1, 2, 0), None,
            down.permute(1, 2, 0), None, SIZES[0], stream, ActivationType.SWIGLU, concat_layout=True,
        )  # fmt: skip
        return out

    return call


PEERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "grouped_mm": lambda: grouped_mm,
    "liger": liger,
    "sonicmoe": sonic,
}


def routed(tokens: int) -> tuple[Tensor, Tensor]:
    """(topk_weights, topk_ids) of random logits."""
    return route(normal(tokens, SIZES[0]), SIZES[3], norm_topk_prob=True)


def checked(section: Section, tokens: int, weights: list[Tensor]) -> float:
    """The largest error of results and gradients on a few tokens, against float64."""
    count = min(tokens, 64)
    x, grad, (topk_weights, topk_ids) = normal(count, SIZES[1]), normal(count, SIZES[1]), routed(count)
    inputs = [x, topk_weights, *weights]
    exact = both_ways(partial(dense, topk_ids=topk_ids), doubles(inputs), [grad.double()])
    got = both_ways(partial(ours, topk_ids=topk_ids), inputs, [grad])
    return section.check(f"experts, {tokens} tokens", got, exact, GATE[HALF])


def agreeing(
    call: Callable[..., Tensor], x: Tensor, topk_weights: Tensor, weights: list[Tensor], topk_ids: Tensor
) -> None:
    """A peer that computes something else is no peer."""
    with torch.no_grad():
        up, down = weights
        made, wanted = call(x, topk_weights, up, down, topk_ids), ours(x, topk_weights, up, down, topk_ids)
    gate("a peer's layer", [made], [wanted], 2 * GATE[HALF])


def bench_many(section: Section, tokens: int, weights: list[Tensor]) -> dict[str, Any]:
    """Seconds and peak bytes of a training forward and backward, of every side."""
    x, grad, (topk_weights, topk_ids) = normal(tokens, SIZES[1]), normal(tokens, SIZES[1]), routed(tokens)
    leaves = [t.detach().requires_grad_() for t in (x, topk_weights, *weights)]
    flops = 6 * topk_ids.numel() * SIZES[1] * SIZES[2]  # of the forward
    result: dict[str, Any] = {"gate": checked(section, tokens, weights), "flops": flops, "sides": {}, "missing": []}
    for side, maker in ({"ours": lambda: ours} | PEERS).items():
        try:
            call = maker()
            if side != "ours":
                agreeing(call, x, topk_weights, weights, topk_ids)
            result["sides"][side] = device.measure(partial(call, topk_ids=topk_ids), leaves, [grad])
        except ImportError:
            result["missing"].append(side)
        except Exception as problem:
            if side == "ours":
                raise
            result["sides"][side] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
    return result


def bench_few(tokens: int, layers: list[list[Tensor]], copy: float) -> dict[str, Any]:
    """A forward's seconds as a share of the time in which the weights of the experts that were hit are read."""
    x, (topk_weights, topk_ids) = normal(tokens, SIZES[1]), routed(tokens)
    hit = int(topk_ids.unique().numel())
    read = hit * sum(w[0].nbytes for w in layers[0])
    with torch.no_grad():
        taken = device.replayed([partial(ours, x, topk_weights, up, down, topk_ids) for up, down in layers])
        planned = median(partial(dispatch_plan, topk_ids, SIZES[0]), 20)
    # A copy reads and writes each byte: its figure counts both, as reading alone does here.
    return {"forward_s": taken, "plan_s": planned, "experts_hit": hit, "of_streaming": read / copy / taken}


def bench_moe(section: Section) -> None:
    """Experts of a layer with many and with few tokens."""
    result = section.result
    result |= {"many": {}, "few": {}}
    layers = [weights_of() for _ in range(COPIES)]
    result["gate"] = checked(section, max(FEW), layers[0])
    for tokens in FEW:
        if section.allows(f"{tokens} tokens", 2.0):
            with section.trying(f"{tokens} tokens"):
                result["few"][str(tokens)] = bench_few(tokens, layers, section.ceilings["copy_bytes_per_s"])
    for tokens in MANY:
        if section.allows(f"{tokens} tokens", 10.0):
            with section.trying(f"{tokens} tokens"):
                result["many"][str(tokens)] = bench_many(section, tokens, layers[0])


def show(entry: dict[str, Any], ceilings: dict[str, float]) -> None:
    """The measurements that were made, as tables."""
    rows: list[list[Any]] = []
    for tokens, case in entry["many"].items():
        for side, taken in case["sides"].items():
            if "failed" in taken:
                rows.append([tokens, side, "failed", "", "", ""])
                continue
            rate = case["flops"] / taken["forward_s"] / 1e12
            rows.append([tokens, side, taken["forward_s"] * 1e3, taken["backward_s"] * 1e3, rate,
                         taken["peak_bytes"] / 2**30])  # fmt: skip
        rows += [[tokens, side, "missing", "", "", ""] for side in case["missing"]]
    title = "Experts, E{} H{} I{} K{}".format(*SIZES)
    print_table(title, ["tokens", "side", "forward ms", "backward ms", "forward TFLOP/s", "peak GiB"], rows)
    rows = [[tokens, case["experts_hit"], case["forward_s"] * 1e3, case["plan_s"] * 1e3, f"{case['of_streaming']:.0%}"]
            for tokens, case in entry["few"].items()]  # fmt: skip
    print_table(f"{title}, few tokens", ["tokens", "experts hit", "forward ms", "plan ms", "of streaming"], rows)
