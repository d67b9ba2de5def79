"""What transformers' tensor-parallel plan of a model says of each of its modules."""

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from toolkit.errors import ToolkitError
from toolkit.modules.moe_experts import expert_layers, moe_experts_of
from toolkit.patching.adapters import wraps_parameter, wraps_tokens
from toolkit.quantised import QuantisedWeight

COLUMN, ROW = ("colwise", "colwise_gather_output"), ("rowwise", "rowwise_split_input")
"""Styles of linear layers whose output rows, or input columns, are split; the second of each: whole outputs, inputs."""
_SUMMED = "replicated_with_grad_allreduce"
_EXPERTS = ("moe_tp_experts", "packed_colwise", *ROW, *COLUMN)
_WHOLE = re.compile(r"embedding")
"""Styles of what stays whole on every rank: an embedding is a table to look up in, and may be the head's weight."""


@dataclass
class Plan:
    """Which modules are split, and how.

    Args:
        linear: style of each linear layer, by path.
        head: the path of the output projection, whose logits are gathered; "" where it stays whole.
        shared_head: whether its weight is the embedding's, which every rank holds whole.
        summed: paths of modules whose parameters are whole and act on a part of the heads: their gradients are summed.
        experts: modules of experts, of which each rank holds some, and the names of their parameters.
    """

    linear: dict[str, str] = field(default_factory=dict)
    head: str = ""
    shared_head: bool = False
    summed: list[str] = field(default_factory=list)
    experts: dict[nn.Module, list[str]] = field(default_factory=dict)


def style_of(path: str, plan: dict[str, str]) -> str | None:
    """The style of a module or parameter in a plan, whose keys have * for the numbers of layers."""
    return plan.get(path) or plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))


def check_adapters(model: nn.Module) -> None:
    """Raise ToolkitError for adapters of parameters, and for trained rows of embeddings and heads."""
    for path, module in model.named_modules():
        if wraps_parameter(module) or wraps_tokens(module):
            raise ToolkitError(
                f"tensor parallel needs adapters of whole layers without chosen rows, got a {type(module).__name__} "
                f"at {path}."
            )


def plan_of(model: Any, size: int) -> Plan:
    """The plan of a patched model for ``size`` ranks; of one with adapters inside ``without_adapters``.

    Raises:
        ToolkitError: for a model without a plan, and for what cannot be split so.
    """
    name = type(model).__name__
    given = dict(getattr(model, "tp_plan", None) or {})
    if not given:
        raise ToolkitError(f"tensor parallel needs a model with a plan (tp_plan), got {name}, whose plan is empty.")
    found = Plan(experts=expert_layers(model))
    inside_experts = {id(part) for module in found.experts for part in module.modules()}
    output = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    for path, module in model.named_modules():
        style = style_of(path, given)
        if style is None or _WHOLE.match(style):
            continue
        if module is output:
            found.head, found.shared_head = path, module.weight is embedding.weight
            _check_linear(path, module, style)
        elif id(module) in inside_experts:
            continue
        elif style in (*COLUMN, *ROW):
            _check_linear(path, module, style)
            found.linear[path] = style
        elif style == _SUMMED:
            found.summed.append(path)
        else:
            why = "experts that are not patched" if style in _EXPERTS else f"style {style!r}"
            raise ToolkitError(f"tensor parallel of {path} must have a style that is known here, got {why}.")
    _check_parameters(model, given, inside_experts)
    for module in found.experts:
        parts = moe_experts_of(module)
        if parts is not None and parts.post_norm is not None:
            raise ToolkitError(f"tensor parallel needs experts without a norm of their outputs, got {name}'s.")
    if any(style == "colwise" for style in found.linear.values()):
        _check_heads(model, found, size)
    return found


def _check_linear(path: str, module: nn.Module, style: str) -> None:
    if type(module) is not nn.Linear or isinstance(module.weight, QuantisedWeight):
        got = "a quantised one" if type(module) is nn.Linear else type(module).__name__
        raise ToolkitError(f"tensor parallel of {path} ({style}) must be of a plain linear layer, got {got}.")


def _check_parameters(model: nn.Module, given: dict[str, str], inside_experts: set[int]) -> None:
    """Parameters that a plan names themselves, and not their modules: those of experts, and no others."""
    owned = {
        f"{path}.{name}" if path else name: id(module) in inside_experts
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    for path, of_experts in owned.items():
        style = style_of(path, given)
        if style is not None and not of_experts:
            why = "experts that are not patched" if style in _EXPERTS else f"style {style!r} of a parameter"
            raise ToolkitError(f"tensor parallel of {path} must have a style that is known here, got {why}.")


def _check_heads(model: Any, plan: Plan, size: int) -> None:
    """Layers of attention whose projections are split have whole heads on every rank."""
    config: Any = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise ToolkitError(
                f"tensor_parallel_size must divide {name} of {type(model).__name__}, {heads}, got {size}."
            )
