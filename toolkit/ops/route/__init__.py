"""The router of a mixture of experts: which experts a token goes to, and with which weights."""

from typing import Any

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.activation.kinds import find
from toolkit.ops.registry import register
from toolkit.ops.route import reference

__all__ = ["route"]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, _, ctx.score, _, _, _, ctx.normalise, ctx.eps, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    logits, ids = ctx.saved_tensors
    return _BACKWARD(grad, logits, ids, ctx.score, ctx.normalise, ctx.eps, ctx.scale), *[None] * 10


_BACKWARD = register(
    "route_backward(Tensor grad, Tensor logits, Tensor ids, str score, bool normalise, float eps, float scale)"
    " -> Tensor",
    reference=reference.route_backward,
    fake=reference.route_backward_fake,
    triton="toolkit.ops.route.triton.route_backward",
)
_FORWARD = register(
    "route(Tensor logits, Tensor? bias, Tensor? chosen, int k, str score, int groups, int kept, int best,"
    " bool normalise, float eps, float scale) -> (Tensor, Tensor)",
    reference=reference.route,
    fake=reference.route_fake,
    triton="toolkit.ops.route.triton.route",
    backward=_backward,
    setup_context=_setup_context,
)


def route(
    logits: Tensor,
    k: int,
    score: str = "softmax",
    *,
    bias: Tensor | None = None,
    chosen: Tensor | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    group_best: int = 1,
    normalise: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k experts of each token with the highest score: weights [T, k] and ids [T, k], best first.

    ``p = score(logits)``; the choice is by ``p + bias``; ``weights = scale p / (sum of the chosen p + eps)`` where
    ``normalise``, else ``scale p``. (A softmax over the chosen logits alone is softmax, normalised.)

    logits: [T, E], float32, float64, bfloat16 or float16. score: "softmax" over the experts, or a kind of
    ``toolkit.ops.activation`` such as "sigmoid". bias: [E] or None, for the choice alone (DeepSeek-V3).
    groups, kept_groups, group_best: experts lie in ``groups`` equal runs; only those of the ``kept_groups`` runs whose
    ``group_best`` highest values have the largest sum can be chosen (DeepSeek-V2: 1, V3: 2).
    chosen: [T, k] int64 ids to take instead of choosing (a recorded routing), in their order; all within 0 to E - 1.
    Returns weights in float32 (float64 for float64) and ids in int64.

    Numerics: a token's bits depend on its own logits alone; equal values go to the lower id, NaN counts as the least.
    Gradient to the logits through the weights; the choice has none. Saved for backward: logits and ids.
    Raises ToolkitError for a score, a number of experts, groups or shapes that do not fit.
    """
    experts = logits.shape[-1]
    if logits.dim() != 2 or not 1 <= k <= experts:
        raise ToolkitError(f"k is {k} for logits {list(logits.shape)}; allowed are 1 to E for logits [T, E].")
    if score != "softmax":
        find(score, plain=True)
    members = experts // groups if groups > 0 else 0
    if groups < 1 or experts % groups or not 1 <= kept_groups <= groups or not 1 <= group_best <= members:
        raise ToolkitError(
            f"groups, kept_groups and group_best are {groups}, {kept_groups} and {group_best} for {experts} experts; "
            "groups must divide the experts, and the others be at most the groups and the experts of one."
        )
    if k > kept_groups * members:
        raise ToolkitError(
            f"k is {k}; {kept_groups} groups of {members} experts allow at most {kept_groups * members}."
        )
    if bias is not None and bias.shape != (experts,):
        raise ToolkitError(f"bias has shape {list(bias.shape)}; logits {list(logits.shape)} need [{experts}].")
    if chosen is not None and chosen.shape != (logits.shape[0], k):
        raise ToolkitError(f"chosen has shape {list(chosen.shape)}; allowed is [{logits.shape[0]}, {k}].")
    return _FORWARD.select(impl)(
        logits, bias, chosen, k, score, groups, kept_groups, group_best, normalise, eps, scale
    )  # fmt: skip
