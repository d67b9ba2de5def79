"""The steps of an engine: one after the other, or each launched before the tokens of the one before it are known.

Launched ahead, a step takes its tokens on the device from what the step before it samples there, and the host reads
and delivers those of step n while the device runs step n + 1. Every call still collects one step, in order.
"""

from collections.abc import Callable, Mapping

import torch

from toolkit.engine.decoding import Decoding, Step
from toolkit.engine.encoded import encoded
from toolkit.engine.live_requests import LiveRequests
from toolkit.engine.media import EncoderCache
from toolkit.engine.outputs import Delta
from toolkit.engine.scheduler import HeldBlocks, Rows
from toolkit.errors import described
from toolkit.state import WeightKeys
from toolkit.state.media import Features


class Steps:
    """Runs the steps of one engine.

    Args:
        decoding: that runs a step, of the chunks that its scheduler chooses.
        requests: that it is for.
        encoder_cache: of pictures.
        ahead: whether steps may be launched ahead.
        raises: whether what fails is raised too, once its requests have ended.

    Attributes:
        ahead: as given; may be set.
        count: steps so far; of those in flight none.
        num_tokens: that they have added.
    """

    def __init__(
        self,
        decoding: Decoding,
        requests: LiveRequests,
        encoder_cache: EncoderCache,
        ahead: bool,
        raises: bool,
    ) -> None:
        self._decoding, self._requests, self._encoder_cache = decoding, requests, encoder_cache
        self._scheduler, self._speculation = decoding.scheduler, decoding.speculation
        self.ahead, self._raises = ahead, raises
        self._in_flight: Step | None = None
        self.count = self.num_tokens = 0

    def run(self, bring_weights: Callable[[], WeightKeys]) -> None:
        """Collect one step: that in flight, or schedule → batch → forward → sample → deliver.

        Args:
            bring_weights: puts what the next launch needs into the model and returns the keys of the weights.
        """
        self.commit()
        weights = bring_weights()
        step = self._taken()
        if step is not None:
            self._collect(step, weights)
            return
        if self._speculation is not None:
            self._speculation.draft(self._scheduler.running)
        chunks = self._scheduler.schedule(weights)
        features, failed = encoded(chunks, self._encoder_cache, weights.active)
        for request, error in failed.items():
            self._requests.end(request, "error", error)
        if failed:
            chunks = [chunk for chunk in chunks if chunk.sequence.request not in failed]
        if chunks:
            self._collect(Step(chunks, weights), weights, features)

    def synchronize(self) -> None:
        """Collect the step in flight, if there is one, and launch none: whoever needs that there is none calls this."""
        self.commit()
        step = self._taken()
        if step is not None:
            self._collect(step)

    def commit(self) -> None:
        """Count what the step in flight writes as written, its tokens being known; before anybody looks at weights."""
        step = self._in_flight
        if step is not None and not step.committed:
            self._decoding.commit(step)

    def drop_ended(self) -> None:
        """Give up the step in flight where all its sequences have ended: nobody wants what it samples."""
        step = self._in_flight
        if step is not None and not step.live:
            self._in_flight = self._scheduler.held = None
            self._release(step)

    def close(self) -> None:
        """Let go of the model; all requests have ended."""
        self.drop_ended()
        self._decoding.sampler.close()
        del self._decoding

    def _taken(self) -> Step | None:
        """The step in flight, which is in flight no more; None where there is none, or nobody wants it."""
        self.drop_ended()
        step, self._in_flight, self._scheduler.held = self._in_flight, None, None
        return step

    @staticmethod
    def _release(step: Step) -> None:
        """Free the blocks of those that ended while the step was in flight, once it is done."""
        if step.held is not None and step.held.tables:
            if step.sampled is not None:
                step.sampled.read()
            step.held.release()

    def _collect(
        self, step: Step, weights: WeightKeys | None = None, features: Mapping[bytes, Features] | None = None
    ) -> None:
        """Deliver what a step samples. What fails ends its requests with "error".

        Args:
            step: in flight; with ``features`` it is launched first.
            weights: keys of the weights that the next one may be launched ahead under; None for not.
            features: of the pictures that the step takes rows of.
        """
        self.count += 1
        try:
            with torch.inference_mode():
                if features is not None:
                    self._decoding.launch(step, features)
                    self._decoding.commit(step)
                if weights is not None and (rows := self._rows_ahead(step)):
                    self._launch_ahead(step, rows, weights)
                for sequence, outcome in self._decoding.collect(step):
                    if isinstance(outcome, Delta):
                        self.num_tokens += len(outcome.token_ids)
                        self._requests.deliver(sequence, outcome)
                    else:
                        self._requests.end(sequence.request, "error", outcome)
        except BaseException as error:
            for request in {chunk.sequence.request for chunk in step.chunks}:
                self._requests.end(request, "error", described(error))
            if not isinstance(error, Exception) or self._raises:
                raise
        finally:
            self._release(step)
            self.drop_ended()

    def _rows_ahead(self, step: Step) -> Rows:
        """The sequences of the step behind ``step``, if that may be launched before the tokens of ``step`` are known.

        This is the one place that says so. It may where the model itself samples each row, nothing that comes next
        goes by the tokens (``Request.needs_tokens``), and the sequences are the same ones but for those that end by
        their length: nobody enters, and nobody is in the middle of a prompt.

        Returns:
            Of each sequence the row of ``step`` that samples its next token. None of them: the step may not.
        """
        if not self.ahead or self._speculation is not None or step.sampled is None or step.forked:
            return []
        live, scheduler = step.live, self._scheduler
        if len(live) != len(scheduler.running) or any(one.request.needs_tokens for _, one in live):
            return []
        rows = [(row, one) for row, one in live if one.generated + 1 < one.request.max_tokens]
        return rows if len(rows) == scheduler.max_running or not scheduler.waiting else []

    def _launch_ahead(self, step: Step, rows: Rows, weights: WeightKeys) -> None:
        chunks = self._scheduler.schedule_ahead(rows)
        if chunks is not None:
            self._in_flight = ahead = self._decoding.launch_ahead(step, chunks, weights)
            self._scheduler.held = ahead.held = HeldBlocks(frozenset(one for _, one in rows))
