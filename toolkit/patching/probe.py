"""Does a module compute an op? Both are run on random inputs, forward and backward, and compared."""

import inspect
import math
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.patching.claim import FORWARD_TOLERANCE, HOOKED, ProbeError
from toolkit.patching.instance_forward import called_forward


def generator(device: torch.device, stream: int = 0) -> torch.Generator:
    """A generator for probes, one stream per purpose: the user's random state does not change."""
    return torch.Generator(device).manual_seed(20261123 + stream)


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` bound to ``module``."""
    return types.MethodType(forward, module)


def random_input(*shape: int, like: nn.Module, scale: float = 1.0) -> Tensor:
    """Normal float32 numbers of standard deviation ``scale``, on the device of ``like``."""
    device = device_of(like)
    return torch.randn(*shape, dtype=torch.float32, device=device, generator=generator(device)).mul_(scale)


def device_of(module: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; CPU for a module without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


# Relative to the largest gradient. A gradient may be 0 up to rounding (of a bias that all keys share, say).
_SMALL_GRADIENT = 1e-2
_CHUNK = 1 << 22  # elements of a norm that are float64 at a time


def tensors_of(returned: Any) -> tuple[list[Tensor], int | None]:
    """The tensors of what a forward returned, and the length of the tuple: None for a single tensor."""
    if isinstance(returned, Tensor):
        return [returned], None
    return [item for item in returned if isinstance(item, Tensor)], len(returned)


def _norm(x: Tensor) -> float:
    """‖x‖, summed in float64."""
    flat = (torch.view_as_real(x) if x.is_complex() else x).detach().reshape(-1)
    return math.sqrt(sum(float(torch.dot(part, part)) for part in map(Tensor.double, flat.split(_CHUNK))))


def distance(got: Tensor, expected: Tensor, small: float = 0.0) -> float:
    """‖got - expected‖ / ‖expected‖, whose divisor is at least ``small``; infinite for NaN or another shape."""
    if got.shape != expected.shape:
        return float("inf")
    if torch.equal(got, expected):
        return 0.0
    got, expected = (x if x.is_floating_point() else x.double() for x in (got.detach(), expected.detach()))
    error = _norm(got.to(expected.dtype) - expected) / max(_norm(expected), small, 1e-30)
    return error if error == error else float("inf")


def compare(
    candidate: Callable[..., Any],
    original: Callable[..., Any],
    batches: Sequence[Sequence[Tensor]],
    parameters: Sequence[nn.Parameter] = (),
    gradients: bool = True,
) -> ProbeError:
    """The largest relative errors over ``batches``.

    Of every output, and of the gradients with respect to every floating-point input and all ``parameters``, against
    one random cotangent. The original's gradients are held; the candidate's are compared and freed one by one, and are
    not computed where its outputs differ.

    Args:
        gradients: False compares outputs alone.
    """
    forward = backward = 0.0
    with torch.set_grad_enabled(gradients):
        for inputs in batches:
            expected = _Run(original, inputs, parameters)
            wanted = expected.gradients()
            got = _Run(candidate, inputs, parameters)
            forward = max(forward, _largest(got, expected))
            if not forward <= FORWARD_TOLERANCE:
                return ProbeError(forward, backward)
            backward = max(backward, got.backward_error(wanted))
    return ProbeError(forward, backward)


def _largest(got: "_Run", expected: "_Run") -> float:
    if got.entries != expected.entries or len(got.outputs) != len(expected.outputs):
        return float("inf")
    if any(one.is_floating_point() and one.dtype != other.dtype for one, other in zip(got.outputs, expected.outputs)):
        return float("inf")
    return max((distance(one, other) for one, other in zip(got.outputs, expected.outputs)), default=0.0)


class _Run:
    """One forward of a function, and its backward."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        self.outputs, self.entries = tensors_of(function(*leaves))
        self.wanted = [x for x in (*leaves, *parameters) if x.requires_grad]

    def _total(self) -> Tensor | None:
        """Of the outputs, multiplied by a random cotangent.

        Not the inputs' numbers: along its input a norm without weights has no gradient.
        """
        terms = [
            (out * torch.randn(out.shape, device=out.device, generator=generator(out.device, 1)).to(out.dtype)).sum()
            for out in self.outputs
            if out.requires_grad
        ]
        return sum(terms[1:], terms[0]) if terms and self.wanted else None

    def gradients(self) -> list[Tensor | None]:
        total = self._total()
        if total is None:
            return []
        found: list[Tensor | None] = list(torch.autograd.grad(total, self.wanted, allow_unused=True))
        self.outputs = [out.detach() for out in self.outputs]
        return found

    def backward_error(self, expected: list[Tensor | None]) -> float:
        """The largest error of the gradients; ``expected`` is emptied."""
        total = self._total()
        if total is None or not expected:
            return 0.0 if total is None and not expected else float("inf")
        small = _SMALL_GRADIENT * max((_norm(one) for one in expected if one is not None), default=0.0)
        errors: list[float] = []

        def compared(at: int, leaf: Tensor) -> None:
            wanted, expected[at] = expected[at], None
            if leaf.grad is not None:
                errors.append(float("inf") if wanted is None else distance(leaf.grad, wanted, small))
            leaf.grad = None

        hooks = [
            leaf.register_post_accumulate_grad_hook(lambda leaf, at=at: compared(at, leaf))
            for at, leaf in enumerate(self.wanted)
        ]
        try:
            total.backward(inputs=self.wanted)  # not through what a layer has kept of another run
        finally:
            for hook in hooks:
                hook.remove()
        missing = any(one is not None for one in expected)  # of what the candidate does not use
        return float("inf") if missing else max(errors, default=0.0)


_NOT_COMPARED = ("training", "layer_idx", "layer_id", "forward", HOOKED)
_FEW = 1 << 16  # elements of a buffer that is compared by its content


def signature_key(module: nn.Module) -> tuple[Any, ...]:
    """Modules with equal keys compute the same function: class, shapes and settings, without the layer index."""
    parts = []
    for path, part in module.named_modules():
        settings = tuple(
            (name, setting)
            for name, value in sorted(part.__dict__.items())
            if name not in _NOT_COMPARED and (setting := _setting(value)) is not None
        )
        forward = called_forward(part)  # of a quantiser, say: its module computes something else
        hooks = (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
        parts.append((path, type(part), settings, _identity(forward), tuple(map(id, hooks)), _constants(part)))
    tensors = tuple(
        (name, tuple(tensor.shape), tensor.dtype, tensor.device.type)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    )
    return (tuple(parts), tensors)


def _setting(value: Any) -> Any:
    """What two settings have in common that are the same; None for an attribute that is none."""
    if isinstance(value, (int, float, str, bool)):
        return value
    if value is None or (type(value) in (tuple, list) and _is_plain(value)):
        return repr(value)
    if isinstance(value, partial):  # transformers' activations make one on each instance
        return _setting(value.func), *map(_setting, value.args), *((n, _setting(v)) for n, v in value.keywords.items())
    if callable(value) and not isinstance(value, nn.Module):
        return "function", id(getattr(value, "__func__", value))
    return None


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float, str, bool))


def _constants(module: nn.Module) -> tuple[Any, ...]:
    """The content of small buffers that no checkpoint has: slopes, masks. Others differ between layers of a kind."""
    names = sorted(module._non_persistent_buffers_set)
    tensors = ((name, module._buffers.get(name)) for name in names)
    return tuple(
        (name, _bytes(tensor))
        for name, tensor in tensors
        if type(tensor) is Tensor and not tensor.is_meta and 0 < tensor.numel() <= _FEW
    )


def _bytes(tensor: Tensor) -> bytes:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def _identity(forward: Any) -> int | None:
    """What an instance's forward computes: of one that a patch put there its code, which layers of a kind share."""
    function = getattr(forward, "__func__", None)
    if function is not None and function.__module__.startswith("toolkit."):
        return id(function.__code__)
    return id(forward) if forward else None


def required_arguments(module: nn.Module) -> list[str]:
    """Names of the required arguments of the module's forward."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in positional and p.default is p.empty and p.name != "self"]
