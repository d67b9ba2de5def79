"""Cross-entropy straight from hidden states, whose gradients are taken from the same logits as its value."""

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.linear_cross_entropy import reference
from toolkit.ops.registry import register

__all__ = ["linear_cross_entropy"]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)  # no zeros, as large as the weight, for outputs that have no gradient
    ctx.save_for_backward(*gradients)
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    if torch.is_grad_enabled():
        raise ToolkitError(
            "linear_cross_entropy keeps its gradient, not the graph of it: create_graph=True is not supported; "
            "take the loss from dense logits."
        )
    # A graph that is not kept lets its buffers go: there the product may take their place. Not in a compiler's trace.
    kept = torch._C._autograd._get_current_graph_task_keep_graph()

    def scaled(gradient: Tensor) -> Tensor:
        in_place = type(gradient) is Tensor and not kept
        return (gradient.mul_(grad_loss) if in_place else gradient * grad_loss).to(ctx.dtype)

    needs = ctx.needs_input_grad[:3]
    gradients = [scaled(gradient) if need else None for gradient, need in zip(ctx.saved_tensors, needs)]
    return (*gradients, None, None, None, None, None)


_OP = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? row_weights,"
    " bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy,
    fake=reference.linear_cross_entropy_fake,
    triton="toolkit.ops.linear_cross_entropy.triton.linear_cross_entropy",
    backward=_backward,
    setup_context=_setup_context,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    row_weights: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """``sum_r w_r (lse_r - z_r[target_r])`` with ``z = hidden W^T + bias`` and ``lse_r = log sum_v exp z_rv``, in nats.

    hidden: [..., K], leading shape R; weight: [V, K] of the same dtype; bias: [V] or None; targets: R, int64 below V;
    row_weights w: R, without gradient to it, or None for ones. A row with a negative target or a weight of 0 counts for
    nothing and costs nothing. float32, float64, bfloat16 or float16; 16-bit products are rounded to their dtype as a
    head's output is, everything after that is float32.

    Returns one number, float32 (float64 for float64). Without weights its bits are those of
    ``-linear_logprob(hidden, weight, targets, bias=bias).logprob.sum()``, and its gradient costs one product less: as
    soon as the logits of a row are there, the gradients to hidden, weight and bias are known up to one factor, the
    gradient of the loss. On CPU the logits of a chunk of rows are held, T K numbers or 384 V, whichever is more, and
    turned into their gradients in place. Saved for backward: the gradients that are wanted, in float32 (float64); the
    backward multiplies them by that factor and rounds once. So the gradient of the weight takes its memory from the
    forward on, and is computed twice under activation checkpointing. Without gradients the value alone is computed.
    On a GPU no product is saved. There is no second derivative.

    -inf entries have probability 0; a row with NaN gives NaN.
    Errors: ToolkitError for targets or weights of another shape and for a backward with create_graph=True; on CPU
    IndexError for a target of V or more.
    """
    rows = hidden.shape[:-1]
    for name, given in (("targets", targets), ("row_weights", row_weights)):
        if given is not None and given.shape != rows:
            raise ToolkitError(
                f"{name} have shape {list(given.shape)}; hidden of shape {list(hidden.shape)} needs {list(rows)}."
            )
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    weights = None if row_weights is None else row_weights.reshape(-1)
    flat = hidden.reshape(rows.numel(), hidden.shape[-1])
    return _OP.select(impl)(flat, weight, bias, targets.reshape(-1), weights, *wanted)[0]
