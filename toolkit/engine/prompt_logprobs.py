"""Log-probabilities of a prompt's own tokens, from the logits of its chunks.

Shapes: R rows of a chunk, V vocabulary.
"""

import torch
from torch import Tensor

from toolkit.engine.logprobs import top_logprobs, upcast
from toolkit.ops.token_logprob import token_logprob

MOST_ROWS = 256
"""Rows of logits that a sequence asks for in a step: a long prompt's [T, V] would not fit in memory."""


def ranked(values: dict[int, float], count: int, own: int | None = None) -> list[tuple[int, float, int | None]]:
    """Tokens in the place of one of the prompt, their log-probabilities and ranks, 1 for the most probable.

    Args:
        values: an entry of ``Completion.prompt_logprobs``.
        count: how many most probable tokens were asked for.
        own: the rank of the prompt's token (``Completion.prompt_ranks``), for where it is not among them.
    """
    first = 0 if len(values) > count >= 0 else 1
    return [(token, value, rank or own) for rank, (token, value) in enumerate(values.items(), first)]


class PromptLogprobs:
    """Those of one request, as far as its prompt was computed.

    Args:
        prompt: token ids.
        count: the most probable tokens beside each; -1 for all of the vocabulary.

    Attributes:
        found: see ``Completion.prompt_logprobs``; of the tokens so far.
        ranks: see ``Completion.prompt_ranks``; of the same tokens.
    """

    def __init__(self, prompt: list[int], count: int) -> None:
        self.found: list[dict[int, float] | None] = [None]
        self.ranks: list[int | None] = [None]
        self._prompt, self._count = prompt, count

    @property
    def complete(self) -> bool:
        """Whether all tokens of the prompt have theirs."""
        return len(self.found) == len(self._prompt)

    def wanted(self, start: int, count: int) -> range:
        """The positions whose logits are wanted when tokens ``start .. start + count`` run: those of tokens before the
        ones that are not found yet."""
        first = max(start, len(self.found) - 1)
        return range(first, max(first, min(start + count, len(self._prompt) - 1)))

    def may_continue(self, length: int) -> bool:
        """Whether the first ``length`` tokens need not run."""
        return self.complete or length < len(self.found)

    def add(self, positions: range, logits: Tensor) -> None:
        """Take over the logits [R, V] at ``positions``, which ``wanted`` returned."""
        for first in range(0, len(positions), MOST_ROWS):
            rows = upcast(logits[first : first + MOST_ROWS])
            after = positions[first] + 1
            tokens = self._prompt[after : after + len(rows)]
            logprobs, lse = token_logprob(rows, torch.tensor(tokens, device=rows.device))
            for row, (token, logprob) in enumerate(zip(tokens, logprobs.tolist())):
                top = top_logprobs(rows[row], lse[row], self._count)
                self.found.append(top if token in top else {token: logprob, **top})
                if token in top:
                    self.ranks.append(1 + list(top).index(token))
                else:  # behind them, where it is as probable as the last
                    self.ranks.append(1 + max(len(top), int((rows[row] > rows[row, token]).sum())))
