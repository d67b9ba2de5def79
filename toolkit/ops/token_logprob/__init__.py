"""Log-probability of given tokens, the loss of language models, without a stored softmax."""

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.registry import Op, register_differentiable
from toolkit.ops.targets import checked_targets
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
    """``(logits[t, targets[t]] - lse[t], lse[t])``, ``lse`` the natural log of the sum of exp of row t.

    Args:
        logits: [..., V], V >= 1; float32, float64, bfloat16 or float16. Entries of -inf have probability 0.
        targets: [...] int64, token ids below V. A target of -100 is ignored: its log-probability is 0 and passes no
            gradient, not even NaN from above.

    Returns:
        Log-probability and lse, both [...], float32 (float64 for float64 logits), in nats. A row of nothing but -inf
        gives lse -inf; a row with NaN or +inf gives NaN.

    Raises:
        ToolkitError: for other shapes or dtypes; on Triton for float64.
        OutOfVocabularyError: on CPU for any other target. On CUDA, where nothing is read back, it gives NaN.

    Numerics: batch-invariant. Both results pass gradient: ``d logits = g (onehot - softmax) + g_lse softmax``, written
    in one pass. Saved for backward: logits, targets, lse.
    """
    if targets.shape != logits.shape[:-1] or not logits.shape[-1]:
        raise ToolkitError(
            "targets and logits must have shapes [...] and [..., V] with V >= 1,"
            f" got {list(targets.shape)} and {list(logits.shape)}."
        )
    return _OP.select(impl)(logits, checked_targets(targets, logits.shape[-1]))
