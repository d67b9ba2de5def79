"""Sampling and log-probabilities as part of a decode step: what a captured step reads of its rows and leaves of them.

Parameters, changes of logits and histories of the rows lie in separate memory for each padded size, and are written
where a row belongs to another sequence than at the step before. The ops are those of ``Sampler``, so are the bits.
Rows whose logits the host must see (logits processors, grammars) come out as any other and are sampled again by it.
Shapes: R rows, V vocabulary, L tokens of the longest history.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.engine.logprobs import upcast
from toolkit.engine.request import Sequence
from toolkit.engine.step.inputs import Columns
from toolkit.ops.sample import penalize, sample

Row = tuple[Sequence, int]
"""A sequence, and how many drafted tokens stand behind its tokens."""

EVERYTHING = 2**62  # a top_k that no vocabulary reaches
_PARAMETERS = ("temperature", "top_p", "min_p", "top_k", "seeds", "steps")
_PENALTIES = ("repetition", "frequency", "presence", "prompt_lengths")
_FLOATS = {"temperature", "top_p", "min_p", "repetition", "frequency", "presence"}


@dataclass(frozen=True)
class StepSampling:
    """How a step samples, and where it reads and writes what that takes.

    Args:
        parts: which tensors there are besides the parameters; steps of one size and the same parts are one graph.
        tensors: that are read, and the last one written: [R, 4] float64, of each row the sampled token, its
            log-probability by the model and by the distribution it was sampled from, the log-sum-exp of its logits.
    """

    parts: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    @property
    def result(self) -> Tensor:
        """What a step leaves."""
        return self.tensors[-1]


def sample_step(logits: Tensor, parts: tuple[str, ...], tensors: Items[Tensor]) -> None:
    """Sample every row of ``logits`` [R, V], the model's own, as ``StepSampling`` says."""
    left = iter(tensors)
    temperature, top_p, min_p, top_k, seeds, steps = (next(left) for _ in _PARAMETERS)
    own = upcast(logits)
    scores = own
    if "addends" in parts:
        scores = scores + next(left)
    if "penalties" in parts:
        repetition, frequency, presence, prompt_lengths = (next(left) for _ in _PENALTIES)
        offsets, zeros, history = (next(left) for _ in range(3))
        nothing = history.view(-1)[:0]
        scores = penalize(
            scores, history.view(-1), offsets, prompt_lengths, repetition, frequency, presence, nothing, zeros
        )
    tokens, sampled = sample(scores, temperature, top_k, top_p, min_p, seeds, steps)
    # By the op itself: the public function looks at the targets.
    logprobs, lse = torch.ops.toolkit.token_logprob.default(own, tokens)
    next(left).copy_(torch.stack([tokens.double(), logprobs.double(), sampled, lse.double()], 1))


class SamplingInputs:
    """The memory of ``StepSampling`` for every size of step.

    Args:
        vocab_size: V.
        dtype: of the logits that are sampled from.
        device: of the model.
    """

    def __init__(self, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._vocab_size, self._dtype, self._device = vocab_size, dtype, device
        self._of_size: dict[int, _Rows] = {}

    def of(self, rows: Items[Row], size: int) -> StepSampling:
        """How a step of ``size`` rows samples, of which ``rows`` are the first; overwritten by the next one's."""
        found = self._of_size.get(size)
        if found is None:
            found = self._of_size[size] = _Rows(size, self._vocab_size, self._dtype, self._device)
        return found.written(rows)


class _Rows:
    """The memory of the steps of one size."""

    def __init__(self, size: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._size, self._vocab_size, self._dtype, self._device = size, vocab_size, dtype, device
        shared = device.type == "cpu"
        self._columns = Columns([*_PARAMETERS, *_PENALTIES, "offsets", "zeros"], size, device, shared)
        # Numbers of either sort lie in one memory, so that they are one transfer.
        host = self._columns.host
        self._floats = {name: host[name].view("float64") for name in _FLOATS}
        self._floats["repetition"][:] = 1.0
        self._owners: list[object] = [None] * size
        self._adjusted: list[object] = [None] * size
        self._known = [0] * size  # of histories, tokens that stay
        self._filled = [0] * size
        self._penalised: list[object] = [None] * size
        self._addends: Tensor | None = None
        self._history: Tensor | None = None
        self._result = torch.zeros(size, 4, dtype=torch.float64, device=device)
        self._made: dict[tuple[str, ...], StepSampling] = {}

    def written(self, rows: Items[Row]) -> StepSampling:
        """The step's sampling, with the rows written."""
        host = self._columns.host
        owners: list[object] = [sequence.order for sequence, _ in rows]
        owners += [None] * (self._size - len(rows))
        if self._owners != owners:
            self._write_parameters(rows)
            self._owners = owners
        host["steps"][: len(rows)] = [sequence.generated + drafted for sequence, drafted in rows]
        changed = [one.request.adjustments is not None or _suppresses(one, drafted) for one, drafted in rows]
        penalised = [sequence.params.penalised for sequence, _ in rows]
        parts: tuple[str, ...] = ()
        if any(changed):
            self._write_addends(rows, changed)
            parts += ("addends",)
        if any(penalised):
            self._write_histories(rows, penalised)
            parts += ("penalties",)
        self._columns.upload()
        found = self._made.get(parts)
        if found is None:
            found = self._made[parts] = StepSampling(parts, self._tensors(parts))
        return found

    def _tensors(self, parts: tuple[str, ...]) -> tuple[Tensor, ...]:
        columns, size = self._columns, self._size

        def view(name: str) -> Tensor:
            found = columns.view(name, size)
            return found.view(torch.float64) if name in _FLOATS else found

        tensors = [view(name) for name in _PARAMETERS]
        if "addends" in parts:
            assert self._addends is not None
            tensors.append(self._addends)
        if "penalties" in parts:
            assert self._history is not None
            tensors += [view(name) for name in _PENALTIES]
            tensors += [columns.view("offsets", size + 1), columns.view("zeros", size + 1), self._history]
        return (*tensors, self._result)

    def _write_parameters(self, rows: Items[Row]) -> None:
        host, floats, own = self._columns.host, self._floats, self._owners
        floats["temperature"][len(rows) :] = 0.0
        for at, (sequence, _) in enumerate(rows):
            if own[at] == sequence.order:
                continue
            params = sequence.params
            floats["temperature"][at] = 0.0 if params.greedy else params.temperature
            floats["top_p"][at], floats["min_p"][at] = params.top_p, params.min_p
            host["top_k"][at], host["seeds"][at] = min(params.top_k, EVERYTHING), sequence.seed
            floats["repetition"][at] = params.repetition_penalty
            floats["frequency"][at], floats["presence"][at] = params.frequency_penalty, params.presence_penalty
            host["prompt_lengths"][at] = sequence.prompt_length

    def _write_addends(self, rows: Items[Row], changed: list[bool]) -> None:
        """What is added to a row's logits: biases, and -inf for tokens that may not come."""
        if self._addends is None:
            self._addends = torch.zeros(self._size, self._vocab_size, dtype=self._dtype, device=self._device)
        for at in range(self._size):
            key, own = None, None
            if at < len(rows) and changed[at]:
                sequence, drafted = rows[at]
                adjustments = sequence.request.adjustments
                last = [] if adjustments is None else adjustments.completing(sequence, drafted)
                key, own = (sequence.order, last, _suppresses(sequence, drafted)), adjustments
            if key == self._adjusted[at]:
                continue
            self._adjusted[at] = key
            row = torch.zeros(1, self._vocab_size, dtype=self._dtype)
            if key is not None:
                if own is not None:
                    row = own.addends(row, key[1])
                if key[2]:
                    row[0, [one for one in sequence.request.stop_ids if one < self._vocab_size]] = -torch.inf
            self._addends[at].copy_(row[0])

    def _write_histories(self, rows: Items[Row], penalised: list[bool]) -> None:
        """The tokens of penalised rows, -1 behind them."""
        longest = max(len(one.tokens) + drafted for (one, drafted), asked in zip(rows, penalised) if asked)
        if self._history is None or longest > self._history.shape[1]:
            columns = max(64, 1 << (longest - 1).bit_length())
            self._history = torch.full((self._size, columns), -1, dtype=torch.int64, device=self._device)
            self._columns.host["offsets"][:] = range(0, (self._size + 1) * columns, columns)
            self._known, self._filled = [0] * self._size, [0] * self._size
            self._penalised = [None] * self._size
            self._made = {}
        for at in range(self._size):
            sequence, drafted = rows[at] if at < len(rows) and penalised[at] else (None, 0)
            tokens: list[int] = []
            known = 0
            if sequence is not None:
                known = self._known[at] if self._penalised[at] == sequence.order else 0
                tokens = sequence.tokens[known:] + sequence.draft[:drafted]
                self._known[at] = len(sequence.tokens)
            elif self._penalised[at] is None:
                continue
            self._penalised[at] = None if sequence is None else sequence.order
            end, filled = known + len(tokens), self._filled[at]
            tokens += [-1] * (filled - end)
            self._history[at, known : known + len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            self._filled[at] = end


def _suppresses(sequence: Sequence, drafted: int) -> bool:
    """Whether no ending token may come yet."""
    return sequence.generated + drafted < sequence.params.min_tokens
