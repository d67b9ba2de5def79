"""A model that is a pure function of the whole token history, which it reads back through the block tables.

Any mistake in paging, copying, chunking or preemption changes the history, and with it the tokens; the
stand-in also checks that what it reads back is positions 0, 1, 2, ... of one sequence.
"""

import copy
import functools
import random
import zlib
from collections import deque

import torch

from toolkit.engine.params import SamplingParams
from toolkit.engine.request import Request
from toolkit.engine.sampler import Sampler
from toolkit.ops.state_write import state_write
from toolkit.state import PagedContext, PagedRows, PrefixKey, RaggedBatch, StateSpec

VOCAB = 61
EOS = 0
POISON = 60
"""A history with this token in it has NaN logits."""


@functools.lru_cache(maxsize=100_000)
def logits_of(history: tuple[int, ...], version: int = 0) -> torch.Tensor:
    if POISON in history:
        return torch.full((VOCAB,), torch.nan)
    generator = torch.Generator().manual_seed(zlib.crc32(repr((history, version)).encode()))
    logits = 2 * torch.randn(VOCAB, generator=generator)
    logits[POISON] = -torch.inf
    return logits


class HistoryModel:
    """Layer 0 remembers each token (key) and its position (value), layer 1 the version that wrote it."""

    device = torch.device("cpu")
    dtype = torch.float32
    vocab_size = VOCAB
    eos = frozenset([EOS])

    def __init__(self, max_model_len: int = 256) -> None:
        self.max_model_len = max_model_len
        self.weights = 0
        self.failure: BaseException | None = None
        self.versions_read: list[set[int]] = []
        self.batches: list[RaggedBatch] = []

    def layers(self) -> list[StateSpec]:
        return [StateSpec(layer, "full", ((1, 1), (1, 1))) for layer in range(2)]

    def version(self) -> int:
        return self.weights

    def prefix_key(self) -> PrefixKey:
        return PrefixKey(self.weights)

    def decode_size(self, sequences: int) -> int:
        return sequences + sequences % 3

    def forward(self, context: PagedContext, rows: torch.Tensor) -> torch.Tensor:
        batch, pool = context.batch, context.pool
        self.batches.append(copy.deepcopy(batch))  # the runner writes the next step over it
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        (view,) = batch.views
        assert isinstance(view, PagedRows)
        taken = [slot for slot in view.slot_mapping.tolist() if slot >= 0]
        assert len(taken) == int(batch.query_offsets[-1]), "a token has no slot, or padding has one"
        assert len(set(taken)) == len(taken), "two tokens share a slot"
        (tokens, positions), (versions, _) = (state.rows for state in pool.states)
        for store, written in (
            (tokens, batch.tokens.float()),
            (positions, batch.positions.float()),
            (versions, torch.full((len(batch.tokens),), float(self.weights))),
        ):
            state_write(store, written[:, None, None], view.slot_mapping)
        found = []
        for row in rows.tolist():
            owner = int(batch.sequence_ids[row])
            last = int(batch.query_offsets[owner + 1]) - 1
            length = int(batch.kv_lengths[owner]) - (last - row)
            pages = view.block_tables[owner]
            at = torch.arange(length)
            slots = pages[at // pool.block_size] * pool.block_size + at % pool.block_size
            assert torch.equal(positions[slots, 0, 0], at.float()), "positions are out of order"
            self.versions_read.append({int(one) for one in versions[slots, 0, 0]})
            found.append(logits_of(tuple(int(one) for one in tokens[slots, 0, 0]), self.weights))
        return torch.stack(found) if found else torch.empty(0, VOCAB)


def make_request(
    prompt: list[int], params: SamplingParams, request_id: int = 0, seed: int = 0, **given: object
) -> Request:
    defaults: dict = {
        "eos": frozenset([EOS]),
        "max_tokens": params.max_tokens,
        "seed": seed if params.seed is None else params.seed,
        "decoder": None,
        "sink": deque(),
    }
    return Request(request_id, 0, prompt, params, **(defaults | given))


def oracle(prompt: list[int], params: SamplingParams) -> list[tuple[list[int], list[float], list[float], str]]:
    """(tokens, logprobs, sampling logprobs, finish reason) of each of the ``n``, one at a time, no engine."""
    found = []
    for sequence in make_request(prompt, params).sequences:
        while sequence.completion is None:
            sampled = Sampler().sample(logits_of(tuple(sequence.tokens))[None], [sequence])
            if sampled.errors[0] is not None:
                sequence.finish("error", error=sampled.errors[0])
            else:
                sequence.accept(
                    sampled.token_ids[0],
                    sampled.logprobs[0],
                    sampled.sampling_logprobs[0],
                    sampled.top_logprobs[0],
                    0,
                )
        done = sequence.completion
        found.append((done.token_ids, done.logprobs, done.sampling_logprobs, done.finish_reason))
    return found


def random_prompts(rng: random.Random, count: int) -> list[list[int]]:
    shared = [rng.randrange(1, POISON) for _ in range(24)]
    return [
        shared[: rng.randint(1, 24)]
        if rng.random() < 0.5
        else [rng.randrange(1, POISON) for _ in range(rng.randint(1, 24))]
        for _ in range(count)
    ]


def result(completion):
    return completion.token_ids, completion.logprobs, completion.sampling_logprobs, completion.finish_reason
