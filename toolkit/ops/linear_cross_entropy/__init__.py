"""Cross-entropy straight from hidden states, whose gradients are taken from the same logits as its value."""

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.linear_cross_entropy import reference
from toolkit.ops.registry import register
from toolkit.ops.targets import checked_targets

__all__ = ["linear_cross_entropy"]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)  # no zeros, as large as the weight, for outputs that have no gradient
    ctx.save_for_backward(*gradients, inputs[3], inputs[4])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    if torch.is_grad_enabled():
        raise ToolkitError(
            "linear_cross_entropy keeps its gradient, not the graph of it: create_graph=True is not supported; take "
            "second derivatives by torch.func (grad of grad, hessian, jvp), or unpatch the model."
        )
    # A graph that is not kept lets its buffers go: there the result may overwrite them. Not in a compiler's trace.
    kept = torch._C._autograd._get_current_graph_task_keep_graph()

    def scaled(gradient: Tensor, by: Tensor) -> Tensor:
        in_place = type(gradient) is Tensor and not kept
        return (gradient.mul_(by) if in_place else gradient * by).to(ctx.dtype)

    *saved, targets, row_weights = ctx.saved_tensors
    counts = targets >= 0 if row_weights is None else (targets >= 0) & (row_weights != 0)
    # The mask belongs to the gradient of the loss: that of a mean over no row is 0 / 0, and NaN times 0 is NaN.
    of_rows, of_all = (torch.where(mask, grad_loss, 0.0) for mask in (counts[:, None], counts.any()))
    factors = of_rows, of_all, of_all
    needs = ctx.needs_input_grad[:3]
    gradients = [scaled(one, by) if need else None for one, by, need in zip(saved, factors, needs)]
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

    Args:
        hidden: [..., K], leading shape R; float32, float64, bfloat16 or float16.
        weight: [V, K] in hidden's dtype.
        targets: R, int64, token ids below V. A row with a target of -100 does not count and, on a CPU, costs nothing;
            its gradient is 0, also below an upstream NaN.
        bias: [V] or None.
        row_weights: w of shape R, without gradient to it, or None for ones. A row with weight 0 does not count
            either.

    Returns:
        One number, float32 (float64 for float64).

    Raises:
        ToolkitError: for targets or weights of another shape, and for a backward with create_graph=True.
        OutOfVocabularyError: on CPU for any other target. On CUDA, where nothing is read back, it gives NaN.

    Numerics: 16-bit GEMMs are rounded to their dtype as a head's output is; everything after that is float32. The
    gradient costs one GEMM less than that of ``linear_logprob``: as soon as the logits of a row are computed, the
    gradients to hidden, weight and bias are known up to one factor, the gradient of the loss.
    On CPU without weights bitwise identical to ``-linear_logprob(hidden, weight, targets, bias=bias).logprob.sum()``,
    and batch-invariant. The logits of a chunk of rows are held, T K numbers or 384 V, the larger of the two, and
    overwritten by their gradients.
    On a GPU its GEMMs are cuBLAS's, so that it belongs to numerics mode ``fast``: the gradient of a row may change in
    the last bits with the rows beside it. The logits of 2,048 rows are held, and overwritten by their gradients. A row
    that does not count is multiplied as zeros, for only the device knows how many there are: it does cost its GEMMs.
    Saved for backward: the gradients that are needed, in float32 (float64); the backward multiplies them by that factor
    and rounds once. So the gradient of the weight takes its memory from the forward on, and is computed twice under
    activation checkpointing. Without gradients the value alone is computed, on a GPU by ``linear_logprob``. There is no
    second derivative. Entries of -inf have probability 0; a row with NaN gives NaN.
    """
    rows = hidden.shape[:-1]
    for name, given in (("targets", targets), ("row_weights", row_weights)):
        if given is not None and given.shape != rows:
            raise ToolkitError(
                f"{name} must have shape {list(rows)} for hidden {list(hidden.shape)}, got {list(given.shape)}."
            )
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    weights = None if row_weights is None else row_weights.reshape(-1)
    flat = hidden.reshape(rows.numel(), hidden.shape[-1])
    known = checked_targets(targets, weight.shape[0]).reshape(-1)
    return _OP.select(impl)(flat, weight, bias, known, weights, *wanted)[0]
