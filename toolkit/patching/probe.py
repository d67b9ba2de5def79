"""Does a module compute an op? Both are run on random inputs, forward and backward, and compared.

The module itself is never touched: a float32 probe copy of it, with random parameters, is run in its place.
"""

import copy
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.patching.claim import ProbeError


def generator(device: torch.device, stream: int = 0) -> torch.Generator:
    """A generator for probes, one stream per purpose: the user's random state does not change."""
    return torch.Generator(device).manual_seed(20261123 + stream)


def probe_copy(module: nn.Module, replaced: dict[int, nn.Parameter] | None = None) -> nn.Module:
    """A float32 copy with random parameters of unit scale (matrices: 1/sqrt(fan in)), in eval mode.

    Args:
        replaced: parameters to copy instead of those with these ids.
    """
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            raise NotImplementedError(
                f"parameter {name} is quantised ({str(parameter.dtype).removeprefix('torch.')}), and a probe needs "
                "random weights"
            )
    copied = copy.deepcopy(module, dict(replaced or {})).float().eval()
    for stream, parameter in enumerate(copied.parameters()):
        # A stream each: with equal weights, queries could not be told from keys, nor gate from up.
        source = generator(parameter.device, 1000 + stream)
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        with torch.no_grad():
            parameter.normal_(0.0, scale, generator=source)
        parameter.requires_grad_(True)
        parameter.grad = None
    return copied


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` bound to ``module``."""
    return types.MethodType(forward, module)


def random_input(*shape: int, like: nn.Module, scale: float = 1.0) -> Tensor:
    """Normal float32 numbers of standard deviation ``scale``, on the device of ``like``."""
    device = device_of(like)
    return torch.randn(*shape, device=device, generator=generator(device)).mul_(scale)


def device_of(module: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; CPU for a module without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _first_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [item for item in value if isinstance(item, Tensor)]


# Relative to the largest gradient. A gradient may be 0 up to rounding (of a bias that all keys share, say).
_SMALL_GRADIENT = 1e-2


def _relative(candidate: Sequence[Tensor | None], original: Sequence[Tensor | None], small: float = 0.0) -> float:
    """Largest ‖candidate - original‖ / ‖original‖; a norm counts as at least ``small`` times the largest one."""
    worst = 0.0
    largest = max((float(one.detach().double().norm()) for one in original if one is not None), default=0.0)
    for got, expected in zip(candidate, original, strict=True):
        if got is None and expected is None:
            continue
        if got is None or expected is None or got.shape != expected.shape:
            return float("inf")
        got, expected = got.detach().double(), expected.detach().double()
        error = (got - expected).norm() / expected.norm().clamp_min(max(small * largest, 1e-30))
        worst = max(worst, float(error.nan_to_num(nan=float("inf"))))
    return worst


def _run(
    function: Callable[..., Any], inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> tuple[Any, Any, int | None]:
    """Outputs, gradients, and the length of the returned tuple: None for a single tensor."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    returned = function(*leaves)
    outputs, entries = _first_tensors(returned), None if isinstance(returned, Tensor) else len(returned)
    wanted = [x for x in leaves if x.requires_grad] + list(parameters)
    differentiable = [out for out in outputs if out.requires_grad]
    if not wanted or not differentiable:
        return outputs, [], entries
    # Not the inputs' numbers: along its input a norm without weights has no gradient.
    cotangents = [torch.randn(o.shape, device=o.device, generator=generator(o.device, 1)) for o in differentiable]
    return outputs, torch.autograd.grad(differentiable, wanted, cotangents, allow_unused=True), entries


def compare(
    candidate: Callable[..., Any],
    original: Callable[..., Any],
    batches: Sequence[Sequence[Tensor]],
    parameters: Sequence[nn.Parameter] = (),
) -> ProbeError:
    """Largest relative error of ``candidate`` against ``original`` over ``batches`` of inputs.

    Both return a tensor, or tuples of equal length; entries that are not tensors are ignored. Gradients are taken with
    respect to every floating-point input and all ``parameters``, against one random cotangent.
    """
    forward = backward = 0.0
    with torch.enable_grad():
        for inputs in batches:
            expected, expected_gradients, form = _run(original, inputs, parameters)
            got, got_gradients, got_form = _run(candidate, inputs, parameters)
            if got_form != form or len(got) != len(expected) or len(got_gradients) != len(expected_gradients):
                return ProbeError(float("inf"), float("inf"))
            forward = max(forward, _relative(got, expected))
            backward = max(backward, _relative(got_gradients, expected_gradients, _SMALL_GRADIENT))
    return ProbeError(forward, backward)


def signature_key(module: nn.Module) -> tuple[Any, ...]:
    """Modules with equal keys compute the same function: class, shapes and scalar settings, without the layer index."""
    scalars = []
    for path, part in module.named_modules():
        settings = tuple(
            (name, value)
            for name, value in sorted(part.__dict__.items())
            if isinstance(value, (int, float, str, bool)) and name not in ("training", "layer_idx", "layer_id")
        )
        forward = part.__dict__.get("forward")  # of a quantiser, say: its module computes something else
        hooks = (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
        scalars.append((path, type(part), settings, id(forward) if forward else None, tuple(map(id, hooks))))
    shapes = tuple((name, tuple(tensor.shape), tensor.device.type) for name, tensor in module.named_parameters())
    return (tuple(scalars), shapes)


def required_arguments(module: nn.Module) -> list[str]:
    """Names of the required arguments of the module's forward."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in positional and p.default is p.empty and p.name != "self"]
