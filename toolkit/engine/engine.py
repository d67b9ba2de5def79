"""Continuous batching over one patched model."""

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from toolkit.engine.detokenizer import Decoder
from toolkit.engine.limits import Limits
from toolkit.engine.outputs import Completion, Delta
from toolkit.engine.params import SamplingParams
from toolkit.engine.prompts import check_params, check_prompt, split_prompts
from toolkit.engine.request import Request, Sequence
from toolkit.engine.runner import Backend, PatchedModel, Runner, block_counts
from toolkit.engine.sampler import Sampler
from toolkit.engine.scheduler import Chunk, Scheduler
from toolkit.engine.swap import SwapSpace
from toolkit.errors import ToolkitError
from toolkit.state import BlockManager, StatePool, StateSpec


class Engine:
    """Generates from ``model`` with many requests in flight, over paged state.

    model: a Hugging Face causal language model, patched here if it is not yet (nothing else of it changes),
    or a ``Backend``. tokenizer: a Hugging Face tokenizer; None takes and gives token ids only. limits: the
    fields of ``Limits``.

    ``submit``, ``cancel`` and ``stats`` may be called from any thread while another one steps. Use it as a
    context manager, or ``close`` it. Raises ToolkitError for limits that are unknown or not allowed.
    """

    def __init__(self, model: Any, tokenizer: Any = None, **limits: Any) -> None:
        self.limits = Limits.check(**limits)
        self.backend: Backend = model if isinstance(model, Backend) else PatchedModel(model, self.limits.numerics)
        self.tokenizer = tokenizer
        self.max_model_len = self._max_model_len()
        size, specs = self.limits.block_size, self._specs()
        running = min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens)
        pages = block_counts(specs, self.backend, self.limits, running, self.max_model_len)
        self.pool = StatePool(specs, pages, size, self.backend.dtype, self.backend.device)
        self.block_manager = BlockManager(self.pool.groups, [pages[group] for group in self.pool.groups], size)
        self.scheduler = Scheduler(
            self.block_manager,
            self.limits.max_num_seqs,
            self.limits.max_num_batched_tokens,
            self.limits.enable_prefix_caching,
            SwapSpace(self.pool, self.block_manager, self.limits.swap_bytes),
        )
        self.runner = Runner(self.backend, self.pool, self.scheduler.max_running, self.max_model_len)
        self._sampler = Sampler()
        self._eos = self.backend.eos | _eos_of(tokenizer)
        self._decoders = {skip: Decoder(tokenizer, skip) for skip in (True, False)} if tokenizer is not None else {}
        self._seeds = np.random.default_rng(self.limits.seed)
        self._ids = itertools.count()
        self._version = self.backend.version()
        self._generated = 0
        self._steps = 0
        # _stepping guards scheduler, tables and _pending. _mail guards what other threads hand in; it may be
        # taken inside _stepping, never the other way round.
        self._stepping = threading.Lock()
        self._mail = threading.Lock()
        self._live: dict[int, Request] = {}
        self._inbox: list[Request] = []
        self._to_cancel: list[int] = []
        self._pending: list[Delta] = []
        self._closed = False
        self._asleep = False

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, prompts: Any, params: SamplingParams | Collection[SamplingParams] | None = None
    ) -> list[Completion]:
        """Completions of all prompts, in order, ``n`` a prompt.

        prompts: a text, a list of token ids, or a list of those. params: one for all, or one a prompt. Raises
        ToolkitError, starting nothing, if any prompt cannot be run; what fails later ends with "error".
        """
        requests = self._make(prompts, params, deque())
        for _ in self._run(requests):
            pass
        return [sequence.completion for request in requests for sequence in request.sequences if sequence.completion]

    def stream(
        self, prompts: Any, params: SamplingParams | Collection[SamplingParams] | None = None
    ) -> Iterator[Delta]:
        """As ``generate``, but what each step adds, as it comes. Closing the iterator cancels the rest."""
        return self._run(self._make(prompts, params, deque()))

    def submit(self, prompt: Any, params: SamplingParams | None = None) -> int:
        """Queue one prompt (text or token ids); its request id. Deltas come from ``step``."""
        requests = self._make([prompt], params, None)
        self._queue(requests)
        return requests[0].request_id

    def cancel(self, request_id: int) -> bool:
        """End a request's unfinished completions with "cancelled"; False if it is not there (any more).

        At once where no step is running, else before the next one.
        """
        with self._mail:
            if request_id not in self._live:
                return False
            self._to_cancel.append(request_id)
        if self._stepping.acquire(blocking=False):
            try:
                self._read_mail()
            finally:
                self._stepping.release()
        return True

    def step(self) -> list[Delta]:
        """Run one step; what it added to requests made by ``submit``, a delta a sequence that grew or ended.

        What fails ends its own requests with "error"; this does not raise.
        """
        with self._stepping:
            self._advance()
            deltas, self._pending = self._pending, []
            return deltas

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do or to deliver."""
        return bool(self._live or self._pending)

    def stats(self) -> dict[str, int]:
        """Counts: sequences running and waiting, pages, and totals since the engine was made."""
        total, free = (
            sum(counts) for counts in zip(*((a.num_blocks, a.num_free_blocks) for a in self.block_manager.allocators))
        )
        with self._mail:
            unread = sum(request.params.n for request in self._inbox)
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting) + unread,
            "blocks_total": total,
            "blocks_used": total - free,
            "blocks_free": free,
            "blocks_cached": sum(allocator.num_cached_blocks for allocator in self.block_manager.allocators),
            "prefix_hit_tokens": self.scheduler.prefix_hit_tokens,
            "preemptions": self.scheduler.preemptions,
            "swaps": self.scheduler.swap.count if self.scheduler.swap is not None else 0,
            "generated_tokens": self._generated,
            "steps": self._steps,
            "weight_version": self._version,
        }

    def sleep(self) -> None:
        """Give the memory of all state to others, such as a training step, until ``wake``.

        Cached prefixes are forgotten; sequences under way go to the host and later continue where they were, under the
        weights of then. Requests may come in meanwhile; ``step`` does nothing. Sleeping twice is sleeping once.
        """
        with self._stepping:
            if self._asleep or self._closed:
                return
            for sequence in list(self.scheduler.running):
                self.scheduler.preempt(sequence, unlimited=True)
            self.block_manager.reset_prefix_cache()
            self.pool.sleep()
            self._asleep = True

    def wake(self) -> None:
        """Take the memory back after ``sleep``."""
        with self._stepping:
            if self._asleep and not self._closed:
                self.pool.wake()
                self._asleep = False

    def check_integrity(self) -> None:
        """Raise AssertionError where queues or pages do not add up. Not for hot paths."""
        with self._stepping:
            self.scheduler.check_integrity()

    def close(self) -> None:
        """Cancel what is left, refuse further work and free the pool. Closing twice is closing once."""
        with self._stepping:
            with self._mail:
                if self._closed:
                    return
                self._closed = True
            self._read_mail()
            for request in list(self._live.values()):
                self._end(request, "cancelled")
            self.scheduler.swap = None
            del self.pool, self.runner, self.backend, self._sampler

    def _specs(self) -> list[StateSpec]:
        """What each layer remembers, of the kinds that the limits ask for."""
        specs, kinds = list(self.backend.layers()), self.limits.kinds or {}
        if not self.limits.enable_return_routed_experts:
            specs = [spec for spec in specs if spec.kind != "routing"]
        elif all(spec.kind != "routing" for spec in specs):
            raise ToolkitError(
                "enable_return_routed_experts is True, but the model has no layer of experts that is patched "
                "(role 'experts'); allowed is False."
            )
        for name in kinds:
            if all(spec.kind != name for spec in specs):
                known = ", ".join(sorted({spec.kind for spec in specs}))
                raise ToolkitError(f"kinds names {name!r}, which no layer asks for; allowed are {known}.")
        return [replace(spec, kind=kinds.get(spec.kind, spec.kind)) for spec in specs]

    def _max_model_len(self) -> int:
        asked, most = self.limits.max_model_len, self.backend.max_model_len
        if asked is not None and asked > most:
            raise ToolkitError(
                f"max_model_len is {asked}; allowed are values up to {most}, which the model was made for."
            )
        return most if asked is None else asked

    def _make(self, prompts: Any, params: Any, sink: deque[Delta] | None) -> list[Request]:
        """Requests, all of them checked, not queued."""
        given = split_prompts(prompts)
        chosen = check_params(params, len(given))
        ready = [
            check_prompt(prompt, one, self.tokenizer, self.max_model_len, self.block_manager)
            for prompt, one in zip(given, chosen)
        ]
        with self._mail:
            requests = []
            for at, ((tokens, most), one) in enumerate(zip(ready, chosen)):
                request = Request(
                    next(self._ids),
                    at,
                    tokens,
                    one,
                    eos=self._eos,
                    max_tokens=most,
                    seed=int(self._seeds.integers(2**63)) if one.seed is None else one.seed,
                    decoder=self._decoders.get(one.skip_special_tokens),
                    sink=sink,
                )
                requests.append(request)
            return requests

    def _queue(self, requests: list[Request]) -> None:
        with self._mail:
            if self._closed:
                raise ToolkitError("the engine is closed; allowed are requests to an open one.")
            self._inbox += requests
            self._live.update((request.request_id, request) for request in requests)

    def _run(self, requests: list[Request]) -> Iterator[Delta]:
        """Step until the requests are finished, yielding their deltas; cancel them if the caller leaves."""
        sink = requests[0].sink if requests else None
        self._queue(requests)
        try:
            while sink or not all(request.finished for request in requests):
                if not sink:
                    with self._stepping:
                        if self._asleep:
                            raise ToolkitError("the engine is asleep; allowed is generating after wake().")
                        self._advance()
                while sink:
                    yield sink.popleft()
        finally:
            for request in requests:
                self.cancel(request.request_id)

    def _advance(self) -> None:
        """schedule → batch → forward → sample → deliver. The caller holds ``_stepping``."""
        if self._closed or self._asleep:
            return
        self._read_mail()
        version = self.backend.version()
        if version != self._version:
            self._version = version
            self.block_manager.drop_old_versions(version)
        chunks = self.scheduler.schedule(version)
        if not chunks:
            return
        self._steps += 1
        try:
            with torch.inference_mode():
                self._execute(chunks, version)
        except BaseException as error:
            for request in {chunk.sequence.request for chunk in chunks}:
                self._end(request, "error", f"{type(error).__name__}: {error}")
            if not isinstance(error, Exception):
                raise

    def _execute(self, chunks: list[Chunk], version: int) -> None:
        logits = self.runner.forward(chunks)
        sequences: list[Sequence] = []
        rows: list[int] = []
        row = 0
        for chunk in chunks:
            sequence, tables = chunk.sequence, chunk.sequence.block_tables
            assert tables is not None
            tables.commit(sequence.tokens[chunk.start : chunk.start + chunk.count], version)
            if chunk.samples:
                owners = [sequence, *self.scheduler.fork_siblings(sequence)]
                sequences += owners
                rows += [row] * len(owners)
                row += 1
        if not sequences:
            return
        samples = self._sampler.sample(logits if len(rows) == row else logits[rows], sequences)
        for sequence, token, logprob, sampling, top, error in zip(
            sequences,
            samples.token_ids,
            samples.logprobs,
            samples.sampling_logprobs,
            samples.top_logprobs,
            samples.errors,
        ):
            if sequence.completion is not None:  # a sibling failed, and with it the request
                continue
            if error is not None:
                self._end(sequence.request, "error", error)
                continue
            try:
                delta = sequence.accept(token, logprob, sampling, top, version)
            except Exception as failure:
                self._end(sequence.request, "error", f"{type(failure).__name__}: {failure}")
                continue
            self._generated += 1
            self._deliver(sequence, delta)

    def _deliver(self, sequence: Sequence, delta: Delta) -> None:
        request = sequence.request
        if delta.finished is not None:
            if sequence.block_tables is not None:
                blocks = [part.blocks for part in sequence.block_tables.parts]
                delta.finished.routed_experts = self.pool.recorded_routing(blocks, sequence.block_tables.length)
            self.scheduler.remove(sequence)
            if request.finished:
                with self._mail:
                    self._live.pop(request.request_id, None)
        (self._pending if request.sink is None else request.sink).append(delta)

    def _end(self, request: Request, reason: Any, error: str | None = None) -> None:
        """End what is unfinished of a request."""
        for sequence in request.sequences:
            if sequence.completion is None:
                self._deliver(sequence, sequence.finish(reason, error=error))

    def _read_mail(self) -> None:
        """Take in new requests and cancellations."""
        with self._mail:
            arrived, self._inbox = self._inbox, []
            to_cancel, self._to_cancel = self._to_cancel, []
            cancelled = [self._live[one] for one in to_cancel if one in self._live]
        for request in arrived:
            wrong = [token for token in request.prompt if not 0 <= token < self.backend.vocab_size]
            if wrong:
                allowed = f"allowed are 0 to {self.backend.vocab_size - 1}"
                self._end(request, "error", f"prompt has token id {wrong[0]}; {allowed}.")
            else:
                self.scheduler.add(request)
        for request in cancelled:
            self._end(request, "cancelled")


def _eos_of(tokenizer: Any) -> frozenset[int]:
    token = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if token is None else frozenset([token])
