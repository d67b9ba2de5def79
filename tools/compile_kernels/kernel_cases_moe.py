"""The kernels of an MoE layer with the shapes of released models, for ``python -m tools.compile_kernels``.

Few experts and tokens: neither decides what a kernel of the products compiles to.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from toolkit.ops.dispatch_plan import DispatchPlan

TOKENS, EXPERTS = 40, 8


@dataclass(frozen=True)
class Layer:
    """Sizes and layout of the experts of a layer; ``inner`` is the intermediate size."""

    hidden: int
    inner: int
    slots: int
    activation: str = "silu"
    gated: bool = True
    biased: bool = False
    score_position: str = "activation"
    transposed: bool = False
    interleaved: bool = False


LAYERS = {
    "2048x768": Layer(2048, 768, 8),
    "2880x2880 interleaved": Layer(2880, 2880, 4, "clamped_swiglu", True, True, "activation", True, True),
    "5120x8192 by input": Layer(5120, 8192, 1, score_position="input", transposed=True),
    "2688x1856 plain": Layer(2688, 1856, 6, "relu2", gated=False, score_position="combine"),
    "uneven": Layer(1001, 333, 3, biased=True),
    "uneven interleaved": Layer(1001, 333, 3, "clamped_swiglu", True, True, "activation", True, True),
}
# experts, chosen, score, groups, kept groups, best of a group
ROUTERS = {
    "128 softmax": (128, 8, "softmax", 1, 1, 1),
    "256 sigmoid in groups": (256, 8, "sigmoid", 8, 4, 2),
    "160 softmax in groups": (160, 6, "softmax", 8, 3, 1),
    "512 softmax": (512, 10, "softmax", 1, 1, 1),
}


def plan_of(slots: int) -> DispatchPlan:
    from toolkit.ops.dispatch_plan.reference import dispatch_plan

    return DispatchPlan(*dispatch_plan(torch.arange(TOKENS * slots).view(TOKENS, slots) % EXPERTS, EXPERTS, 64))


def experts_case(dtype: torch.dtype, layer: Layer) -> Callable:
    """A call of ``experts``, forward and backward: each of its kernels."""

    def call() -> None:
        from toolkit.ops.experts.triton import experts
        from toolkit.ops.experts.triton_backward import experts_backward

        up_size = layer.inner * (2 if layer.gated else 1)
        shapes = ((up_size, layer.hidden), (layer.hidden, layer.inner))
        up, down = (torch.empty(EXPERTS, *(s[::-1] if layer.transposed else s), dtype=dtype) for s in shapes)
        biases = [torch.empty(EXPERTS, size, dtype=dtype) if layer.biased else None for size in (up_size, layer.hidden)]
        x, scores = torch.empty(TOKENS, layer.hidden, dtype=dtype), torch.empty(TOKENS, layer.slots)
        plan, flags = (
            plan_of(layer.slots),
            (layer.activation, layer.score_position, layer.transposed, layer.interleaved),
        )
        _, z = experts(x, scores, up, biases[0], down, biases[1], *plan, *flags)
        needs = (True, True, True, layer.biased, True, layer.biased)
        experts_backward(x, x, scores, z, up, down, biases[1], *plan, *flags, *needs)

    return call


def grouped_case(dtype: torch.dtype, outputs: int, depth: int, transposed: bool, slots: int = 8) -> Callable:
    """A call of ``grouped_linear`` with bias, gathered, and of its backward."""

    def call() -> None:
        from toolkit.ops.grouped_linear.triton import grouped_linear
        from toolkit.ops.grouped_linear.triton_backward import grouped_linear_backward

        x, bias = torch.empty(TOKENS, depth, dtype=dtype), torch.empty(EXPERTS, outputs, dtype=dtype)
        weight = torch.empty(EXPERTS, *((depth, outputs) if transposed else (outputs, depth)), dtype=dtype)
        y = grouped_linear(x, weight, bias, *plan_of(slots), True, transposed)
        grouped_linear_backward(y, x, weight, *plan_of(slots), True, transposed, True, True, True)

    return call


def combine_case(dtype: torch.dtype, width: int, slots: int = 8) -> Callable:
    """A call of ``combine`` with weights, and of its backward."""

    def call() -> None:
        from toolkit.ops.grouped_linear.triton_combine import combine, combine_backward

        y, weights = torch.empty(TOKENS * slots, width, dtype=dtype), torch.empty(TOKENS, slots)
        out = combine(y, plan_of(slots)[1], weights)
        combine_backward(out, y, plan_of(slots)[1], weights, True, True)

    return call


def plan_case(experts: int, slots: int) -> Callable:
    """A call of ``dispatch_plan``."""

    def call() -> None:
        from toolkit.ops.dispatch_plan.triton import dispatch_plan

        dispatch_plan(torch.empty(TOKENS, slots, dtype=torch.int64), experts, 64)

    return call


def route_case(
    dtype: torch.dtype, experts: int, k: int, score: str, groups: int, kept: int, best: int, *, replayed: bool = False
) -> Callable:
    """A call of ``route`` with bias, or of a recorded choice, and of its backward."""

    def call() -> None:
        from toolkit.ops.route.triton import route, route_backward

        logits, bias = torch.empty(TOKENS, experts, dtype=dtype), None if replayed else torch.empty(experts)
        chosen = torch.empty(TOKENS, k, dtype=torch.int64) if replayed else None
        weights, ids = route(logits, bias, chosen, k, score, groups, kept, best, True, 1e-20, 2.5)
        route_backward(weights, logits, ids, score, True, 1e-20, 2.5)

    return call


def cases() -> dict[str, Callable]:
    """name -> the call that launches the kernels."""
    found: dict[str, Callable] = {}
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for name, layer in LAYERS.items():
            found[f"experts {short} {name}"] = experts_case(dtype, layer)
        for turned, layout in ((False, ""), (True, " transposed")):
            found[f"grouped_linear {short} 1536x2048{layout}"] = grouped_case(dtype, 1536, 2048, turned)
            found[f"grouped_linear {short} uneven{layout}"] = grouped_case(dtype, 333, 1001, turned)
        found[f"combine {short} 2048"] = combine_case(dtype, 2048)
        found[f"combine {short} uneven"] = combine_case(dtype, 1001)
        for name, router in ROUTERS.items():
            found[f"route {short} {name}"] = route_case(dtype, *router)
        found[f"route {short} replayed"] = route_case(dtype, *ROUTERS["128 softmax"], replayed=True)
    for experts, slots in ((128, 8), (512, 10)):
        found[f"dispatch_plan {experts}"] = plan_case(experts, slots)
    return found
