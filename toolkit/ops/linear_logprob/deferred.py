"""Deferred logits: the output of a head while gradients are on, computed only when an operation needs the values.

A loss that recognizes them takes log-probabilities from the hidden states (``linear_logprob``) and never holds the
[T, V] logits. For other code they are a tensor: the first operation that cannot be deferred computes the logits, with
gradients, as the head would have done.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.activation import activation
from toolkit.ops.hooks import of_deepspeed
from toolkit.ops.linear import linear
from toolkit.ops.linear_cross_entropy import linear_cross_entropy
from toolkit.ops.linear_logprob import LinearLogprob, linear_logprob
from toolkit.ops.registry import has_native
from toolkit.ops.take_rows import take_rows
from toolkit.ops.token_logprob import token_logprob
from toolkit.ops.write_stamp import WriteStamp

_SCALAR = (int, float)


class DeferredLogits(Tensor):
    """``hidden @ weight.T + bias``, then the steps that a model applies to its logits: scaling, division, soft-cap.

    hidden: [..., K]; weight: [V, K]; bias: [V] or None; steps: ("mul", c), ("div", c) or ("tanh", 0.0) in order.
    Selecting rows, scaling and tanh stay deferred. Computing logits after the weights changed (by an optimizer step)
    is a ToolkitError, never a silent result of the new weights. So is asking for their gradient when something was
    taken from the hidden states before, whose gradient does not pass the logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    steps: tuple[tuple[str, float], ...]
    product: Callable[..., Tensor]
    dense: Tensor | None
    stamps: list[WriteStamp]
    passed_by: bool
    """Whether a loss, or part of the logits, was taken from the hidden states."""

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        product: Callable[..., Tensor] = linear,
        steps: tuple[tuple[str, float], ...] = (),
    ) -> "DeferredLogits":
        shape = (*hidden.shape[:-1], weight.shape[0])
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=hidden.dtype, device=hidden.device, requires_grad=True)
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.steps, self.product, self.dense, self.passed_by = steps, product, None, False
        self.stamps = self._stamps()
        # What only C++ sees (an autograd.Function applied to the logits) leaves its gradient here, at a leaf.
        this = weakref.ref(self)
        with torch._C.DisableTorchFunctionSubclass():
            self.register_hook(lambda grad: _pass_on(this, grad))  # type: ignore[no-untyped-call]
        return self

    def _stamps(self) -> list[WriteStamp]:
        """What shows writes to what the logits are made of."""
        return [WriteStamp(part) for part in (self.hidden, self.weight, self.bias) if part is not None]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeferredLogits(shape={list(self.shape)}, dtype={self.dtype})"

    def check(self) -> None:
        """ToolkitError once the logits could only be those of other weights."""
        if self._stamps() != self.stamps:
            raise ToolkitError(
                "logits were not read before the weights changed; read them before the optimizer's step, or patch "
                "without the role 'head'."
            )

    def compute(self, keep: bool = True) -> Tensor:
        """The logits by the model's own operations, with their graph; kept for the next time."""
        if self.dense is not None:
            return self.dense
        self.check()
        # Whoever looks first may do so without gradients; a loss that comes later still needs them.
        with torch.inference_mode(False), torch.enable_grad():
            dense = self.product(self.hidden, self.weight, self.bias)
            for step, value in self.steps:
                if step == "tanh":
                    # On CPU torch's tanh is not batch-invariant: the last elements differ, and with MKL any.
                    dense = activation(dense, "tanh") if dense.is_cpu else torch.tanh(dense)
                else:
                    dense = dense * value if step == "mul" else dense / value
        if keep:
            self.dense = dense
        return dense

    def scale_softcap_temperature(self) -> tuple[float, float, float] | None:
        """The steps as ``linear_logprob`` takes them, with the same operations in the same order; None if it cannot."""
        steps, scale, softcap, temperature = list(self.steps), 1.0, 0.0, 1.0
        if steps and steps[0][0] == "mul":
            scale = steps.pop(0)[1]
        if [step for step, _ in steps[:3]] == ["div", "tanh", "mul"] and steps[0][1] == steps[2][1] > 0.0:
            softcap = steps[0][1]
            steps = steps[3:]
        if steps and steps[0][0] == "div" and steps[0][1] > 0.0:
            temperature = steps.pop(0)[1]
        return None if steps else (scale, softcap, temperature)

    def _with(self, hidden: Tensor | None = None, step: tuple[str, float] | None = None) -> "DeferredLogits":
        self.check()  # what is made of these logits counts writes from now on
        steps = self.steps if step is None else (*self.steps, step)
        self.passed_by = True
        return DeferredLogits(self.hidden if hidden is None else hidden, self.weight, self.bias, self.product, steps)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _GRADIENT_OF:
            _check_gradient(_GRADIENT_OF[func](*args, **kwargs))
        later = _DEFERRED.get(func)
        if later is not None and args and isinstance(args[0], DeferredLogits) and args[0].dense is None:
            result = later(*args, **kwargs)
            if result is not None:
                return result
        return func(*_computed(args), **_computed(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Calls from C++ (collectives, say) come past __torch_function__, below autograd: no graph to keep here.
        return func(*_computed(args, keep=False), **_computed(kwargs or {}, keep=False))


def _computed(value: Any, keep: bool = True) -> Any:
    """``value`` with the logits in it computed."""
    if isinstance(value, DeferredLogits):
        return value.compute(keep)
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_computed(item, keep) for item in value)
    if isinstance(value, dict):
        return {key: _computed(item, keep) for key, item in value.items()}
    return value


def _check_gradient(wanted: Any) -> None:
    """ToolkitError for logits among ``wanted`` whose gradient would lack what was taken past them."""
    for one in wanted if isinstance(wanted, (list, tuple)) else [wanted]:
        if isinstance(one, DeferredLogits) and one.passed_by:
            raise ToolkitError(
                "the gradient of logits is not known: the loss was taken from the hidden states; call "
                "logits.retain_grad() before anything else reads the logits and take the loss from them (not by labels="
                "), or patch without the role 'head'."
            )


def _pass_on(logits: Any, grad: Tensor) -> None:
    """The rest of a backward that ended at deferred logits."""
    alive = logits()
    if alive is not None:
        torch.autograd.backward(alive.compute(), grad)


def _multiplied(logits: Any, by: Any, **kwargs: Any) -> DeferredLogits | None:
    return logits._with(step=("mul", float(by))) if isinstance(by, _SCALAR) and not kwargs else None


def _divided(logits: Any, by: Any, **kwargs: Any) -> DeferredLogits | None:
    return logits._with(step=("div", float(by))) if isinstance(by, _SCALAR) and not kwargs else None


def _tanh(logits: Any, **kwargs: Any) -> DeferredLogits | None:
    return None if kwargs else logits._with(step=("tanh", 0.0))


def _selected(logits: Any, index: Any) -> DeferredLogits | None:
    """Rows, by any index that leaves the vocabulary alone."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(one is ... or isinstance(one, (int, slice, Tensor)) for one in parts):
        return None
    taken = sum(one.dim() if isinstance(one, Tensor) and one.dtype == torch.bool else one is not ... for one in parts)
    for at, one in enumerate(parts):
        if one is ...:
            parts[at : at + 1] = [slice(None)] * (logits.dim() - taken)
            taken = logits.dim()
            break
    if taken == logits.dim() and isinstance(parts[-1], slice) and parts[-1] == slice(None):
        parts, taken = parts[:-1], taken - 1
    return logits._with(hidden=logits.hidden[tuple(parts)]) if taken < logits.dim() else None


def _contiguous(logits: Any, **kwargs: Any) -> DeferredLogits | None:
    return None if kwargs else logits


def _float(logits: Any, **kwargs: Any) -> DeferredLogits | None:
    return logits if logits.dtype == torch.float32 and not kwargs else None


_DEFERRED: dict[Any, Callable[..., Any]] = {
    Tensor.mul: _multiplied,
    Tensor.__mul__: _multiplied,
    Tensor.__rmul__: _multiplied,
    torch.mul: _multiplied,
    Tensor.div: _divided,
    Tensor.__truediv__: _divided,
    torch.div: _divided,
    Tensor.tanh: _tanh,
    torch.tanh: _tanh,
    F.tanh: _tanh,
    Tensor.__getitem__: _selected,
    Tensor.contiguous: _contiguous,
    Tensor.float: _float,
    # Logits are deferred only while gradients are enabled.
    Tensor.requires_grad.__get__: lambda logits: True,  # type: ignore[attr-defined]
}
_GRADIENT_OF: dict[Any, Callable[..., Any]] = {
    Tensor.retain_grad: lambda logits: logits,
    Tensor.register_hook: lambda logits, hook: None if of_deepspeed(hook) else logits,
    Tensor.grad.__get__: lambda logits, *_: logits,  # type: ignore[union-attr]
    torch.autograd.grad: lambda outputs, inputs, *_, **__: inputs,
}
"""Operations on the gradient of logits, and which of their arguments it is of."""
_METADATA = {
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.is_floating_point,
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "is_meta", "is_quantized")
    ),
}


def take_logits(logits: Tensor, rows: Tensor) -> Tensor:
    """logits [T, V] at ``rows``, which may repeat; deferred logits stay deferred. Gradients add up in a fixed order."""
    if isinstance(logits, DeferredLogits) and logits.dense is None:
        return logits._with(hidden=take_rows(logits.hidden, rows))
    return take_rows(logits.compute() if isinstance(logits, DeferredLogits) else logits, rows)


def split_rows(logits: Tensor, rows: int) -> list[Tensor]:
    """logits [T, V] in parts of ``rows`` rows; deferred logits stay deferred.

    One part where the head's weight learns: its gradient sums rows in an order that parts would change.
    """
    if not isinstance(logits, DeferredLogits) or logits.dense is not None or logits.weight.requires_grad:
        return [logits]
    if logits.bias is not None and logits.bias.requires_grad:
        return [logits]
    return [logits._with(hidden=part) for part in logits.hidden.split(rows)]


def _without_logits(logits: Tensor, targets: Tensor) -> LinearLogprob | None:
    """The statistics of deferred logits from their hidden states; None where only the logits themselves will do."""
    if not isinstance(logits, DeferredLogits) or logits.dense is not None:
        return None
    logits.check()
    settings = logits.scale_softcap_temperature()
    if settings is None:
        return None
    scale, softcap, temperature = settings
    logits.passed_by = True
    return linear_logprob(
        logits.hidden, logits.weight, targets,
        bias=logits.bias, scale=scale, softcap=softcap, temperature=temperature,
    )  # fmt: skip


def token_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of the targets, log-sum-exp) a row, in nats; logits [..., V], targets [...] or [..., K] int64.

    From deferred logits by ``linear_logprob``, without computing them; from dense ones by ``token_logprob``, bitwise
    identical. Targets of -100 are ignored: 0, without gradient.
    """
    fused = _without_logits(logits, targets)
    if fused is not None:
        return fused.logprob, fused.lse
    dense = logits.compute() if isinstance(logits, DeferredLogits) else logits
    if targets.dim() < dense.dim():
        return token_logprob(dense, targets)
    lse = token_logprob(dense, targets[..., 0])[1]
    return dense.gather(-1, targets).to(lse.dtype) - lse[..., None], lse


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of -log p(target) over the rows, in nats; on a CPU bitwise ``-token_logprobs(logits, targets)[0].sum()``.

    For deferred logits without steps, ``linear_cross_entropy`` takes value and gradients in three GEMMs instead of
    four: on a CPU, and on CUDA, where logits are deferred in fast mode only. Scaled or capped ones, and devices without
    a kernel, use ``token_logprobs``.
    """
    device = logits.device.type
    three_gemms = device == "cuda" or (device == "cpu" and has_native("linear_cross_entropy"))
    if three_gemms and isinstance(logits, DeferredLogits) and logits.dense is None and not logits.steps:
        logits.check()
        logits.passed_by = True
        return linear_cross_entropy(logits.hidden, logits.weight, targets, bias=logits.bias)
    return -token_logprobs(logits, targets)[0].sum()


def token_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of the targets, log-sum-exp, entropy and mean logit a row: see ``token_logprobs``."""
    fused = _without_logits(logits, targets)
    if fused is not None:
        return fused[:4]
    dense = logits.compute() if isinstance(logits, DeferredLogits) else logits
    logprob, lse = token_logprob(dense, targets)
    z = dense.to(lse.dtype)
    p = torch.exp(z - lse[..., None])
    # entr has an infinite slope at 0, and its value, 0, at 1 as well.
    return logprob, lse, torch.special.entr(p.masked_fill(p == 0, 1.0)).sum(-1), z.mean(-1)
