"""What a source of training data becomes: examples, and what was cut, dropped or is worth a remark, counted."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from toolkit.chat import PicturedTokens, PreferenceTokens, TrainingTokens
from toolkit.errors import ToolkitError
from toolkit.ops import IGNORED


class Example(NamedTuple):
    """``inputs[t]`` is followed by ``targets[t]``; targets that do not count are -100.

    Attributes:
        media: what the model's processor made of the sequence and its images, None without images.
    """

    inputs: list[int]
    targets: list[int]
    media: Mapping[str, Any] | None = None

    @property
    def counted(self) -> int:
        return sum(target != IGNORED for target in self.targets)


@dataclass
class Outcome:
    """The examples of a source, and counts of what happened to it.

    Attributes:
        turn_ends: how many turns each special token ends at which generation does not stop; None for no special token.
    """

    examples: list[Any] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    turn_ends: Counter[int | None] = field(default_factory=Counter)

    @property
    def lengths(self) -> list[int]:
        """Inputs of the examples that are packed; none of others."""
        return [len(one.inputs) for one in self.examples if isinstance(one, Example)]

    def remark(self, tokens: TrainingTokens | PreferenceTokens) -> None:
        self.counts.update(straddles=tokens.straddles, reopened=tokens.reopened)
        self.turn_ends.update(tokens.turn_ends)


class TooLong(ToolkitError):
    """An example does not fit, and ``excess_length_strategy`` is ``raise``."""


def supervised(tokens: Sequence[TrainingTokens], max_length: int, excess_length_strategy: str) -> Outcome:
    """Examples of at most ``max_length`` inputs; one of which nothing that counts is left is dropped.

    Where the strategy is ``split``, a longer one becomes several: each token is predicted once.

    Raises TooLong where the strategy is ``raise`` and one is longer.
    """
    outcome = Outcome(counts=Counter(split=len(tokens) > 1))
    for one in tokens:
        targets = [token if counts else IGNORED for token, counts in zip(one.ids[1:], one.mask[1:])]
        example = Example(one.ids[:-1], targets)
        excess = max(len(targets) - max_length, 0)
        if excess and excess_length_strategy == "raise":
            raise TooLong(f"must have <= {max_length} tokens (train.max_length), got {len(targets)}.")
        if excess and excess_length_strategy == "split":
            parts = [
                Example(example.inputs[at : at + max_length], targets[at : at + max_length])
                for at in range(0, len(targets), max_length)
            ]
            parts = [part for part in parts if part.counted]
            outcome.examples += parts
            outcome.counts.update(
                examples=len(parts),
                tokens=sum(len(part.inputs) for part in parts),
                counted=sum(part.counted for part in parts),
                parted=1,
            )
            outcome.remark(one)
            continue
        kept = Example(example.inputs[:max_length], targets[:max_length])
        if not kept.counted or (excess and excess_length_strategy == "drop"):
            outcome.counts.update(["too_long" if excess else "empty"])
            continue
        outcome.examples.append(kept)
        outcome.counts.update(
            examples=1, tokens=len(kept.inputs), counted=kept.counted, cut=excess > 0, cut_tokens=excess
        )
        outcome.remark(one)
    return outcome


def pictured_example(made: PicturedTokens, max_length: int, excess_length_strategy: str) -> Outcome:
    """``supervised`` of one conversation with images: one that would be cut within or before an image is dropped.

    It is not split: what follows would lack the images.
    """
    strategy = "truncate" if excess_length_strategy == "split" else excess_length_strategy
    outcome = supervised([made.tokens], max_length, strategy)
    kept = [one for one in outcome.examples if len(one.inputs) >= made.images_end]
    if len(kept) < len(outcome.examples):
        return Outcome(counts=Counter(["too_long"]))
    outcome.examples = [one._replace(media=_shortened(made.inputs, len(one.inputs))) for one in kept]
    return outcome


def _shortened(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A processor's outputs with ``length`` tokens of text; what is there for each image stays."""
    return {
        name: value[:, :length] if name == "input_ids" or name.endswith("token_type_ids") else value
        for name, value in inputs.items()
        if name != "attention_mask"  # of padding, which there is none of
    }


def paired(
    tokens: PreferenceTokens,
    make: Callable[[list[int], list[int], list[int]], Any],
    max_length: int,
    excess_length_strategy: str,
) -> Outcome:
    """A pair whose sequences have at most ``max_length`` tokens; none where the prompt leaves no room for completions.

    Raises TooLong where the strategy is ``raise`` and a sequence is longer.
    """
    outcome = Outcome()
    room = max_length - len(tokens.prompt)
    longest = max(len(tokens.chosen), len(tokens.rejected))
    if longest > room and excess_length_strategy == "raise":
        raise TooLong(f"must have <= {max_length} tokens (train.max_length), got {len(tokens.prompt) + longest}.")
    if not tokens.prompt or not tokens.chosen or not tokens.rejected:
        outcome.counts.update(["empty"])
    elif room < 1 or (longest > room and excess_length_strategy == "drop"):
        outcome.counts.update(["too_long"])
    else:
        chosen, rejected = tokens.chosen[:room], tokens.rejected[:room]
        outcome.examples.append(make(tokens.prompt, chosen, rejected))
        cut = len(tokens.chosen) + len(tokens.rejected) - len(chosen) - len(rejected)
        total = 2 * len(tokens.prompt) + len(chosen) + len(rejected)
        outcome.counts.update(
            examples=1, tokens=total, counted=len(chosen) + len(rejected), cut=cut > 0, cut_tokens=cut
        )
        outcome.remark(tokens)
    return outcome
