"""A step of the chunks that were scheduled: forward, sample, verify what was drafted, commit."""

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from toolkit.engine.grammar.masks import GrammarMasks
from toolkit.engine.outputs import Delta, joined
from toolkit.engine.request import Sequence
from toolkit.engine.runner import ModelRunner, SampledStep
from toolkit.engine.sampler import SampledRow, Sampler
from toolkit.engine.scheduler import Chunk, HeldBlocks, Rows, Scheduler
from toolkit.engine.speculation.speculation import Speculation
from toolkit.engine.step.sampling import Row
from toolkit.errors import described
from toolkit.state import WeightKeys
from toolkit.state.media import Features


@dataclass(eq=False, slots=True)
class Step:
    """A step from its launch until its tokens are delivered.

    Args:
        chunks: that run.
        weights: keys of the weights that they run under.

    Attributes:
        started: ``time.perf_counter()`` at its launch.
        logits: of its rows.
        sampled: what the model sampled of them, where it did.
        error: that its launch raised, where it was launched ahead.
        held: blocks that it writes, where it was launched ahead.
        committed: whether the state of its tokens counts as written.
        grown: the sequences that tokens are sampled of.
        rows: of the logits, for those tokens.
        forked: indices of ``rows``: of sequences that begin here.
        num_rows: rows of logits that are taken.
    """

    chunks: list[Chunk]
    weights: WeightKeys
    started: float = 0.0
    logits: Tensor | None = None
    sampled: SampledStep | None = None
    error: Exception | None = None
    held: HeldBlocks | None = None
    committed: bool = False
    grown: "list[_Grown]" = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    forked: set[int] = field(default_factory=set)
    num_rows: int = 0

    @property
    def live(self) -> Rows:
        """Index and sequence of the chunks whose sequences have not ended."""
        return [(at, one.sequence) for at, one in enumerate(self.chunks) if one.sequence.completion is None]


class Decoding:
    """Runs steps: ``launch``, ``commit``, ``collect``.

    Between launch and collection of a step the next one may be launched (``launch_ahead``), which needs no token of it.

    Args:
        runner: of the model.
        scheduler: that chose the chunks.
        speculation: that drafted; None for none.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, speculation: Speculation | None) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.speculation = speculation
        self.sampler = Sampler(GrammarMasks(runner.backend.vocab_size, runner.backend.device))

    def launch(self, step: Step, features: Mapping[bytes, Features]) -> None:
        """Run the model.

        Args:
            step: of which ``logits`` and ``sampled`` are set.
            features: of the pictures that it takes rows of, by digest.
        """
        chunks, step.started = step.chunks, time.perf_counter()
        self.sampler.prepare((chunk.sequence, chunk.drafts) for chunk in chunks if chunk.drafts or chunk.samples)
        try:
            step.logits, step.sampled = self.runner.step(chunks, features, self._sampled_rows(chunks))
        except BaseException:
            self.sampler.abandon()
            raise

    def launch_ahead(self, before: Step, chunks: list[Chunk], weights: WeightKeys) -> Step:
        """A step that runs the model on tokens that ``before`` samples, which the host does not know yet.

        Where that raises, so does ``collect``.

        Args:
            before: the last step that was launched.
            chunks: that run, each with a ``source``.
            weights: keys of the weights.
        """
        assert before.sampled is not None
        step = Step(chunks, weights, time.perf_counter())
        try:
            rows = [(chunk.sequence, 1) for chunk in chunks]  # one unknown token stands behind those that are known
            step.logits, step.sampled = self.runner.step(chunks, {}, rows, before.sampled.result)
        except Exception as error:
            step.error = error
        return step

    def commit(self, step: Step) -> None:
        """Count the state of the step's tokens as written, now that the tokens are known; of prompts begin to sample.

        What the device runs later finds it.
        """
        step.committed = True
        if step.error is not None:
            return
        logits, weights = step.logits, step.weights
        assert logits is not None
        for chunk in step.chunks:
            if positions := chunk.scored:
                scores = chunk.sequence.request.prompt_logprobs
                assert scores is not None
                scores.add(positions, logits[step.num_rows : step.num_rows + len(positions)])
                step.num_rows += len(positions)
            if chunk.drafts:
                step.grown.append(_Grown(chunk.sequence, chunk.start, chunk.drafts))
                step.rows += range(step.num_rows, step.num_rows + 1 + chunk.drafts)
                step.num_rows += 1 + chunk.drafts
                continue
            if chunk.sequence.completion is not None:  # it ended after the step was launched: its row is dropped
                step.num_rows += 1
                continue
            self._commit(chunk.sequence, chunk.start, chunk.count, weights)
            if chunk.samples:
                owners = [chunk.sequence, *self.scheduler.fork_siblings(chunk.sequence)]
                step.grown += [_Grown(owner) for owner in owners]
                step.forked.update(range(len(step.rows) + 1, len(step.rows) + len(owners)))
                step.rows += [step.num_rows] * len(owners)
                step.num_rows += 1

    def collect(self, step: Step) -> Iterator[tuple[Sequence, Delta | str]]:
        """What the step adds to each sequence that grows: a delta, or the error that ends its request.

        A caller ends what an error is of before it asks for the next one.
        """
        if step.error is not None:
            raise step.error
        for chunk in step.chunks:
            for owner in chunk.sequence.request.sequences if chunk.ends else ():
                yield owner, owner.finish("length")
        grown, rows, logits = step.grown, step.rows, step.logits
        if not grown:
            return
        assert logits is not None
        threads: Any = getattr(self.runner.backend, "sampling_threads", nullcontext)
        with threads():
            sequences = [one.sequence for one in grown for _ in range(1 + one.drafts)]
            drafts = [drafted for one in grown for drafted in range(1 + one.drafts)]
            if step.sampled is None:
                taken = logits if rows == list(range(step.num_rows)) else logits[rows]
                found = self.sampler.sample(taken, sequences, drafts).rows()
            else:
                found = iter(self.sampler.read(step.sampled.read(), logits, rows, sequences, drafts, step.forked))
        if self.speculation is not None:
            self.speculation.ran(step.chunks, time.perf_counter() - step.started)
        for one in grown:
            of_one = list(itertools.islice(found, 1 + one.drafts))
            if one.sequence.completion is None:  # else a sibling failed, and with it the request
                for outcome in self._accepted(one, of_one, step.weights):
                    yield one.sequence, outcome

    @staticmethod
    def _sampled_rows(chunks: list[Chunk]) -> list[Row] | None:
        """What the rows of a step are that the model may sample: of one that decodes alone, unless the host must."""
        if not all(chunk.decodes and chunk.samples and not chunk.scored for chunk in chunks):
            return None
        if all(chunk.sequence.request.needs_host for chunk in chunks):
            return None
        return [(chunk.sequence, drafted) for chunk in chunks for drafted in range(1 + chunk.drafts)]

    def _accepted(self, grown: "_Grown", rows: list[SampledRow], weights: WeightKeys) -> Iterator[Delta | str]:
        """Accept tokens until one is not what was drafted, or ends the completion."""
        sequence = grown.sequence
        deltas: list[Delta] = []
        failure: str | None = None
        version = weights.version_of(sequence.params.lora_name)
        for at, (token, logprob, sampling, top, failure) in enumerate(rows):
            if failure is not None:
                break
            try:
                deltas.append(sequence.accept(token, logprob, sampling, top, version))
            except Exception as raised:
                failure = described(raised)
                break
            if deltas[-1].finished is not None or (at < grown.drafts and token != sequence.draft[at]):
                break
        if grown.drafts:
            self._commit(sequence, grown.start, len(deltas), weights)
            if self.speculation is not None:
                self.speculation.verified(sequence, grown.drafts, max(0, len(deltas) - 1))
        sequence.draft = []
        if deltas:
            yield joined(deltas)
        if failure is not None:
            yield failure

    @staticmethod
    def _commit(sequence: Sequence, start: int, count: int, weights: WeightKeys) -> None:
        assert sequence.block_tables is not None
        sequence.block_tables.commit(sequence.names[start : start + count], sequence.prefix_key(weights))


@dataclass(slots=True)
class _Grown:
    """A sequence that tokens are sampled of: after its last token, and after each of ``drafts`` behind it.

    ``start`` is the index of that last token, where something is drafted.
    """

    sequence: Sequence
    start: int = 0
    drafts: int = 0
