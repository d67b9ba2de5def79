"""Drafts by a smaller model with the same vocabulary, with separate state of every sequence."""

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from toolkit.engine.backend import Backend, PatchedModel
from toolkit.engine.capacity import new_state
from toolkit.engine.config import EngineConfig
from toolkit.engine.media import PromptMedia
from toolkit.engine.request import Sequence
from toolkit.engine.runner import ModelRunner
from toolkit.engine.sampler import Sampler
from toolkit.engine.scheduler import Chunk
from toolkit.engine.speculation.drafter import Draft
from toolkit.errors import ToolkitError
from toolkit.sentences import shown
from toolkit.state import BlockTables, OutOfBlocks

_SPEED = 0.2  # how fast ``seconds_per_token`` follows what is measured


class DraftModel:
    """Samples the drafts of all sequences together, each token with the randomness that it will be verified with.

    Source: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding" (2023); here a
    draft is right where it equals the sample, so that no distribution is needed.

    Args:
        model: that drafts, or a backend.
        config: of the engine.
        target: the backend whose tokens are drafted.
        running: sequences at once.
        max_model_len: tokens of a sequence.

    Raises:
        ToolkitError: for another vocabulary.
    """

    def __init__(self, model: Any, config: EngineConfig, target: Backend, running: int, max_model_len: int) -> None:
        if not isinstance(model, nn.Module | Backend):
            raise ToolkitError(
                f"model of speculative_config must be a model that is loaded, got {shown(model)}; toolkit.LLM and "
                "toolkit serve load one by its name."
            )
        self.backend: Backend = model if isinstance(model, Backend) else PatchedModel(model)
        if self.backend.vocab_size != target.vocab_size or self.backend.device != target.device:
            raise ToolkitError(
                "model of speculative_config must have the vocabulary and device of the model that it drafts for, "
                f"{target.vocab_size} tokens on {target.device}, got {self.backend.vocab_size} on "
                f"{self.backend.device}."
            )
        self.max_model_len = min(max_model_len, self.backend.max_model_len)
        plain = replace(
            config, kinds=None, enable_return_routed_experts=False, enable_return_selected_keys=False,
            speculative_config=config.speculative_config if config.keeps_hidden else None,
        )  # fmt: skip
        self.pool, self.block_manager = new_state(self.backend, plain, running, self.max_model_len)
        self.runner = self._new_runner(running)
        self.sampler = Sampler()
        self.seconds_per_token = 0.0
        self._budget = config.max_num_batched_tokens
        self._version = self.backend.version()
        self._running = running
        self._known: dict[Sequence, Followed] = {}
        self._sleeps = False

    def propose(self, sequences: Items[Sequence], most: Items[int]) -> list[Draft]:
        if self._sleeps:
            self.pool.wake()
            self._sleeps = False
        version = self.backend.version()
        if version != self._version:  # what older weights computed is of little use
            self._version = version
            for sequence in list(self._known):
                self.observe(sequence)
        for sequence in [one for one in self._known if one.block_tables is None]:
            self.observe(sequence)  # preempted: another one has its place
        lengths = dict(zip(sequences, most, strict=True))
        followed = {one: found for one in sequences if (found := self._follow(one, lengths[one])) is not None}
        try:
            with torch.inference_mode():
                self._run(followed, lengths)
        finally:
            self.sampler.abandon()  # of a forward that failed
            for sequence in sequences:
                sequence.draft = []
        return [Draft(followed[one].draft if one in followed else []) for one in sequences]

    def observe(self, sequence: Sequence) -> None:
        found = self._known.pop(sequence, None)
        if found is not None:
            found.block_tables.release()

    def sleep(self) -> None:
        for sequence in list(self._known):
            self.observe(sequence)
        self.pool.sleep()
        self._sleeps = True

    def close(self) -> None:
        for sequence in list(self._known):
            self.observe(sequence)
        self.sampler.close()
        del self.pool, self.runner, self.backend

    def _follow(self, sequence: Sequence, most: int) -> "Followed | None":
        """The sequence here, with state of no other tokens than its own; None where it cannot be drafted for."""
        if sequence.request.media is not None or len(sequence.tokens) + most > self.max_model_len:
            return None
        found = self._known.get(sequence)
        if found is None:
            if len(self._known) >= self._running:
                return None
            length = self._rotary_length(len(sequence.request.prompt) + sequence.request.max_tokens)
            request = DraftRequest(length, sequence.request.prompt_length)
            tables = self.block_manager.new_block_tables(None)
            found = self._known[sequence] = self._new_followed(sequence, request, tables)
        found.follow(sequence.tokens)
        return found

    def _new_runner(self, running: int) -> ModelRunner:
        return ModelRunner(self.backend, self.pool, running, self.max_model_len)

    def _new_followed(self, sequence: Sequence, request: "DraftRequest", tables: BlockTables) -> "Followed":
        return Followed(request, tables)

    def _rotary_length(self, declared: int) -> int | None:
        of: Any = getattr(self.backend, "rotary_length", lambda declared: None)
        length: int | None = of(declared)
        return length

    def _run(self, followed: "dict[Sequence, Followed]", most: dict[Sequence, int]) -> None:
        """Steps until every draft has as many tokens as it may."""
        while True:
            wanting = [(one, found) for one, found in followed.items() if len(found.draft) < most[one]]
            chunks, owners, spare = [], [], self._budget
            for sequence, found in wanting:
                chunk = found.chunk(spare)
                if chunk is None:  # no block for it, or its turn comes with the next step
                    continue
                spare -= chunk.count
                chunks.append(chunk)
                owners += [sequence] if chunk.samples else []
            if not chunks:
                return
            started = time.perf_counter()
            self.sampler.prepare((one, len(one.draft)) for one in owners)
            logits = self.runner.forward(chunks, {})
            for chunk in chunks:
                assert chunk.sequence.block_tables is not None
                chunk.sequence.block_tables.commit(chunk.sequence.tokens[chunk.start : chunk.start + chunk.count])
            if owners:
                sampled = self.sampler.sample(logits, owners, [len(one.draft) for one in owners], top=False)
                for sequence, token in zip(owners, sampled.token_ids):
                    followed[sequence].add(token)
                    sequence.draft = followed[sequence].draft
            if len(owners) == len(chunks):
                seconds, before = time.perf_counter() - started, self.seconds_per_token
                self.seconds_per_token = before + _SPEED * (seconds - before) if before else seconds


@dataclass(slots=True)
class DraftRequest:
    """What a runner asks of a request."""

    rotary_length: int | None
    prompt_length: int | None
    media: PromptMedia | None = None
    prompt_logprobs: None = None


@dataclass(slots=True)
class Followed:
    """A sequence in the draft model: for its runner what a ``Sequence`` is for the engine's."""

    request: DraftRequest
    block_tables: BlockTables
    tokens: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    table_stamp: int = 0
    num_known_blocks: int = 0

    def follow(self, tokens: list[int]) -> None:
        """Take over the sequence's tokens; forget the state of others, and of the last one, whose output is wanted."""
        same = min(self.block_tables.length, len(tokens) - 1)
        first = max(0, same - len(self.draft) - 1)  # what was drafted last time is all that can differ
        while first < same and self.tokens[first] == tokens[first]:
            first += 1
        self.block_tables.truncate(first)
        self.num_known_blocks = min(self.num_known_blocks, len(self.block_tables.parts[0].blocks))
        self.tokens, self.draft = list(tokens), []

    def add(self, token: int) -> None:
        """Draft a token."""
        self.tokens.append(token)
        self.draft.append(token)

    def chunk(self, spare: int) -> Chunk | None:
        """Its next tokens, at most ``spare``; None where there is no room."""
        start = self.block_tables.length
        count = min(len(self.tokens) - start, spare)
        if count < 1:
            return None
        try:
            slots = self.block_tables.reserve(count)
        except OutOfBlocks:
            return None
        sequence: Any = self
        return Chunk(sequence, start, count, slots, start + count == len(self.tokens))
