"""Which tokens run in the next step.

Every step gives each decoding sequence its one token first, and the tokens that were drafted for it while there is
budget for them. It then fills the token budget with chunks of prompts, oldest request first, and admits waiting
requests in the order they came. When blocks run out the youngest running sequence is preempted: it gives up its blocks
and waits. Its tokens are kept. Their state is swapped in again where it was swapped out, and computed again otherwise.
Requests of a lower ``priority`` count as older than all of a higher one.

A picture whose tokens see each other is computed in one step, whole. Where it is longer than what is left of a step's
budget, it waits for the next one.
"""

import time
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter

from toolkit.engine.fork_points import ForkPoints
from toolkit.engine.request import Request, Sequence
from toolkit.engine.swap import SwapSpace
from toolkit.state import BlockManager, BlockTables, OutOfBlocks, WeightKeys
from toolkit.state.block_manager import BlockCounts
from toolkit.state.offloading import PrefixOffloading

_order = attrgetter("order")

Rows = list[tuple[int, Sequence]]
"""Rows of a step, each with the sequence whose next token it samples."""


@dataclass(slots=True)
class Chunk:
    """Tokens ``start .. start + count`` of a sequence, in this step.

    Args:
        sequence: whose tokens.
        start: the first.
        count: how many.
        slots: of the tokens, in each group of layers.
        samples: whether they are its last, and the next token is sampled after them.
        drafts: how many of them, the last ones, are drafted (``Sequence.draft``); a token is sampled before each too.
        source: of a token that the host does not know yet, the row of the step before that samples it; -1 of others.
    """

    sequence: Sequence
    start: int
    count: int
    slots: list[list[int]]
    samples: bool
    drafts: int = 0
    source: int = -1

    @property
    def tokens(self) -> list[int]:
        """The tokens."""
        known = self.sequence.tokens[self.start : self.start + self.count - self.drafts]
        return known + self.sequence.draft[: self.drafts] if self.drafts else known

    @property
    def scored(self) -> range:
        """Positions of its tokens whose logits are wanted for the prompt's log-probabilities."""
        wanted = self.sequence.request.prompt_logprobs
        return range(0) if wanted is None else wanted.wanted(self.start, self.count)

    @property
    def ends(self) -> bool:
        """Whether its sequence is finished once it has run: the last of a prompt that nothing is sampled after."""
        return self.sequence.request.max_tokens == 0 and self.start + self.count == len(self.sequence.tokens)

    @property
    def decodes(self) -> bool:
        """Whether it is a sequence's one next token and what is drafted behind it."""
        return self.count == 1 + self.drafts


@dataclass(eq=False, slots=True)
class HeldBlocks:
    """The blocks that a step in flight writes: of sequences that end meanwhile they are freed once it is done.

    Args:
        sequences: that have a row in the step.
        tables: of those that have ended.
    """

    sequences: frozenset[Sequence]
    tables: list[BlockTables] = field(default_factory=list)

    def release(self) -> None:
        """The step is done."""
        while self.tables:
            self.tables.pop().release()


class Scheduler:
    """Sequences that run and wait, both oldest first.

    At most ``max_num_batched_tokens`` sequences run even where ``max_num_seqs`` allows more, since each must
    be able to decode in every step.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool,
        swap: SwapSpace | None = None,
        offloading: PrefixOffloading | None = None,
    ) -> None:
        self.block_manager = block_manager
        self.swap = swap
        self.offloading = offloading
        self.fork_points = ForkPoints()
        self.max_running = min(max_num_seqs, max_num_batched_tokens)
        self.budget = max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.may_run: Callable[[Sequence], bool] = lambda sequence: True  # else others go first
        self.held: HeldBlocks | None = None  # by a step that was launched ahead
        self.num_preemptions = 0
        self.prefix_cache_queries = self.prefix_cache_hits = 0
        self._one_each: BlockCounts = (1,) * len(block_manager.groups)

    def add(self, request: Request) -> None:
        """Queue every sequence of a request."""
        for sequence in request.sequences:
            insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        if sequence.swapped is not None and self.swap is not None:
            self.swap.drop(sequence.swapped)
            sequence.swapped = None
        queue = self.waiting if sequence.block_tables is None else self.running
        at = bisect_left(queue, sequence.order, key=_order)
        if at < len(queue) and queue[at] is sequence:
            del queue[at]
            tables, done = sequence.block_tables, sequence.completion
            whole = tables is not None and done is not None and done.finish_reason == "length"
            if tables is not None and whole and self.fork_points.keep(tables):
                sequence.block_tables = None
            self._leave(sequence)

    def schedule(self, weights: WeightKeys) -> list[Chunk]:
        """The next step's chunks, oldest sequence first, their slots reserved; [] when nothing can run.

        Args:
            weights: keys of the weights that will run it; a sequence adds what is its own.
        """
        chunks: list[Chunk] = []
        missing = [sequence.remaining for sequence in self.running]
        spare = self.budget - missing.count(1)
        before = self.num_preemptions
        for at, remaining in enumerate(missing):
            if at >= len(self.running):
                break  # preempted on the way
            sequence = self.running[at]
            count = 1 if remaining == 1 else min(remaining, spare)
            count = sequence.chunk(count) if count > 0 else 0
            drafts = min(len(sequence.draft), spare) if remaining == 1 else 0
            if count and (chunk := self._reserve(sequence, count, drafts)):
                chunks.append(chunk)
                spare -= chunk.count - (remaining == 1)
        if self.waiting and spare > 0 and self.num_preemptions == before:
            self._admit(chunks, spare, weights)
        return chunks

    def schedule_ahead(self, rows: Rows) -> list[Chunk] | None:
        """The chunks of sequences whose next token a row of the step before samples; None without blocks for them all.

        Nothing is preempted for a token that is not known yet.
        """
        tables = [sequence.block_tables for _, sequence in rows if sequence.block_tables is not None]
        each_at_most = 2  # a new block, and a copy of one that is shared
        if not self._room((each_at_most * len(tables),) * len(self._one_each)):
            needed = _sum(*(one.blocks_needed(1) for one in tables))
            if not self._room(needed):
                return None
        return [
            Chunk(sequence, one.length, 1, one.reserve(1), samples=True, source=row)
            for (row, sequence), one in zip(rows, tables, strict=True)
        ]

    def fork_siblings(self, leader: Sequence) -> list[Sequence]:
        """Once a prompt is computed: the waiting sequences of the same request that now run on forks of it.

        As many as may run; the others keep waiting and compute the prompt themselves.
        """
        request = leader.request
        if request.prefilled:
            return []
        request.prefilled = True
        forked = []
        for sibling in request.sequences:
            if len(self.running) >= self.max_running:
                break
            if sibling is not leader and sibling.block_tables is None and sibling.completion is None:
                assert leader.block_tables is not None
                self._enter(sibling, leader.block_tables.fork())
                forked.append(sibling)
        return forked

    def check_integrity(self) -> None:
        """Raise AssertionError where queues, rows or blocks do not add up."""
        assert self.running == sorted(self.running, key=_order), "running is out of order"
        assert self.waiting == sorted(self.waiting, key=_order), "waiting is out of order"
        assert len(self.running) <= self.max_running, "too many sequences run"
        assert all(sequence.block_tables is None for sequence in self.waiting), "a waiting sequence holds blocks"
        assert all(sequence.swapped is None for sequence in self.running), "a running sequence is swapped out too"
        tables = [sequence.block_tables for sequence in self.running]
        assert all(tables), "a running sequence has no table"
        held = [] if self.held is None else self.held.tables
        live = [*(one for one in tables if one is not None), *self.fork_points.tables, *held]
        self.block_manager.check_integrity(live)
        if self.offloading is not None:
            self.offloading.check_integrity()

    def _reserve(self, sequence: Sequence, count: int, drafts: int = 0) -> Chunk | None:
        """The chunk of the next ``count`` tokens, preempting the youngest; None if that was itself.

        With ``drafts`` behind them where the blocks for those are free: nothing is preempted for a draft.
        """
        tables = sequence.block_tables
        assert tables is not None
        if drafts:
            try:
                slots = tables.reserve(count + drafts, drafts=True)
            except OutOfBlocks:
                pass
            else:
                return Chunk(sequence, tables.length, count + drafts, slots, True, drafts)
        while True:
            try:
                slots = tables.reserve(count)
            except OutOfBlocks:
                if self.fork_points.give_up():
                    continue
                victim = self.running[-1]
                if len(self.running) == 1:
                    raise RuntimeError("a sequence that was let in does not fit in the pool") from None
                self.preempt(victim)
                if victim is sequence:
                    return None
            else:
                start = tables.length
                last = start + count == len(sequence.tokens)
                return Chunk(sequence, start, count, slots, last and sequence.request.max_tokens > 0)

    def preempt(self, sequence: Sequence, unlimited: bool = False) -> None:
        """Make a running sequence wait, its state swapped out if there is room (``unlimited``: in any case)."""
        del self.running[bisect_left(self.running, sequence.order, key=_order)]
        if self.swap is not None and sequence.block_tables is not None:
            sequence.swapped = self.swap.swap_out(sequence.block_tables, unlimited)
        self._leave(sequence)
        insort(self.waiting, sequence, key=_order)
        self.num_preemptions += 1

    def _admit(self, chunks: list[Chunk], spare: int, weights: WeightKeys) -> None:
        """Let waiting sequences in, in order, while there are rows, budget and blocks for their tokens."""
        # Those that will fork a prompt being computed now have their rows kept.
        kept = sum(len(s.request.sequences) - 1 for s in self.running if not s.request.prefilled)
        # What runs already needs blocks for the rest of its prompts and soon one more each: others given them
        # would only be preempted again.
        owed = tuple(len(self.running) for _ in self._one_each)
        for one in self.running:
            assert one.block_tables is not None
            owed = _sum(owed, one.block_tables.blocks_needed(one.remaining, self.budget))
        at = 0
        while at < len(self.waiting) and spare > 0 and len(self.running) + kept < self.max_running:
            sequence = self.waiting[at]
            if sequence.index > 0 and not sequence.request.prefilled:
                at += 1  # its prompt is computed by the first of the request
                continue
            if not self.may_run(sequence):
                at += 1
                continue
            hit = looked_up = 0
            if sequence.swapped is not None and self.swap is not None:
                shape = sequence.swapped.shape
                missing = len(sequence.tokens) - len(shape.tokens)
                if self.running and not self._room(
                    _sum(owed, shape.blocks_needed(self.block_manager, missing, self.budget))
                ):
                    return
                tables, sequence.swapped = self.swap.swap_in(sequence.swapped), None
            else:
                key = sequence.prefix_key(weights) if self.enable_prefix_caching else None
                if self.fork_points.has(sequence.tokens, key):
                    if self.running and not self._room(_sum(owed, self._one_each)):
                        return
                    tables = self.fork_points.fork(sequence.tokens)
                    hit = tables.length
                else:
                    tables = self.block_manager.new_block_tables(key)
                    found = self._find_prefix(sequence, tables, owed)
                    if found is None:
                        return
                    hit = found
                looked_up = len(sequence.tokens) if key is not None else 0
            missing = len(sequence.tokens) - tables.length
            needed = tables.blocks_needed(missing, self.budget)
            self._enter(sequence, tables)
            self.prefix_cache_hits += hit
            if sequence.request.num_cached_tokens is None:
                sequence.request.num_cached_tokens, sequence.request.scheduled_time = hit, time.perf_counter()
            self.prefix_cache_queries += looked_up
            count = sequence.chunk(min(missing, spare))
            if count:
                chunk = self._reserve(sequence, count)
                assert chunk is not None
                chunks.append(chunk)
            spare = spare - count if count else 0
            owed = _sum(owed, needed, self._one_each)
            if not sequence.request.prefilled:
                kept += len(sequence.request.sequences) - 1

    def _find_prefix(self, sequence: Sequence, tables: BlockTables, owed: BlockCounts) -> int | None:
        """How many tokens of a sequence have state, which ``tables`` share now; None, and nothing, without room.

        What is offloaded is brought back once the sequence would run without it.
        """
        hit = tables.match_prefix(sequence.names, sequence.may_continue)
        if not self._lets_in(sequence, tables, owed):
            return None
        if self.offloading is not None and self.offloading.restore(tables, sequence.names, sequence.may_continue):
            tables.release()
            hit = tables.match_prefix(sequence.names, sequence.may_continue)
            if not self._lets_in(sequence, tables, owed):
                return None
        return hit

    def _lets_in(self, sequence: Sequence, tables: BlockTables, owed: BlockCounts) -> bool:
        """Whether there is room for the rest of a sequence, beside ``owed`` blocks; its tables are released if not."""
        missing = len(sequence.tokens) - tables.length
        if self.running and not self._room(_sum(owed, tables.blocks_needed(missing, self.budget))):
            tables.release()
            return False
        return True

    def _room(self, blocks: BlockCounts) -> bool:
        """Whether every group has so many free blocks."""
        return all(needed <= free for needed, free in zip(blocks, self.block_manager.num_free_blocks, strict=True))

    def _enter(self, sequence: Sequence, tables: BlockTables) -> None:
        del self.waiting[bisect_left(self.waiting, sequence.order, key=_order)]
        sequence.block_tables, sequence.num_known_blocks = tables, 0
        insort(self.running, sequence, key=_order)

    def _leave(self, sequence: Sequence) -> None:
        tables, sequence.block_tables = sequence.block_tables, None
        if tables is None:
            return
        if self.held is not None and sequence in self.held.sequences:
            self.held.tables.append(tables)
        else:
            tables.release()


def _sum(*needs: BlockCounts) -> BlockCounts:
    """Blocks per group, added up."""
    return tuple(map(sum, zip(*needs, strict=True)))
