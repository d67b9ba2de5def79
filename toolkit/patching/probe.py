"""Is a module the mathematics of an op? Ask it, on random inputs, forward and backward.

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
    """The probes' own random numbers, a stream a purpose: the user's are left where they were."""
    return torch.Generator(device).manual_seed(20261123 + stream)


def probe_copy(module: nn.Module, instead: dict[int, nn.Parameter] | None = None) -> nn.Module:
    """A float32 copy with random parameters of unit scale (matrices: 1/sqrt(fan in)), in eval mode.

    instead: other parameters to copy in the place of those of these identities.
    """
    copied = copy.deepcopy(module, dict(instead or {})).float().eval()
    for stream, parameter in enumerate(copied.parameters()):
        # Each its own numbers: with equal weights, queries could not be told from keys, nor gate from up.
        source = generator(parameter.device, 1000 + stream)
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        with torch.no_grad():
            parameter.normal_(0.0, scale, generator=source)
        parameter.requires_grad_(True)
        parameter.grad = None
    return copied


def with_forward(module: nn.Module, forward: Callable) -> Callable[..., Any]:
    """``forward`` as a function of the inputs alone, run on ``module``."""
    return types.MethodType(forward, module)


def random_input(*shape: int, like: nn.Module, scale: float = 1.0) -> Tensor:
    device = device_of(like)
    return torch.randn(*shape, device=device, generator=generator(device)).mul_(scale)


def device_of(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _first_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [item for item in value if isinstance(item, Tensor)]


# Of the largest gradient. A gradient may be 0 but for roundings (of a bias that every key has in common, say).
_SMALL_GRADIENT = 1e-2


def _relative(candidate: Sequence[Tensor | None], original: Sequence[Tensor | None], small: float = 0.0) -> float:
    """Largest ‖candidate - original‖ / ‖original‖; a norm counts as ``small`` times the largest one at least."""
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
    """Outputs, gradients, and of how many entries the outputs are: None for a tensor by itself."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    returned = function(*leaves)
    outputs, entries = _first_tensors(returned), None if isinstance(returned, Tensor) else len(returned)
    wanted = [x for x in leaves if x.requires_grad] + list(parameters)
    differentiable = [out for out in outputs if out.requires_grad]
    if not wanted or not differentiable:
        return outputs, [], entries
    # Numbers apart from the inputs': along its own input a norm without weights has no gradient.
    cotangents = [torch.randn(o.shape, device=o.device, generator=generator(o.device, 1)) for o in differentiable]
    return outputs, torch.autograd.grad(differentiable, wanted, cotangents, allow_unused=True), entries


def compare(
    candidate: Callable[..., Any],
    original: Callable[..., Any],
    batches: Sequence[Sequence[Tensor]],
    parameters: Sequence[nn.Parameter] = (),
) -> ProbeError:
    """Largest relative error of ``candidate`` against ``original`` over ``batches`` of inputs.

    Outputs may be a tensor or a tuple (entries that are not tensors are ignored), of one length from both. Gradients
    are taken with respect to every floating input and all ``parameters``, against one random cotangent.
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
    """Modules with the same key are the same mathematics: class, shapes, scalar settings; not the layer index."""
    scalars = []
    for path, part in module.named_modules():
        settings = tuple(
            (name, value)
            for name, value in sorted(part.__dict__.items())
            if isinstance(value, (int, float, str, bool)) and name not in ("training", "layer_idx", "layer_id")
        )
        scalars.append((path, type(part), settings))
    shapes = tuple((name, tuple(tensor.shape), tensor.device.type) for name, tensor in module.named_parameters())
    return (tuple(scalars), shapes)


def required_arguments(module: nn.Module) -> list[str]:
    """Names of the arguments that the module's forward cannot do without."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in positional and p.default is p.empty and p.name != "self"]
