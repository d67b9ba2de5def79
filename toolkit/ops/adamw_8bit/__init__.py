"""AdamW whose moments are kept in 8 bits."""

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.adamw_8bit import reference
from toolkit.ops.adamw_8bit.reference import BLOCK
from toolkit.ops.dynamic_map import dynamic_map, nearest_code, thresholds
from toolkit.ops.registry import register

__all__ = ["BLOCK", "adamw_8bit", "new_moments"]


def _fake(*_: Any) -> None:
    return None


_OP = register(
    "adamw_8bit(Tensor(a!) weight, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_scale, Tensor(d!) exp_avg_sq,"
    " Tensor(e!) exp_avg_sq_scale, float lr, float beta1, float beta2, float eps, float weight_decay, int step,"
    " Tensor signed_map, Tensor signed_thresholds, Tensor map, Tensor thresholds) -> ()",
    reference=lambda *arguments: reference.adamw_8bit(*arguments[:12]),
    fake=_fake,
    triton="toolkit.ops.adamw_8bit.triton.adamw_8bit",
)


def new_moments(like: Tensor) -> dict[str, Any]:
    """Moments of zero for a weight of this shape, under the names of ``adamw_8bit``'s arguments."""
    found = {}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        zero = int(nearest_code(torch.zeros(1), signed))
        found[name] = torch.full(like.shape, zero, dtype=torch.uint8, device=like.device)
        found[f"{name}_scale"] = torch.zeros(-(-like.numel() // BLOCK), device=like.device)
    return found


def adamw_8bit(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    impl: str | None = None,
) -> None:
    """One update of AdamW (Loshchilov and Hutter, 2019) in place, with moments in 8 bits (Dettmers et al., 2022).

    ``m = beta1 m + (1 - beta1) g``, ``v = beta2 v + (1 - beta2) g^2``,
    ``w = w (1 - lr weight_decay) - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)``, in float32; only
    then m and v are rounded: block by block of 256 consecutive elements to ``scale * map[code]``, scale the block's
    largest magnitude, code the nearest of the 256 values of the signed (m) or unsigned (v) dynamic map. A v above 0
    takes a value above 0, unlike bitsandbytes', where m is then divided by eps alone.

    Args:
        weight: [...] float32, contiguous; written.
        grad: as weight.
        exp_avg, exp_avg_sq: uint8 codes in weight's shape, contiguous (``new_moments`` makes them); written.
        exp_avg_scale, exp_avg_sq_scale: float32 [ceil(numel / 256)]; written.
        step: number of this update, from 1.
        impl: None (by device), "reference", "cpu" or "triton".

    Raises:
        ToolkitError: for other shapes, dtypes or layouts, and for step < 1.

    Numerics: a block depends on itself alone, so results are bitwise identical for any number of threads. Moments are
    bitwise identical in every implementation; weights agree to the rounding of a square root (torch's has an error of
    up to one unit in the last place). A NaN or infinity of grad makes its block's moments NaN. No gradient.
    """
    _check(weight, grad, (exp_avg, exp_avg_sq), (exp_avg_scale, exp_avg_sq_scale), step)
    tables = [table(signed).to(weight.device) for signed in (True, False) for table in (dynamic_map, thresholds)]
    _OP.select(impl)(
        weight.detach(), grad.detach(), exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale,
        lr, beta1, beta2, eps, weight_decay, step, *tables,
    )  # fmt: skip


def _check(
    weight: Tensor, grad: Tensor, codes: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor], step: int
) -> None:
    blocks = torch.Size([-(-weight.numel() // BLOCK)])
    wanted = [(weight, torch.float32, weight.shape), (grad, torch.float32, weight.shape)]
    wanted += [(one, torch.uint8, weight.shape) for one in codes] + [(one, torch.float32, blocks) for one in scales]
    for tensor, dtype, shape in wanted:
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise ToolkitError(
                f"adamw_8bit: weight and grad must be contiguous float32 of one shape, moments uint8 of it with float32"
                f" scales {list(blocks)}; got {tensor.dtype} {list(tensor.shape)}, strides {list(tensor.stride())}."
            )
    if step < 1:
        raise ToolkitError(f"adamw_8bit: step must be at least 1, got {step}.")
