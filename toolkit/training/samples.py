"""Sampled completions as what an objective on a policy trains on, and how they become forwards."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Sample:
    """One completion: its tokens after the prompt's, the engine's log-probabilities of them, advantage and weight.

    Of a conversation ``tokens`` are those of all turns and answers; ``behaviour``, ``train``, ``reference`` and the
    loss are of the sampled ones.
    """

    prompt: list[int]
    tokens: list[int]
    behaviour: list[float]
    advantage: float = 0.0
    """Of all its tokens, where ``advantages`` has none."""
    weight: float = 0.0
    """Of each of its tokens in the loss; 0 for a sample that only fills a micro-batch."""
    masked: bool = False
    """Whether its tokens are not trained on."""
    train: "Tensor | None" = None
    """Log-probabilities by the first training forward, where they are asked for."""
    reference: "Tensor | None" = None
    routing: "Tensor | None" = None
    """The experts of its tokens but the last one, where they are replayed."""
    selection: "Tensor | None" = None
    """The keys that those attend, where they are replayed."""
    rotary_length: int | None = None
    """By which its rotary tables are made: the completion's."""
    sampled: list[bool] | None = None
    """Which of its tokens are; None for all."""
    advantages: list[float] | None = None
    """Of each sampled token, where they differ."""

    @property
    def token_advantages(self) -> list[float]:
        """Of each sampled token."""
        return [self.advantage] * len(self.behaviour) if self.advantages is None else self.advantages

    def of_sampled(self, logprobs: "Tensor") -> "Tensor":
        """Those of its tokens' values that are of sampled ones."""
        import torch

        return logprobs if self.sampled is None else logprobs[torch.tensor(self.sampled, device=logprobs.device)]

    @property
    def sequence(self) -> list[int]:
        return [*self.prompt, *self.tokens]


@dataclass
class MicroBatch:
    """Samples of one forward, members of a group side by side, so that their prompt is computed once."""

    samples: list[Sample]
    first: bool = field(default=True)
    """Whether the weights are still those of the rollout."""

    @property
    def sequences(self) -> list[list[int]]:
        return [sample.sequence for sample in self.samples]

    @property
    def lengths(self) -> list[int]:
        """Tokens behind the prompt of each."""
        return [len(sample.tokens) for sample in self.samples]

    @property
    def trained_lengths(self) -> list[int]:
        """Those of them that were sampled."""
        return [len(sample.behaviour) for sample in self.samples]

    @property
    def routing(self) -> "list[Tensor] | None":
        """Of each sample, or None where nothing is replayed."""
        return self._of_all([sample.routing for sample in self.samples])

    @property
    def selection(self) -> "list[Tensor] | None":
        """Of each sample, or None where nothing is replayed."""
        return self._of_all([sample.selection for sample in self.samples])

    @staticmethod
    def _of_all(recorded: "list[Tensor | None]") -> "list[Tensor] | None":
        found = [one for one in recorded if one is not None]
        return found if len(found) == len(recorded) else None

    @property
    def rotary_lengths(self) -> list[int | None]:
        return [sample.rotary_length for sample in self.samples]


def pack(groups: Sequence[Sequence[Sample]], batch_tokens: int) -> list[MicroBatch]:
    """Groups to micro-batches of at most ``batch_tokens`` tokens, a prompt counted once for the members of its group.

    A group that is larger is split; a sample that is larger has one to itself.
    """
    micros: list[MicroBatch] = []
    room = 0
    for group in groups:
        whole = len(group[0].prompt) + sum(len(sample.tokens) for sample in group)
        fresh = not micros or whole > room
        if fresh:
            micros.append(MicroBatch([]))
            room = batch_tokens
        first = True
        for sample in group:
            cost = len(sample.tokens) + (len(sample.prompt) if first or sample.prompt != group[0].prompt else 0)
            if micros[-1].samples and cost > room:
                micros.append(MicroBatch([]))
                room, cost = batch_tokens, len(sample.tokens) + len(sample.prompt)
            micros[-1].samples.append(sample)
            room -= cost
            first = False
    return micros


def filler(like: Sample) -> Sample:
    """A sample that counts for nothing."""
    routing, selection = (None if one is None else one[: len(like.prompt)] for one in (like.routing, like.selection))
    return Sample(like.prompt, like.tokens[:1], like.behaviour[:1], routing=routing, selection=selection)
