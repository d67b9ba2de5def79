"""What a tenant's requests do, in pieces that fit between two steps of the engine."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from toolkit.live.examples import Example, check_examples, micro_batches
from toolkit.live.gradients import Outcome, Part
from toolkit.live.losses import loss_named
from toolkit.live.tenant import Tenant


class Job:
    """One request of a tenant. ``future`` has what it returns, or why it failed; then the tenant is as it was before.

    Args:
        function: all that it does beside its micro-batches, at its end.
        on_engine: whether that runs on the engine's thread.
        then: is called after it, on the thread of training, before the future has the result.
    """

    def __init__(
        self, function: Callable[[], Any], on_engine: bool = False, then: Callable[[], None] | None = None
    ) -> None:
        self.future: Future[Any] = Future()
        self.finish, self.on_engine, self.then = function, on_engine, then

    def part(self) -> Part | None:
        """The next micro-batch; None where there is none left. Raises ToolkitError for a request that is none."""
        return None

    def take(self, outcome: Outcome) -> None:
        """What the last ``part`` gave."""


@dataclass(frozen=True)
class ForwardBackwardResult:
    """What ``forward_backward`` returns.

    Args:
        logprobs: [n] float32 of the targets of each example.
        loss: the sum over all examples.
    """

    logprobs: list[Tensor]
    loss: float


class ForwardBackward(Job):
    """Losses of examples, and unless ``forward_only`` their gradients, which are added to the tenant's at the end.

    Args:
        tenant: whose adapter acts.
        examples: of the request.
        loss_fn: name of the loss.
        config: of the loss.
        forward_only: whether no gradients are wanted.
        limits: (vocabulary size, most tokens of an example, tokens of a micro-batch).
    """

    def __init__(
        self,
        tenant: Tenant,
        examples: Sequence[Example],
        loss_fn: str,
        config: Mapping[str, float | str],
        forward_only: bool,
        limits: tuple[int, int, int],
    ) -> None:
        super().__init__(self._finish)
        self._tenant, self._examples, self._given = tenant, examples, (loss_fn, config)
        self._backward, self._limits = not forward_only, limits
        self._parts: deque[Part] | None = None
        self._logprobs: list[Tensor] = []
        self._loss = 0.0
        self._gradients: dict[str, Tensor] | None = None

    def part(self) -> Part | None:
        """The next micro-batch."""
        if self._parts is None:
            self._parts = deque(self._split())
        return self._parts[0] if self._parts else None

    def _split(self) -> list[Part]:
        tenant, (loss_fn, config) = self._tenant, self._given
        vocab_size, max_tokens, micro_batch_tokens = self._limits
        tenant.check()
        loss = loss_named(loss_fn)
        settings = loss.settings(loss_fn, config)
        examples = check_examples(self._examples, loss, vocab_size, max_tokens)
        return [
            Part(tenant.adapter, tenant.parameters, micro_batch, loss, settings, self._backward)
            for micro_batch in micro_batches(examples, micro_batch_tokens)
        ]

    def take(self, outcome: Outcome) -> None:
        """Add what a micro-batch gave to the request's sums."""
        assert self._parts is not None
        self._parts.popleft()
        self._logprobs += outcome.logprobs
        for loss in outcome.losses:
            self._loss += loss
        if self._backward:
            mine, new = self._gradients, outcome.gradients
            self._gradients = new if mine is None else {name: mine[name] + one for name, one in new.items()}

    def _finish(self) -> ForwardBackwardResult:
        if self._gradients is not None:
            self._tenant.add_gradients(self._gradients)
        return ForwardBackwardResult(self._logprobs, self._loss)
