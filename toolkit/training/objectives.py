"""What training minimises."""

from torch import Tensor

from toolkit.ops.token_logprob import token_logprob


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over predicted tokens of -log p(target), in nats.

    logits [T, V], targets [T] int64; rows with a negative target are not predicted and count for nothing.
    The log-probabilities are the engine's own op, so the loss is made of the numbers that a rollout returns.
    """
    logprobs, _ = token_logprob(logits, targets)
    return -logprobs.sum() / (targets >= 0).sum().clamp_min(1)
