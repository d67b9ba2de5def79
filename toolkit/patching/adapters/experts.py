"""Grouped forwards of experts with adapted parameters.

PEFT computes ``W + scaling B A`` of all experts at each forward. Here the outermost wrapper's forward hands the factors
to the experts' grouped GEMMs, which apply them row by row.

Shapes: T tokens, H hidden size, E experts, K experts per token, r rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toolkit.modules.moe_experts import MoeExperts, moe_experts_of
from toolkit.moe import ExpertAdapters
from toolkit.moe.weights import Factors
from toolkit.patching.adapters.find import parameter_wrappers


def grouped_experts(own: Callable[..., Any]) -> Callable[..., Any]:
    """Forward of the outermost wrapper: hidden states [T, H], ids and weights [T, K] to [T, H].

    Args:
        own: the wrapper's own forward, for experts that are not patched and adapters that are not plain LoRA.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        wrappers, experts = parameter_wrappers(self)
        parts = moe_experts_of(experts)
        adapters = None if parts is None or kwargs or len(args) != 2 else _adapters(wrappers, parts)
        if parts is None or adapters is None:
            return own(self, x, *args, **kwargs)
        topk_ids, topk_weights = args
        plain = adapters.up is None and adapters.down is None
        return parts.run(experts, x, topk_ids, topk_weights, None if plain else adapters)

    return forward


def _adapters(wrappers: list[Any], parts: MoeExperts) -> ExpertAdapters | None:
    """What the wrappers add to the experts' weights; None where one of them does something else."""
    found: dict[str, Factors | None] = {}
    for wrapper in wrappers:
        if wrapper.merged and wrapper.disable_adapters:
            return None  # PEFT's forward unmerges the weights first
        if wrapper.parameter_name not in (parts.up, parts.down) or wrapper.parameter_name in found:
            return None
        found[wrapper.parameter_name] = None if wrapper.merged else _factors(wrapper, parts.layout.transposed)
    return ExpertAdapters(found.get(parts.up), found.get(parts.down))


def _factors(wrapper: Any, transposed: bool) -> Factors | None:
    """a [E, r, in], b [E, out, r] and scaling of a wrapper's active adapters; None where there are none."""
    found = []
    for name in wrapper.active_adapters if not wrapper.disable_adapters else ():
        if name in wrapper.lora_A:
            # PEFT's delta is scaling * left @ right, in the layout of the weight.
            left, right, scaling = wrapper.get_delta_factors(name)
            a, b = (left.transpose(1, 2), right.transpose(1, 2)) if transposed else (right, left)
            found.append((a.contiguous(), b.contiguous(), float(scaling)))
    if len(found) < 2:
        return found[0] if found else None
    return torch.cat([a for a, _, _ in found], 1), torch.cat([b * scaling for _, b, scaling in found], 2), 1.0
