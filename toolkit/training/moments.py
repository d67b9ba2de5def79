"""How AdamW keeps its moments: in float32, or in 8 bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from toolkit.ops.adamw_8bit import BLOCK, adamw_8bit, new_moments

SMALLEST = 4096
"""Elements from which moments are kept in 8 bits; those of smaller parameters (norms, biases) stay in float32."""


def in_float32(parameter: nn.Parameter) -> dict[str, Any]:
    """Moments of zero, each as large as the parameter."""
    zeros = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
    return {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def in_8_bits(parameter: nn.Parameter) -> dict[str, Any]:
    """Moments of zero in 8 bits, where the parameter is large enough.

    Blocks do not cross experts [E, ...], so that ranks may hold some of them each.
    """
    block_of_one = parameter.numel() // len(parameter) % BLOCK == 0 if parameter.dim() > 2 else True
    large = parameter.numel() >= SMALLEST and block_of_one
    return new_moments(parameter.detach()) if large else in_float32(parameter)


MOMENTS: dict[str, Callable[[nn.Parameter], dict[str, Any]]] = {
    "adamw_torch_fused": in_float32,
    "adamw_8bit": in_8_bits,
}
"""By ``optimizer.optim``."""


def update(weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of AdamW on a float32 weight in place; moments of ``state`` are kept as they are found."""
    beta1, beta2 = group["betas"]
    if state["exp_avg"].dtype == torch.uint8:
        state["step"] += 1
        moments = {name: value for name, value in state.items() if name.startswith("exp_avg")}
        # A parameter may lie in any order; blocks are of consecutive elements.
        flat = weight.contiguous()
        adamw_8bit(
            flat, grad.float().contiguous(), **moments, lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
            weight_decay=group["weight_decay"], step=int(state["step"]),
        )  # fmt: skip
        if flat is not weight:
            weight.copy_(flat)
        return
    adamw(
        [weight], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
        fused=weight.device.type in ("cpu", "cuda"), amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
        weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )  # fmt: skip
