"""Requests from what ``generate`` and ``submit`` were given."""

import itertools
from collections import deque
from typing import Any

import numpy as np

from toolkit.engine.adapters import ModelAdapters
from toolkit.engine.adjustments import Adjustments
from toolkit.engine.backend import Backend
from toolkit.engine.detokenizer import Decoder, Tokenizer
from toolkit.engine.grammar.compiler import GrammarCompiler
from toolkit.engine.media import PromptMedia, check_media_space
from toolkit.engine.outputs import Delta
from toolkit.engine.params import SamplingParams
from toolkit.engine.prompts import (
    Params,
    Prompt,
    Prompts,
    check_params,
    check_prompt,
    longest_sequence,
    outside_vocabulary,
    read_media,
    split_prompts,
)
from toolkit.engine.request import Request
from toolkit.engine.scheduler import Scheduler
from toolkit.errors import ToolkitError

DECODERS = 64
"""Kinds of decoding that are kept."""


class NewRequests:
    """Checks prompts and makes the requests of one engine.

    Args:
        backend: the model.
        tokenizer: of texts; None for token ids only.
        processor: of prompts with pictures; None for those that a processor has read.
        scheduler: that will run them.
        max_model_len: most tokens of prompt and completion together.
        seed: of the generator that seeds requests without a seed; None for one from the operating system.
        adapters: that requests choose; None for a backend without.

    Attributes:
        eos: tokens that end a text.
        grammars: of structured outputs.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None,
        processor: object,
        scheduler: Scheduler,
        max_model_len: int,
        seed: int | None,
        adapters: ModelAdapters | None = None,
    ) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._processor = processor
        self._scheduler = scheduler
        self._max_model_len = max_model_len
        # Ranks of one model have one seed.
        entropy = np.random.SeedSequence().entropy if seed is None else seed
        self._seeds = np.random.default_rng(getattr(backend, "agree", _same)(entropy))
        self._adapters = adapters
        self._ids = itertools.count()
        self.eos = backend.eos | _eos_of(tokenizer)
        self.grammars = GrammarCompiler(tokenizer, backend.vocab_size, self.eos)
        self._decoders: dict[tuple[bool, tuple[int, ...]], Decoder] = {}
        self._rotary_length = getattr(backend, "rotary_length", lambda declared: None)

    def make(
        self, prompts: Prompts, params: Params, sink: deque[Delta] | None, held: int = 0, space: float | None = None
    ) -> list[Request]:
        """Requests, all of them checked, not queued.

        Args:
            prompts: as ``Engine.generate`` takes them.
            params: one for all prompts, or one per prompt.
            sink: where their deltas go; None for those that ``Engine.step`` returns.
            held, space: bytes of pictures of other requests, and GiB of those of all.

        Raises:
            ToolkitError: if any prompt cannot run.
        """
        given = split_prompts(prompts)
        chosen = check_params(params, len(given))
        longest = longest_sequence(self._max_model_len, self._scheduler.block_manager)
        read: list[tuple[Prompt, PromptMedia | None]] = []
        added = 0
        for prompt, one in zip(given, chosen):  # one by one: a processor makes tensors of pictures that are far larger
            found = read_media(prompt, self._backend, self._processor, longest)
            if found[1] is not None:
                if one.truncate_prompt_tokens is not None:
                    got = one.truncate_prompt_tokens
                    raise ToolkitError(f"truncate_prompt_tokens must be None for a prompt with pictures, got {got}.")
                added += found[1].num_bytes
                check_media_space(held, added, space)
                self._check_blocks(found[1])
            read.append(found)
        pictures = [media for _, media in read]
        self._check_adapters(chosen, pictures)
        ready = [
            check_prompt(prompt, one, self._tokenizer, self._max_model_len, self._scheduler.block_manager)
            for (prompt, _), one in zip(read, chosen)
        ]
        for tokens, _ in ready:
            self._check_counted(tokens)
        grammars = [None if one.form is None else self.grammars.compile(one.form) for one in chosen]
        adjustments = {
            id(one): Adjustments.of(one, self._tokenizer, self._backend.vocab_size) for one in chosen
        }  # of many prompts the parameters are often one object
        return [
            Request(
                next(self._ids),
                at,
                tokens,
                one,
                eos=self.eos,
                max_tokens=most,
                seed=int(self._seeds.integers(2**63)) if one.seed is None else one.seed,
                decoder=None if self.outside_vocabulary(tokens) is not None else self._decoder(one),
                sink=sink,
                rotary_length=self._rotary_length(len(tokens) + most),
                media=media,
                keeps_prompt=getattr(self._backend, "keeps_prompts", False),
                grammar=grammar,
                adjustments=adjustments[id(one)],
            )
            for at, ((tokens, most), one, media, grammar) in enumerate(zip(ready, chosen, pictures, grammars))
        ]

    def _decoder(self, params: SamplingParams) -> Decoder | None:
        """What decodes the texts of a request; kinds of requests share one."""
        if self._tokenizer is None:
            return None
        kind = params.skip_special_tokens, tuple(params.kept_special_tokens or ())
        if kind not in self._decoders:
            if len(self._decoders) == DECODERS:
                self._decoders.clear()
            self._decoders[kind] = Decoder(self._tokenizer, *kind)
        return self._decoders[kind]

    def outside_vocabulary(self, tokens: list[int]) -> int | None:
        """The first token id that no embedding has, if there is one."""
        return outside_vocabulary(tokens, self._backend.vocab_size)

    def _check_adapters(self, params: list[SamplingParams], media: list[PromptMedia | None]) -> None:
        """Raise ToolkitError for an adapter that a request cannot choose."""
        for name in dict.fromkeys(one.lora_name for one in params):
            if name is not None and self._adapters is None:
                raise ToolkitError(f"lora_name must be None for this backend, got {name!r}.")
            if name is not None and self._adapters is not None:
                self._adapters.check(name)
                if any(one.lora_name == name and pictures is not None for one, pictures in zip(params, media)):
                    self._adapters.check_text_alone(name)

    def _check_counted(self, tokens: list[int]) -> None:
        """Raise ToolkitError for a token that the model takes for padding and gives no position."""
        token = getattr(self._backend, "uncounted_token", None)
        if token is not None and token in tokens:
            raise ToolkitError(
                f"prompt must not contain token {token}, got one: the model takes it for padding and gives it no "
                "position, which a ragged batch would."
            )

    def _check_blocks(self, media: PromptMedia) -> None:
        """Raise ToolkitError for a picture that no step can take whole while all other sequences decode."""
        most = self._scheduler.budget - self._scheduler.max_running + 1
        longest = max((end - first for first, end in media.blocks), default=0)
        if longest > most:
            raise ToolkitError(
                f"prompt must have pictures of <= {most} tokens that see each other, max_num_batched_tokens - "
                f"max_num_seqs + 1, got {longest}; set a larger max_num_batched_tokens."
            )


def _eos_of(tokenizer: Tokenizer | None) -> frozenset[int]:
    token = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if token is None else frozenset([token])


def _same(value: Any) -> Any:
    return value
