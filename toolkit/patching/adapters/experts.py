"""Grouped forwards of experts with adapted parameters.

PEFT computes ``W + scaling B A`` of all experts at each forward. Here the outermost wrapper's forward hands the factors
to the experts' grouped GEMMs, which apply them row by row.

Shapes: T tokens, H hidden size, E experts, K experts per token, r rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.modules.moe_experts import MoeExperts, moe_experts_of
from toolkit.moe import ExpertAdapters
from toolkit.moe.weights import Factors
from toolkit.patching.adapters.find import parameter_wrappers
from toolkit.patching.adapters.rows import RowAdapters, row_adapters


def grouped_experts(own: Callable[..., Any]) -> Callable[..., Any]:
    """Forward of the outermost wrapper: hidden states [T, H], ids and weights [T, K] to [T, H].

    Args:
        own: the wrapper's own forward, for experts that are not patched and adapters that are not plain LoRA.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        wrappers, experts = parameter_wrappers(self)
        parts = moe_experts_of(experts)
        chosen = row_adapters(x.shape[:-1])
        adapters = None if parts is None or kwargs or len(args) != 2 else _adapters(wrappers, parts, chosen)
        if parts is None or adapters is None:
            if chosen is not None:
                raise ToolkitError("adapters of these experts must be plain LoRA where rows choose one.")
            return own(self, x, *args, **kwargs)
        topk_ids, topk_weights = args
        plain = adapters.up is None and adapters.down is None
        return parts.run(experts, x, topk_ids, topk_weights, None if plain else adapters)

    return forward


def _adapters(wrappers: list[Any], parts: MoeExperts, chosen: RowAdapters | None) -> ExpertAdapters | None:
    """What the wrappers add to the experts' weights; None where one of them does something else."""
    found: dict[str, Factors | None] = {}
    for wrapper in wrappers:
        if wrapper.merged and wrapper.disable_adapters and chosen is None:
            return None  # PEFT's forward unmerges the weights first
        if wrapper.parameter_name not in (parts.up, parts.down) or wrapper.parameter_name in found:
            return None
        transposed = parts.layout.transposed
        found[wrapper.parameter_name] = (
            _of_rows(wrapper, transposed, chosen.names)
            if chosen is not None
            else None
            if wrapper.merged
            else _active(wrapper, transposed)
        )
    return ExpertAdapters(found.get(parts.up), found.get(parts.down), None if chosen is None else chosen.ids)


def _active(wrapper: Any, transposed: bool) -> Factors | None:
    """The factors of a wrapper's active adapters as those of one; None where there are none."""
    names = [] if wrapper.disable_adapters else [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    found = [_factors(wrapper, name, transposed) for name in names]
    if len(found) < 2:
        return Factors(*zip(*found)) if found else None
    a, b = torch.cat([a for a, _, _ in found], 1), torch.cat([b * scaling for _, b, scaling in found], 2)
    return Factors((a,), (b,), (1.0,))


def _of_rows(wrapper: Any, transposed: bool, names: Sequence[str]) -> Factors | None:
    """The factors of each of ``names``, of rank 0 where the wrapper does not have it; None for none, without gradients.

    With gradients the experts run in parts all the same: theirs are other bits than those of the fused op.
    """
    found = {name: _factors(wrapper, name, transposed) for name in names if name in wrapper.lora_A}
    if not len(wrapper.lora_A) or not (found or torch.is_grad_enabled()):
        return None
    a, b, _ = _factors(wrapper, next(iter(wrapper.lora_A)), transposed)
    empty = a[:, :0], b[..., :0], 0.0
    return Factors(*zip(*(found.get(name, empty) for name in names)))


def _factors(wrapper: Any, name: str, transposed: bool) -> tuple[Tensor, Tensor, float]:
    """a [E, r, in], b [E, out, r] and scaling of an adapter."""
    # PEFT's delta is scaling * left @ right, in the layout of the weight.
    left, right, scaling = wrapper.get_delta_factors(name)
    a, b = (left.transpose(1, 2), right.transpose(1, 2)) if transposed else (right, left)
    return a, b, float(scaling)
