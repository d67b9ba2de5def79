"""A weight in a low-precision format: a tensor that is the dense one that it dequantises to.

N outputs, K inputs; E experts.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload

import toolkit.ops.linear  # noqa: F401  (registers toolkit::linear)
from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.ops.dispatch_plan import DispatchPlan
from toolkit.ops.experts import is_gated
from toolkit.ops.quantised_experts import CodedWeight, quantised_experts
from toolkit.ops.quantised_linear import PANEL, dequantise, dequantise_rows, find, quantised_linear
from toolkit.ops.registry import has_native

_ATEN, _OURS = torch.ops.aten, torch.ops.toolkit
_LINEAR = {F.linear, _OURS.linear.default, _OURS.linear}
_EXPERTS = {_OURS.experts.default, _OURS.experts}


class QuantisedWeight(Tensor):
    """A weight [N, K], or [E, N, K] of experts, in a format of ``toolkit.ops.quantised_linear``.

    It stands in a plain ``nn.Linear`` as ``weight``. Linear layers read its codes; every other op sees the dense
    tensor, dequantised for that call, so results are bitwise identical to those of the dense weight. What keeps the
    format: ``detach``, ``clone``, ``deepcopy``, ``to`` (of a floating-point dtype and any device), pickling,
    ``state_dict`` and ``load_state_dict``. Views and slices are dense copies.

    Its gradient, where it requires one, is that of the dense weight: rounding passes it straight through. What it is
    the rounding of is kept by an optimizer, which writes it by ``quantise_``.

    Args:
        format: the name of the format.
        codes: of E N outputs, as ``toolkit.ops.quantised_linear`` packs them.
        scales: the format's scales, in its order.
        shape: [N, K] or [E, N, K].
        dtype: of the dense weight.

    Raises:
        ToolkitError: for what else writes it in place.
    """

    format: str
    codes: Tensor

    @staticmethod
    def __new__(
        cls, format: str, codes: Tensor, scales: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> "QuantisedWeight":
        made: QuantisedWeight = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=codes.device, requires_grad=False
        )
        made.format, made.codes = format, codes
        for at, scale in enumerate(scales):
            setattr(made, f"scale_{at}", scale)
        return made

    @classmethod
    def of(cls, weight: Tensor, format: str, **options: Any) -> "QuantisedWeight":
        """A dense weight [N, K] or [E, N, K], rounded to a format.

        Args:
            format: a name of ``toolkit.ops.quantised_linear.makers()``.
            options: of the format's quantiser, ``group`` of int4, say.

        Raises:
            ToolkitError: another format; NaN or infinity in the weight.
        """
        dense = weight.dequantise() if isinstance(weight, QuantisedWeight) else weight.detach()
        made = find(format)
        known = [] if made.make is None else list(inspect.signature(made.make).parameters)[1:]
        for name in options:
            if name not in known:
                raise ToolkitError(must_be_one_of(f"an option of {format}", name, known or ["nothing"]))
        codes, scales = made.quantise(dense.reshape(-1, dense.shape[-1]), **options)
        return cls(format, codes, scales, dense.shape, dense.dtype)

    @torch.no_grad()
    def quantise_(self, dense: Tensor) -> "QuantisedWeight":
        """This weight, whose codes and scales are now those of ``dense``, in place: by its own format, group size and
        dtype of scales.

        Raises:
            ToolkitError: another shape; a format that is read only; NaN or infinity in ``dense``.
        """
        if dense.shape != self.shape:
            raise ToolkitError(f"dense must have shape {list(self.shape)}, got {list(dense.shape)}.")
        known = find(self.format)
        outputs, inputs = math.prod(self.shape[:-1]), self.shape[-1]
        codes, scales = known.quantise(
            dense.detach().reshape(outputs, inputs), **known.options(self.scales, outputs, inputs)
        )
        for mine, new in zip((self.codes, *self.scales), (codes, *scales), strict=True):
            mine.copy_(new)
        return self

    @property
    def scales(self) -> list[Tensor]:
        """The format's scales, in its order."""
        return [getattr(self, name) for name in self._parts()[1:]]

    @property
    def quantised_bytes(self) -> int:
        """Bytes of codes and scales; ``nbytes`` is of the dense weight."""
        return sum(getattr(self, name).nbytes for name in self._parts())

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight: float32 values by the format's formula, rounded once to ``dtype``; None is its own."""
        dtype = self.dtype if dtype is None else dtype
        inputs = self.shape[-1]
        outputs = math.prod(self.shape[:-1])
        return dequantise(self.codes, self.scales, self.format, outputs, inputs, dtype).view(self.shape)

    def _parts(self) -> list[str]:
        return [name for name in self.__dict__ if name == "codes" or name.startswith("scale_")]

    def _with(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "QuantisedWeight":
        """The weight with each of its tensors changed."""
        codes, *scales = (change(getattr(self, name)) for name in self._parts())
        return QuantisedWeight(self.format, codes, scales, self.shape, self.dtype if dtype is None else dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return self._parts(), (self.format, self.shape, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "QuantisedWeight":
        format, shape, dtype = meta
        codes, *scales = inner.values()
        return QuantisedWeight(format, codes, scales, shape, dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts = [self.codes.view(torch.uint8), *self.scales]  # pickle has no 8-bit floats
        gradient = self.requires_grad if isinstance(self, nn.Parameter) else None
        return _rebuilt, (self.format, parts, tuple(self.shape), self.dtype, gradient)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach()._with(Tensor.clone)  # type: ignore[attr-defined]
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        found: Tensor = memo[id(self)]
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantisedWeight({self.format!r}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _LINEAR and (found := _linear(*args, **kwargs)) is not None:
                return found
            if func in _EXPERTS and (both := _experts(*args, **kwargs)) is not None:
                return both
            if func is F.embedding and (found := _embedding(*args, **kwargs)) is not None:
                return found
            if func == Tensor.__setitem__ and isinstance(args[0], QuantisedWeight):
                raise _written(args[0], "item assignment")
            if isinstance(func, OpOverload) and func.namespace == "toolkit" and not torch.is_grad_enabled():
                # Without gradients nothing is saved: what is captured are dequantising and the op, on plain tensors.
                args, kwargs = _dense(args), _dense(kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        keep = _KEEPING.get(func)
        if keep is not None:
            kept = keep(*args, **kwargs)
            if kept is not None:
                return kept
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[at] if at < len(args) else kwargs.get(argument.name)
                for one in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(one, QuantisedWeight):
                        raise _written(one, func._schema.name.split("::")[1])
        return func(*_dense(args), **_dense(kwargs))


def _written(weight: QuantisedWeight, how: str) -> ToolkitError:
    return ToolkitError(
        f"a weight in {weight.format} must not be written in place, got {how}; dequantise the model first "
        "(toolkit.quantised.dequantise), or round to its codes (quantise_)."
    )


def _rebuilt(format: str, parts: list[Tensor], shape: Any, dtype: torch.dtype, gradient: bool | None) -> Tensor:
    """``gradient``: whether the parameter requires one; None for no parameter."""
    weight = QuantisedWeight(format, parts[0].view(find(format).codes), parts[1:], shape, dtype)
    return weight if gradient is None else nn.Parameter(weight, gradient)


torch.serialization.add_safe_globals([QuantisedWeight, _rebuilt])


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """``linear`` by the codes of its weight; None for a call that dequantises."""
    if not isinstance(weight, QuantisedWeight) or weight.dim() != 2 or isinstance(input, QuantisedWeight):
        return None
    device = input.device.type
    if device == "cpu" and has_native("linear") and not has_native("quantised_linear"):
        return None  # a library of older sources: of this op it has the reference alone, which adds in another order
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if weight.dtype not in (torch.float32, dtype):
            return None  # rounded twice
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    elif input.dtype != weight.dtype:
        return None  # the dense op says why not
    if weight.requires_grad and torch.is_grad_enabled():
        # Bitwise the same: the dense op on what the weight dequantises to, whose gradient it has.
        found: Tensor = _OURS.linear(input, weight, bias)
        return found
    return quantised_linear(input, weight.codes, weight.scales, bias, weight.format, weight.shape[0])


def _experts(
    x: Tensor, topk_weights: Tensor, up: Any, up_bias: Tensor | None, down: Any, down_bias: Tensor | None,
    order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor,
    activation: str, score_position: str, transposed: bool, interleaved: bool,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """``experts`` by the codes of its weights; None for a call that dequantises."""
    if not isinstance(up, QuantisedWeight) or not isinstance(down, QuantisedWeight) or transposed:
        return None
    if x.device.type == "cpu" and has_native("experts") and not has_native("quantised_experts"):
        return None
    if torch.is_grad_enabled() and (up.requires_grad or down.requires_grad):
        return None  # the dense op on what they dequantise to, whose gradients they have
    first, second = (CodedWeight(one.codes, one.scales, one.format) for one in (up, down))
    plan, gated = DispatchPlan(order, rows, offsets, tiles), is_gated(up, down, False)
    return quantised_experts(
        x, topk_weights, first, second, plan, down.shape[2], gated, activation, up_bias=up_bias, down_bias=down_bias,
        score_position=score_position, interleaved=interleaved,
    )  # fmt: skip


def _embedding(
    input: Tensor, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **options: Any
) -> Tensor | None:
    """The rows of an embedding by their own codes; None for a call that dequantises all."""
    whole_panels = isinstance(weight, QuantisedWeight) and weight.dim() == 2 and weight.shape[0] % PANEL == 0
    if not whole_panels or max_norm is not None or input.is_floating_point():
        return None
    if weight.requires_grad and torch.is_grad_enabled():
        return None
    inputs = weight.shape[-1]
    rows = dequantise_rows(input.reshape(-1).long(), weight.codes, weight.scales, weight.format, inputs, weight.dtype)
    return rows.view(*input.shape, inputs)


def _dense(value: Any) -> Any:
    """``value`` with dense tensors in the place of quantised ones."""
    if isinstance(value, QuantisedWeight):
        return value.dequantise()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_dense, value))
    if isinstance(value, dict):
        return {name: _dense(one) for name, one in value.items()}
    return value


def _detached(weight: Any) -> Tensor:
    return weight._with(lambda part: part)  # type: ignore[no-any-return]


def _cloned(weight: Any, **_: Any) -> Tensor:
    return weight._with(Tensor.clone)  # type: ignore[no-any-return]


def _converted(weight: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor | None:
    if dtype is not None and not dtype.is_floating_point:
        return None
    return weight._with(lambda part: part.to(device=device, copy=True), dtype)  # type: ignore[no-any-return]


def _copied(target: Any, source: Any, non_blocking: bool = False) -> Tensor | None:
    if not (isinstance(target, QuantisedWeight) and isinstance(source, QuantisedWeight)):
        return None
    if (target.format, target.shape) != (source.format, source.shape):
        return None
    for mine, other in zip((target.codes, *target.scales), (source.codes, *source.scales), strict=True):
        mine.copy_(other, non_blocking)
    return target


_KEEPING: dict[Any, Callable[..., Any]] = {
    _ATEN.detach.default: _detached,
    _ATEN.alias.default: _detached,
    _ATEN.clone.default: _cloned,
    _ATEN._to_copy.default: _converted,
    _ATEN.copy_.default: _copied,
}
