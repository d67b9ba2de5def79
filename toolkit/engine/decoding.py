"""One step of the chunks that were scheduled: forward, sample, verify what was drafted, commit."""

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from toolkit.engine.grammar.masks import GrammarMasks
from toolkit.engine.outputs import Delta, joined
from toolkit.engine.request import Sequence
from toolkit.engine.runner import ModelRunner
from toolkit.engine.sampler import SampledRow, Sampler, needs_host
from toolkit.engine.scheduler import Chunk, Scheduler
from toolkit.engine.speculation.speculation import Speculation
from toolkit.engine.step.sampling import Row
from toolkit.errors import described
from toolkit.state import WeightKeys
from toolkit.state.media import Features


class Decoding:
    """Runs steps.

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

    def run(
        self, chunks: list[Chunk], features: Mapping[bytes, Features], weights: WeightKeys
    ) -> Iterator[tuple[Sequence, Delta | str]]:
        """What the step adds to each sequence that grows: a delta, or the error that ends its request.

        A caller ends what an error is of before it asks for the next one.

        Args:
            chunks: that run.
            features: of the pictures that they take rows of, by digest.
            weights: keys of the weights.
        """
        started = time.perf_counter()
        self.sampler.prepare((chunk.sequence, chunk.drafts) for chunk in chunks if chunk.drafts or chunk.samples)
        try:
            logits, result = self.runner.step(chunks, features, self._sampled_rows(chunks))
        except BaseException:
            self.sampler.abandon()
            raise
        grown: list[_Grown] = []
        rows: list[int] = []
        forked: set[int] = set()  # of ``rows``, those of sequences that begin here
        sampled = 0  # rows of logits that are taken
        for chunk in chunks:
            if positions := chunk.scored:
                scores = chunk.sequence.request.prompt_logprobs
                assert scores is not None
                scores.add(positions, logits[sampled : sampled + len(positions)])
                sampled += len(positions)
            if chunk.drafts:
                grown.append(_Grown(chunk.sequence, chunk.start, chunk.drafts))
                rows += range(sampled, sampled + 1 + chunk.drafts)
                sampled += 1 + chunk.drafts
                continue
            self._commit(chunk.sequence, chunk.start, chunk.count, weights)
            if chunk.samples:
                owners = [chunk.sequence, *self.scheduler.fork_siblings(chunk.sequence)]
                grown += [_Grown(owner) for owner in owners]
                forked.update(range(len(rows) + 1, len(rows) + len(owners)))
                rows += [sampled] * len(owners)
                sampled += 1
        for chunk in chunks:
            for owner in chunk.sequence.request.sequences if chunk.ends else ():
                yield owner, owner.finish("length")
        if not grown:
            return
        threads: Any = getattr(self.runner.backend, "sampling_threads", nullcontext)
        with threads():
            sequences = [one.sequence for one in grown for _ in range(1 + one.drafts)]
            drafts = [drafted for one in grown for drafted in range(1 + one.drafts)]
            if result is None:
                taken = logits if rows == list(range(sampled)) else logits[rows]
                found = self.sampler.sample(taken, sequences, drafts).rows()
            else:
                found = iter(self.sampler.read(result(), logits, rows, sequences, drafts, forked))
        if self.speculation is not None:
            self.speculation.ran(chunks, time.perf_counter() - started)
        for one in grown:
            of_one = list(itertools.islice(found, 1 + one.drafts))
            if one.sequence.completion is None:  # else a sibling failed, and with it the request
                for outcome in self._accepted(one, of_one, weights):
                    yield one.sequence, outcome

    @staticmethod
    def _sampled_rows(chunks: list[Chunk]) -> list[Row] | None:
        """What the rows of a step are that the model may sample: of one that decodes alone, unless the host must."""
        if not all(chunk.decodes and chunk.samples and not chunk.scored for chunk in chunks):
            return None
        if all(needs_host(chunk.sequence) for chunk in chunks):
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
