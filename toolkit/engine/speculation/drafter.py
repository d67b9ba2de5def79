"""The contract of what drafts tokens."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

from toolkit.engine.request import Sequence


@dataclass(slots=True)
class Draft:
    """Tokens that may come next in a sequence.

    Args:
        tokens: in order; empty for none.
        match: how much speaks for them, in tokens of context that were found before; drafts of equal ``match`` are
            taken to be equally good.
        predicted: whether they are of the request's predicted output; such are only as good as others of these.
    """

    tokens: list[int] = field(default_factory=list)
    match: int = 0
    predicted: bool = False


class Drafter(Protocol):
    """Drafts tokens of the engine's sequences. Nothing that it returns changes a result, only how fast it comes.

    Attributes:
        seconds_per_token: what it takes to make every draft of a step a token longer; 0 for next to nothing.
    """

    seconds_per_token: float

    def propose(self, sequences: Items[Sequence], most: Items[int]) -> list[Draft]:
        """A draft of at most ``most[i]`` tokens behind ``sequences[i].tokens``.

        A sequence is asked for again after its draft was verified, and after it was preempted; it has grown since then.
        """

    def observe(self, sequence: Sequence) -> None:
        """A sequence has finished: nothing is asked for it any more, and its tokens may serve others."""

    def sleep(self) -> None:
        """Give the memory of state to others until the next ``propose``. Texts may be kept."""

    def close(self) -> None:
        """Give all memory back."""
