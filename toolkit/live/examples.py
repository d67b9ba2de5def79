"""What a training client sends: sequences with a target and numbers for each token; and their micro-batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.live.losses import Loss
from toolkit.packing import in_batches
from toolkit.state import RaggedBatch


@dataclass(frozen=True)
class Example:
    """One sequence of a request.

    Args:
        tokens: [n] int64, what the model reads.
        targets: [n] int64, of each token the one whose log-probability is asked for, after it.
        inputs: [n] float32 each, what the loss reads of each target: weights, advantages, logprobs.
    """

    tokens: Tensor
    targets: Tensor
    inputs: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.tokens)


def check_examples(examples: Sequence[Example], loss: Loss, vocab_size: int, max_tokens: int) -> list[Example]:
    """The examples with every input that the loss reads, and no other.

    Raises:
        ToolkitError: for none, an empty or too long one, ids outside the vocabulary, and inputs that are missing, of
            another length or not finite.
    """
    if not examples:
        raise ToolkitError("data must have >= 1 examples, got none.")
    return [_checked(f"data[{index}]", one, loss, vocab_size, max_tokens) for index, one in enumerate(examples)]


def _checked(where: str, example: Example, loss: Loss, vocab_size: int, max_tokens: int) -> Example:
    count = len(example)
    if not 1 <= count <= max_tokens:
        raise ToolkitError(f"{where}.model_input must have >= 1 and <= {max_tokens} tokens, got {count}.")
    for name, ids in (("model_input", example.tokens), ("target_tokens", example.targets)):
        if ids.shape != (count,):
            raise ToolkitError(f"{where}.{name} must have shape [{count}], got {list(ids.shape)}.")
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ToolkitError(f"{where}.{name} must have token ids from 0 to {vocab_size - 1}.")
    inputs = {}
    for name in loss.needs:
        values = example.inputs.get(name)
        if values is None and name in loss.may_lack:
            values = torch.ones(count)
        if values is None:
            raise ToolkitError(f"{where}.loss_fn_inputs must have {name}, got {', '.join(example.inputs) or 'none'}.")
        if values.shape != (count,) or not bool(values.isfinite().all()):
            raise ToolkitError(f"{where}.{name} must be [{count}] finite numbers, got shape {list(values.shape)}.")
        inputs[name] = values.to(torch.float32)
    return Example(example.tokens, example.targets, inputs)


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive examples of a request that are one forward and backward.

    Args:
        examples: of it.
        shares: whether their common prefixes are computed once. It then is a batch alone: what is shared among the
            sequences of a batch decides in which order gradients are added.
    """

    examples: tuple[Example, ...]
    shares: bool

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.examples))


def micro_batches(examples: Sequence[Example], max_tokens: int) -> list[MicroBatch]:
    """The examples in order, in runs of at most ``max_tokens`` tokens; a longer example is one alone.

    A function of the examples and the limit alone, so a request's gradient does not depend on what else the server has
    to do.
    """
    return [MicroBatch(tuple(run), _shares(run)) for run in in_batches(examples, len, max_tokens)]


def _shares(run: Sequence[Example]) -> bool:
    return RaggedBatch.from_sequences([one.tokens for one in run]).sample_rows is not None
