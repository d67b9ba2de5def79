"""All weights of a model: which are quantised, in place, and back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.ops.quantised_linear import makers
from toolkit.quantised.adopt import adopt
from toolkit.quantised.weight import QuantisedWeight

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields of configurations that say how many outputs a router has."""


@dataclass(frozen=True)
class QuantisationReport:
    """What ``quantise`` did.

    Args:
        formats: by name of a parameter, its format.
        dense_bytes: of those parameters before.
        quantised_bytes: of those parameters now.
        kept: names of matrices of linear layers and experts that are dense.
        masters: of each weight that is trained, what it was before, in float32.
    """

    formats: dict[str, str]
    dense_bytes: int = 0
    quantised_bytes: int = 0
    kept: list[str] = field(default_factory=list)
    masters: dict[nn.Parameter, Tensor] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        formats = ", ".join(sorted(set(self.formats.values())))
        return (
            f"{len(self.formats)} weights in {formats}: {self.quantised_bytes / 2**20:.1f} MiB instead of "
            f"{self.dense_bytes / 2**20:.1f}; {len(self.kept)} matrices of layers are dense"
        )


def quantise(
    model: nn.Module,
    format: str | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] | None = None,
    trainable: bool = False,
    **options: Any,
) -> QuantisationReport:
    """The report of which weights are now in ``format``, in place: those of linear layers and of experts.

    A quantised weight is a frozen parameter (``QuantisedWeight``) under its own name, in its own module. Works before
    and after ``patch``, and on a ``PeftModel``, whose adapters stay dense. Without calibration. Weights that are
    quantised already are rounded again from what they dequantise to, unless they have that format.

    Without a format the layers that another library has quantised (bitsandbytes, compressed-tensors, GPTQ, AWQ,
    torchao, transformers' FP8) become linear layers with the same values: ``toolkit.quantised.adopt``.

    Args:
        format: None, or "int8", "int4", "nf4", "fp8", "q8_0" ...: ``toolkit.ops.quantised_linear.makers()``.
        include: patterns (``fnmatch``) of parameters' names, or of modules' names.
        exclude: patterns of what stays dense of them. None is the head (the output embedding, tied or not), routers and
            adapters; given patterns stand in the place of head and routers.
        trainable: weights that require a gradient keep doing so (quantisation-aware training): it is that of the dense
            weight, straight through the rounding. ``LowPrecisionAdamW`` updates the report's ``masters`` and rounds
            them to the codes, in place; an optimizer that writes weights itself is refused when it does.
        options: of the format's quantiser, such as ``group`` of int4.

    Raises:
        ToolkitError: an unknown format, or one that has no quantiser; nothing that matches; without a format no layer
            that another library has quantised, or one in a layout that no format holds.
    """
    if format is None:
        return _adopted(model)
    if format not in makers():
        raise ToolkitError(must_be_one_of("format", format, makers()))
    found: dict[str, str] = {}
    dense = small = 0
    made: dict[int, nn.Parameter] = {}
    masters: dict[nn.Parameter, Tensor] = {}
    entries = list(_matrices(model))
    kept = []
    for path, module, name in entries:
        full = f"{path}.{name}" if path else name
        wanted = _matches(full, include) and not (
            _is_left_out(model, module, name) if exclude is None else _matches(full, exclude)
        )
        if not wanted:
            kept.append(full)
            continue
        weight: Any = module._parameters[name]
        key = id(weight)
        dense += 0 if key in made else weight.numel() * weight.element_size()
        if key not in made:
            made[key] = _quantised(weight, format, full, options)
            small += made[key].quantised_bytes  # type: ignore[attr-defined]
            if trainable and weight.requires_grad:
                made[key].requires_grad_()
                masters[made[key]] = dense_values(weight)
        found[full] = format
    if not found:
        raise ToolkitError(
            f"include must match a weight of a linear layer or of experts that exclude does not, got {list(include)}."
        )
    _replace(model, made)
    return QuantisationReport(found, dense, small, kept, masters)


def _adopted(model: nn.Module) -> QuantisationReport:
    weights = adopt(model)
    if not weights:
        raise ToolkitError("format must be given for a model none of whose layers another library has quantised.")
    formats = {name: weight.format for name, weight in weights.items()}
    dense, small = (sum(getattr(one, size) for one in weights.values()) for size in ("nbytes", "quantised_bytes"))
    return QuantisationReport(formats, dense, small)


def dequantise(model: nn.Module) -> int:
    """How many parameters were quantised; they are dense now, of the values that they stood for, and frozen still."""
    made = {
        id(weight): nn.Parameter(weight.dequantise(), requires_grad=False) for _, weight in quantised_weights(model)
    }
    _replace(model, made)
    return len(made)


def dense_values(weight: Tensor) -> Tensor:
    """The values of a parameter in float32, without gradient; of a float32 one its own memory."""
    if isinstance(weight, QuantisedWeight):
        return weight.dequantise(torch.float32)
    return weight.detach().float()


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's ``state_dict``, with dense tensors in the place of quantised ones."""
    state = model.state_dict()
    return {name: one.dequantise() if isinstance(one, QuantisedWeight) else one for name, one in state.items()}


def quantised_weights(model: nn.Module) -> Iterator[tuple[str, QuantisedWeight]]:
    """Name and weight of each quantised parameter."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantisedWeight):
            yield name, parameter


def _quantised(weight: Tensor, format: str, name: str, options: dict[str, Any]) -> nn.Parameter:
    if isinstance(weight, QuantisedWeight) and weight.format == format and not options:
        return weight  # type: ignore[return-value]
    if not weight.is_floating_point() or weight.is_meta:
        state = "on the meta device" if weight.is_meta else str(weight.dtype).removeprefix("torch.")
        raise ToolkitError(f"parameter {name} must be loaded and floating-point to be quantised, got one {state}.")
    try:
        return nn.Parameter(QuantisedWeight.of(weight, format, **options), requires_grad=False)
    except ToolkitError as error:
        raise ToolkitError(f"parameter {name} cannot be quantised: {error}") from None


def _replace(model: nn.Module, made: dict[int, nn.Parameter]) -> None:
    """Put parameters in the place of those with the given ids, wherever they are."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in made:
                module._parameters[name] = made[id(parameter)]


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, module and name of each weight of a linear layer and of experts, adapters' left out."""
    adapters = _adapters(model)
    for path, module in model.named_modules():
        if module in adapters:
            continue
        if isinstance(module, nn.Linear):
            yield path, module, "weight"
        elif not type(module).__module__.startswith("torch."):
            stacked = [name for name, one in module._parameters.items() if one is not None and one.dim() == 3]
            if len({module._parameters[name].shape[0] for name in stacked}) == 1:
                yield from ((path, module, name) for name in stacked)


def _adapters(model: nn.Module) -> set[nn.Module]:
    """Modules of adapters: all inside a wrapper but what is inside the layer that it wraps."""
    found: set[nn.Module] = set()
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            found |= set(module.modules()) - {*base.modules(), module}
    return found


def _is_left_out(model: Any, module: nn.Module, name: str) -> bool:
    """Whether a weight is the head's, is tied to an embedding, or a router's."""
    weight = module._parameters[name]
    find_head = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    head = getattr(head, "base_layer", head)
    tied = any(isinstance(one, nn.Embedding) and one.weight is weight for one in model.modules())
    return module is head or tied or (isinstance(module, nn.Linear) and weight.shape[0] in _expert_counts(model))  # type: ignore[union-attr]


def _expert_counts(model: Any) -> set[int]:
    config = getattr(model, "config", None)
    configs = [config, *(one for one in vars(config).values() if hasattr(one, "to_dict"))] if config is not None else []
    counts = {getattr(one, name, None) for one in configs for name in EXPERT_COUNTS}
    return {count for count in counts if isinstance(count, int) and count > 1}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter's name, or that of its module or of a module around it, matches a pattern."""
    parts = name.split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(one, pattern) for one in names for pattern in patterns)
