"""What a loss reads of the logits before each token of a sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.ops.linear_logprob.deferred import token_logprobs, token_statistics


@dataclass(frozen=True)
class Reading:
    """Of logits [T, V] and tokens [T]: log-probabilities [T] in nats, and statistics of their distributions p.

    Args:
        temperature: by which logits are divided; > 0.
        entropy: whether ``-sum_v p_v log p_v`` [T] in nats follows, with its gradient.
        collision: whether ``log sum_v p_v^2`` [T] follows, without gradient (WPO; Zhou et al., 2024).
    """

    temperature: float = 1.0
    entropy: bool = False
    collision: bool = False

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        scaled = logits if self.temperature == 1.0 else logits / self.temperature
        if self.entropy:
            logprob, lse, entropy, _ = token_statistics(scaled, targets)
            found = [logprob, entropy]
        else:
            logprob, lse = token_logprobs(scaled, targets)
            found = [logprob]
        if self.collision:
            with torch.no_grad():
                squared = token_logprobs(logits / (0.5 * self.temperature), targets)[1]
                found.append(squared - 2.0 * lse.detach())
        return tuple(found)
