"""The router of an MoE layer: which experts a token goes to, and with which weights."""

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.activation.kinds import find
from toolkit.ops.registry import Op, register_differentiable
from toolkit.ops.route import reference

__all__ = ["route"]


_OP: Op[tuple[Tensor, Tensor]]
_OP, _ = register_differentiable(
    "route(Tensor logits, Tensor? expert_bias, Tensor? topk_ids, int top_k, str scoring_func, int n_group,"
    " int topk_group, int experts_per_group_score, bool norm_topk_prob, float eps, float routed_scaling_factor)"
    " -> (Tensor weights, Tensor ids)",
    "route_backward(Tensor grad, Tensor logits, Tensor ids, str scoring_func, bool norm_topk_prob, float eps,"
    " float routed_scaling_factor) -> Tensor",
    gradients=("logits",),
    reference=reference,
    triton="toolkit.ops.route.triton",
)


def route(
    logits: Tensor,
    top_k: int,
    scoring_func: str = "softmax",
    *,
    expert_bias: Tensor | None = None,
    topk_ids: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    experts_per_group_score: int = 1,
    norm_topk_prob: bool = False,
    eps: float = 0.0,
    routed_scaling_factor: float = 1.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(topk_weights [T, K], topk_ids [T, K]): the K experts of each token with the highest score, highest first.

    ``p = scoring_func(logits)``; the K experts have the highest ``p + expert_bias``; with P the sum of their p,
    ``topk_weights = routed_scaling_factor p / (P + eps)`` where ``norm_topk_prob``, else ``routed_scaling_factor p``.
    (A softmax over the selected logits alone is softmax with norm_topk_prob.)

    Args:
        logits: [T, E], float32, float64, bfloat16 or float16.
        top_k: K, experts per token.
        scoring_func: "softmax" over the experts, or an activation of ``toolkit.ops.activation`` such as "sigmoid".
        expert_bias: [E] or None, added for the selection alone (DeepSeek-V3's e_score_correction_bias).
        topk_ids: [T, K] int64, 0 to E - 1: a recorded routing to use instead of selecting, in its order.
        n_group: the experts lie in n_group equal groups.
        topk_group: only experts of the topk_group groups with the highest group score can be selected.
        experts_per_group_score: a group's score is the sum of its so many highest ``p + expert_bias`` (DeepSeek-V2: 1,
            V3: 2).
        norm_topk_prob: normalise the weights of a token by their sum.
        eps: added to that sum.
        routed_scaling_factor: multiplies the weights.

    Returns:
        topk_weights: [T, K] float32 (float64 for float64 logits).
        topk_ids: [T, K] int64.

    Raises:
        ToolkitError: for a scoring function, a number of experts, groups or shapes that do not fit.

    Numerics: batch-invariant; ties go to the lower id, NaN ranks as -inf. The gradient reaches the logits through the
    weights; the selection has none. Saved for backward: logits and topk_ids.
    """
    experts = logits.shape[-1]
    if logits.dim() != 2 or not 1 <= top_k <= experts:
        raise ToolkitError(f"top_k must be >= 1 and <= E for logits [T, E], got {top_k} for {list(logits.shape)}.")
    if scoring_func != "softmax":
        find(scoring_func, plain=True)
    members = experts // n_group if n_group > 0 else 0
    if n_group < 1 or experts % n_group:
        raise ToolkitError(f"n_group must be >= 1 and divide the {experts} experts, got {n_group}.")
    if not 1 <= topk_group <= n_group:
        raise ToolkitError(f"topk_group must be >= 1 and <= n_group = {n_group}, got {topk_group}.")
    if not 1 <= experts_per_group_score <= members:
        raise ToolkitError(
            f"experts_per_group_score must be >= 1 and <= {members}, the experts per group, got "
            f"{experts_per_group_score}."
        )
    if top_k > topk_group * members:
        raise ToolkitError(
            f"top_k must be <= {topk_group * members}, the experts of {topk_group} groups of {members}, got {top_k}."
        )
    if expert_bias is not None and expert_bias.shape != (experts,):
        raise ToolkitError(f"expert_bias must be [{experts}], got {list(expert_bias.shape)}.")
    if topk_ids is not None and topk_ids.shape != (logits.shape[0], top_k):
        raise ToolkitError(f"topk_ids must be [{logits.shape[0]}, {top_k}], got {list(topk_ids.shape)}.")
    return _OP.select(impl)(
        logits,
        expert_bias,
        topk_ids,
        top_k,
        scoring_func,
        n_group,
        topk_group,
        experts_per_group_score,
        norm_topk_prob,
        eps,
        routed_scaling_factor,
    )
