"""Grammars of requests, compiled once each."""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.engine.grammar.library import library
from toolkit.engine.grammar.matcher import NO_TOKEN, TOO_DEEP, Matcher, explained, mask_words
from toolkit.engine.grammar.params import StructuredOutputsParams
from toolkit.engine.grammar.specs import lark
from toolkit.engine.grammar.terms import LarkTerms
from toolkit.engine.grammar.vocabulary import Vocabulary
from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from llguidance import LLMatcher

CACHED = 256
"""Grammars that are kept compiled."""


class CompiledGrammar:
    """A grammar at its beginning.

    Args:
        start: llguidance's state.
        vocabulary: that it was compiled for.
    """

    def __init__(self, start: "LLMatcher", vocabulary: Vocabulary) -> None:
        self._start = start
        self._vocabulary = vocabulary

    def matcher(self, stop_ids: Collection[int]) -> Matcher:
        """A matcher at the beginning; ``stop_ids`` end an output besides the end-of-text tokens."""
        eos = self._vocabulary.eos
        others = [token for token in stop_ids if token < self._vocabulary.size and token not in eos]
        return Matcher(self._start.deep_copy(), eos[0], others)


class GrammarCompiler:
    """Compiles the grammars of one tokenizer, and keeps those asked for last. Any thread may ask.

    Args:
        tokenizer: of texts.
        vocab_size: of the model's logits.
        eos: tokens that end a text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, eos
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[StructuredOutputsParams, CompiledGrammar] = OrderedDict()
        self._compiling: dict[StructuredOutputsParams, Future[CompiledGrammar]] = {}

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """The grammar of ``params``; a thread waits for another one that compiles the same, and for no other.

        Raises:
            ToolkitError: what cannot be enforced, by its name; the library is missing; the tokenizer cannot be read.
        """
        with self._lock:
            found = self._compiled.get(params)
            if found is not None:
                self._compiled.move_to_end(params)
                return found
            job = self._compiling.get(params)
            if job is None:
                mine = self._compiling[params] = Future()
        if job is not None:
            return job.result()
        try:
            found = CompiledGrammar(self._start(params), self._read_vocabulary())
            mine.set_result(found)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._compiling[params]
                if found is not None:
                    self._compiled[params] = found
                    if len(self._compiled) > CACHED:
                        self._compiled.popitem(last=False)
        return found

    def terms(self, trigger: str | None = None) -> LarkTerms:
        """Terms of a grammar for this tokenizer, to put together. Raises ToolkitError as ``compile`` does."""
        return LarkTerms(self._read_vocabulary().special, trigger)

    def _read_vocabulary(self) -> Vocabulary:
        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer, self._vocab_size, self._eos)
            return self._vocabulary

    def _start(self, params: StructuredOutputsParams) -> "LLMatcher":
        vocabulary = self._read_vocabulary()
        limits = library().LLParserLimits(verbose_errors=False)
        row = np.zeros(mask_words(self._vocab_size), dtype=np.int32)
        try:
            text = lark(params, vocabulary.special)
            start: LLMatcher = library().LLMatcher(vocabulary.tokens, text, log_level=0, limits=limits)
            if not start.is_error():
                start.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        except RecursionError:
            raise _refused(params, TOO_DEEP) from None
        except BaseException as panic:  # Rust's panics are no Exception
            if type(panic).__name__ != "PanicException":
                raise
            raise _refused(params, str(panic)) from None
        # A warning is about a keyword that was left out.
        wrong = [start.get_error()] if start.is_error() else start.get_grammar_warnings()
        if wrong:
            raise _refused(params, wrong[0])
        if not row.any():
            raise _refused(params, NO_TOKEN)
        return start


def _refused(params: StructuredOutputsParams, reason: str) -> ToolkitError:
    reason = explained(reason)
    keywords = re.search(r"Unimplemented keys: (\[.*\])", reason)
    names = json.loads(keywords.group(1)) if keywords is not None else []
    if reason.startswith("oneOf "):
        names = ["oneOf"]
        reason = "whether two of its schemas may hold at once is not known"
    if names:
        about = f" ({reason})" if keywords is None else ""
        return ToolkitError(
            f"structured_outputs must not have {' and '.join(map(repr, names))} in a JSON schema, which cannot be "
            f"enforced{about}."
        )
    return ToolkitError(
        f"structured_outputs.{params.kind} must be what can be enforced, got one that is not ({reason})."
    )
