"""A check that fails closed: the actor's log-probabilities of sampled tokens must be the rollout's, bit for bit."""

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError


def check_equal(actor: Tensor, rollout: Tensor, mask: Tensor) -> None:
    """Raise ToolkitError unless two tensors are equal wherever ``mask`` is set.

    Args:
        actor: [samples, tokens] log-probabilities by the training forward under the weights of the rollout.
        rollout: [samples, tokens] those that came with the samples.
        mask: [samples, tokens], not 0 for sampled tokens.
    """
    kept = mask.bool()
    ours, theirs = actor[kept], rollout[kept].to(actor)
    if not torch.equal(ours, theirs):  # NaN is equal to nothing
        differing = int((ours != theirs).sum())
        largest = (ours - theirs).abs().max().item()
        raise ToolkitError(
            f"old_log_probs must be equal to rollout_log_probs with TOOLKIT_VERL_CHECK, got {differing} of "
            f"{ours.numel()} tokens that differ, by up to {largest:.3g} nats."
        )


def check_log_probs() -> None:
    """Let verl check where it compares both (``calculate_log_probs=True``), before it computes its metrics."""
    from verl.utils.debug import metrics

    own = metrics.calculate_debug_metrics
    if getattr(own, "checks", False):
        return

    def checked(data: Any) -> Any:
        batch = data.batch
        width = batch["responses"].size(1)
        name = "response_mask" if "response_mask" in batch else "attention_mask"
        check_equal(batch["old_log_probs"], batch["rollout_log_probs"], batch[name][:, -width:])
        return own(data)

    checked.checks = True  # type: ignore[attr-defined]
    metrics.calculate_debug_metrics = checked
