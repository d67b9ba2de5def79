"""Log-probability of given tokens, the loss of language models, without a stored softmax."""

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.registry import Op, register_differentiable
from toolkit.ops.token_logprob import reference

_OP: Op[tuple[Tensor, Tensor]]
_OP, _ = register_differentiable(
    "token_logprob(Tensor logits, Tensor targets) -> (Tensor logprob, Tensor lse)",
    "token_logprob_backward(Tensor grad_logprob, Tensor grad_lse, Tensor logits, Tensor targets, Tensor lse) -> Tensor",
    gradients=("logits",),
    reference=reference,
    triton="toolkit.ops.token_logprob.triton",
)


def token_logprob(logits: Tensor, targets: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """``(logits[t, targets[t]] - lse[t], lse[t])`` with ``lse`` the natural log of the sum of exp of row t.

    logits: [..., V], V >= 1; float32, float64, bfloat16 or float16. targets: [...] int64, below V; a negative
    one is ignored: its log-probability is 0 and passes no gradient. Both results are [...], float32 (float64
    for float64 logits), in nats. Entries of -inf have probability 0; a row of nothing else gives lse -inf,
    a row with NaN or +inf gives NaN.
    Saved for backward: logits, targets, lse. Both results pass gradient:
    ``d logits = g (onehot - softmax) + g_lse softmax``, written in one pass.
    A row's bits depend on that row alone. Errors: ToolkitError for other shapes; IndexError for a target of V
    or more on CPU, where Triton gives NaN; other dtypes; on Triton float64.
    """
    if targets.shape != logits.shape[:-1] or not logits.shape[-1]:
        raise ToolkitError(
            f"targets have shape {list(targets.shape)} and logits {list(logits.shape)};"
            " allowed are [...] and [..., V] with V at least 1."
        )
    return _OP.select(impl)(logits, targets)
