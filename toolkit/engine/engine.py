"""Continuous batching over one patched model."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from toolkit.engine.adapters import ModelAdapters, new_adapters, weight_keys
from toolkit.engine.backend import Backend, PatchedModel
from toolkit.engine.capacity import chosen_max_model_len, new_offloading, new_state
from toolkit.engine.config import AUTO, EngineConfig
from toolkit.engine.decoding import Decoding
from toolkit.engine.detokenizer import Tokenizer
from toolkit.engine.live_requests import LiveRequests
from toolkit.engine.media import EncoderCache
from toolkit.engine.new_requests import NewRequests
from toolkit.engine.outputs import Completion, Delta
from toolkit.engine.params import SamplingParams
from toolkit.engine.prompts import Params, Prompt, Prompts, check_streamed, longest_sequence
from toolkit.engine.request import Request
from toolkit.engine.runner import ModelRunner
from toolkit.engine.saved_prefixes import PrefixFiles, SavedPrefixes
from toolkit.engine.scheduler import Scheduler
from toolkit.engine.speculation.drafters import new_speculation
from toolkit.engine.stats import engine_stats
from toolkit.engine.steps import Steps
from toolkit.engine.swap import SwapSpace
from toolkit.errors import ToolkitError
from toolkit.state import WeightKeys


class Engine:
    """Generates from ``model`` with many requests in flight, over paged state.

    An engine is single-threaded: call all of its methods from one thread. ``AsyncEngine`` puts one on a thread and
    serves any number of others. Use it as a context manager, or ``close`` it.

    Args:
        model: a Hugging Face causal language model, which is patched here if it is not yet (nothing else of it
            changes), or a ``Backend``.
        tokenizer: a Hugging Face tokenizer; None takes and returns token ids only.
        max_num_seqs: sequences in a step.
        max_num_batched_tokens: tokens in a step. It also bounds the sequences, since each needs one.
        max_model_len: tokens of prompt and completion together; None for what the model was made for, which is also the
            most, except for dynamic NTK in fast mode. "auto" for as many of those as one sequence's state has room for.
        block_size: tokens of state in a block.
        num_blocks: blocks of state (vLLM's num_gpu_blocks_override); None for enough for max_num_seqs sequences of
            max_model_len, within a part of the device's memory.
        swap_space: GiB of host memory for preempted sequences, computed again without room. None for no bound.
        enable_prefix_caching: reuse the state of common prefixes.
        kv_host_space: GiB of host memory for blocks of cached prefixes that make room for others, least recently used
            out first; a later prompt gets them back. None for no bound, 0 for none.
        kv_disk_space: likewise of disk, for what has no room in host memory. The files end with the engine.
        kv_disk_folder: in which ``kv_disk_space`` makes a folder.
        processor: the model's own, for prompts with pictures that it has not seen yet; its tokenizer is the default.
        encoder_cache_size: tokens of encoded pictures that are kept for requests with the same picture.
        media_space: GiB of pictures, as the processor makes them, of all requests that wait or run; None for no bound.
        enable_return_routed_experts: keep the experts that each token is routed to beside its other state, and return
            them as ``Completion.routed_experts``.
        enable_return_selected_keys: likewise the keys that sparse attention selects (``Completion.selected_keys``).
        speculative_config: how tokens are drafted, such as ``{"method": "ngram", "num_speculative_tokens": 5}``, see
            ``SpeculativeConfig``; None to draft none. It changes no token and no log-probability.
        kv_cache_dtype: "int8" keeps keys and values in eight bits, in training too; "auto": what the patch says.
        kinds: state kinds in the place of others, such as {"full": "int8"}; None for those that the layers ask for.
        max_loras: adapters in the model at a time, of those that ``load_adapter`` took in; the least recently used ones
            wait in host memory. None for any number.
        max_cpu_loras: such adapters in memory, those in the model included; others are read again from their folders.
            None for any number.
        async_scheduling: launch a decode step before the tokens of the one before it are read, which changes neither
            tokens nor log-probabilities; a step may then be in flight between two calls, see ``synchronize``. None for
            on a GPU alone: on a CPU host and model share the cores.
        numerics: "fast" or "bitwise", see ``toolkit.numerics``; None for the device's default, or for the mode that is
            already patched in.
        seed: of the generator that seeds requests without a seed; None for one from the operating system.

    Raises:
        ToolkitError: for an unknown argument or a bad value.
    """

    def __init__(
        self,
        model: nn.Module | Backend,
        tokenizer: Tokenizer | None = None,
        *,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | str | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        swap_space: float | None = 0,
        enable_prefix_caching: bool = True,
        kv_host_space: float | None = 0,
        kv_disk_space: float | None = 0,
        kv_disk_folder: str | None = None,
        processor: Any = None,
        encoder_cache_size: int = 16384,
        media_space: float | None = 4,
        enable_return_routed_experts: bool = False,
        enable_return_selected_keys: bool = False,
        kinds: dict[str, str] | None = None,
        kv_cache_dtype: str = "auto",
        speculative_config: dict[str, Any] | None = None,
        max_loras: int | None = None,
        max_cpu_loras: int | None = None,
        async_scheduling: bool | None = None,
        numerics: str | None = None,
        seed: int | None = None,
        **unknown: Any,
    ) -> None:
        named = locals()  # first of all: these are the arguments alone
        self.config = EngineConfig.check(**{name: named[name] for name in EngineConfig.names()}, **unknown)
        self.backend: Backend = model if isinstance(model, Backend) else PatchedModel(model, numerics, kv_cache_dtype)
        self.vocab_size = self.backend.vocab_size
        self.processor = processor
        self.tokenizer = tokenizer = tokenizer if tokenizer is not None else getattr(processor, "tokenizer", None)
        self.max_model_len = chosen_max_model_len(self.backend, max_model_len)
        running = min(max_num_seqs, max_num_batched_tokens)
        self.pool, self.block_manager = new_state(self.backend, self.config, running, self.max_model_len)
        if max_model_len == AUTO:
            self.max_model_len = longest_sequence(self.max_model_len, self.block_manager)[0]
        self.offloading = new_offloading(self.config, self.pool, self.block_manager)
        self.scheduler = Scheduler(
            self.block_manager,
            max_num_seqs,
            max_num_batched_tokens,
            enable_prefix_caching,
            SwapSpace(self.pool, self.block_manager, self.config.swap_bytes),
            self.offloading,
        )
        encode: Any = getattr(self.backend, "encode", None)  # never called for a backend that takes no pictures
        self.encoder_cache = EncoderCache(encode, encoder_cache_size)
        split = getattr(self.backend, "group", None) is not None  # other ranks make each call's step, and no other
        ahead = not split and (self.backend.device.type == "cuda" if async_scheduling is None else async_scheduling)
        self.runner = ModelRunner(
            self.backend, self.pool, self.scheduler.max_running, self.max_model_len, ahead, self.scheduler.budget
        )
        self.speculation = new_speculation(self.config, self.backend, self.pool, running, self.max_model_len)
        self.adapters = new_adapters(self.backend, self.scheduler, self.config)
        if self.adapters is not None:
            self.runner.adapter_ids = self.adapters.ids
        self.requests = LiveRequests(self.backend, self.scheduler, self.pool, self.speculation, self.adapters)
        decoding = Decoding(self.runner, self.scheduler, self.speculation)
        self._steps = Steps(decoding, self.requests, self.encoder_cache, ahead, raises=split)
        self._new_requests = NewRequests(
            self.backend, tokenizer, processor, self.scheduler, self.max_model_len, seed, self.adapters
        )
        self.grammars = self._new_requests.grammars  # any thread may compile one
        self._saved_prefixes = SavedPrefixes(self.backend, self.pool, self.block_manager, self.offloading)
        self._weights = weight_keys(self.backend, self.adapters)
        self.is_closed = False
        self.is_sleeping = False

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompts: Prompts, params: Params = None) -> list[Completion]:
        """Completions of all prompts, in order, ``n`` per prompt.

        Args:
            prompts: a text, a list of token ids, a prompt with pictures (``toolkit.engine.prompts.Prompt``), or a list
                of those.
            params: one for all prompts, or one per prompt.

        Raises:
            ToolkitError: if any prompt cannot run; nothing is started then. What fails later ends with "error".
        """
        requests = self._make(prompts, params, deque())
        for _ in self._run(requests):
            pass
        return [completion for request in requests for completion in request.completions]

    def stream(self, prompts: Prompts, params: Params = None) -> Iterator[Delta]:
        """The deltas of ``generate``, as each step adds them. Closing the iterator cancels the rest."""
        check_streamed(params)
        return self._run(self._make(prompts, params, deque()))

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue one prompt (text or token ids) and return its request id. Deltas come from ``step``."""
        return self.submit_batch([prompt], params)[0]

    def submit_batch(self, prompts: Prompts, params: Params = None) -> list[int]:
        """Queue all prompts, or none if any cannot run, and return their request ids. Deltas come from ``step``."""
        requests = self._make(prompts, params, None)
        self._queue(requests)
        return [request.request_id for request in requests]

    def cancel(self, request_id: int) -> bool:
        """End a request's unfinished completions with "cancelled"; False if there is no such request (any more)."""
        request = self.requests.by_id.get(request_id)
        if request is not None:
            self.requests.end(request, "cancelled")
            self._steps.drop_ended()
        return request is not None

    def step(self) -> list[Delta]:
        """Run one step; return what it added to requests made by ``submit``: a delta per sequence that grew or ended.

        What fails ends its requests with "error"; this does not raise.
        """
        self._advance()
        return self.requests.take()

    def take_deltas(self) -> list[Delta]:
        """Deltas of what has ended between steps: it was cancelled, or ran out of time. ``step`` returns them too."""
        self.requests.end_expired()
        self._steps.drop_ended()
        return self.requests.take()

    def synchronize(self) -> None:
        """Collect the step in flight, if there is one; ``step`` or ``take_deltas`` returns its deltas.

        Before weights are written while requests are under way, on another stream than the engine's or for the next
        token to be of the new ones: a step in flight has the weights that it was launched with, and says so.
        """
        self._steps.synchronize()

    @property
    def runs_ahead(self) -> bool:
        """Whether steps may be launched ahead; may be set."""
        return self._steps.ahead

    @runs_ahead.setter
    def runs_ahead(self, ahead: bool) -> None:
        self._steps.ahead = ahead

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to run or to deliver."""
        return bool(self.requests.by_id or self.requests.pending)

    def seconds_left(self) -> float | None:
        """Seconds until ``step`` ends a request for its ``timeout``, 0 where it is over; None where none has one."""
        return self.requests.seconds_left()

    @property
    def eos(self) -> frozenset[int]:
        """Tokens that end a text: the model's, of its configurations, and the tokenizer's."""
        return self._new_requests.eos

    @property
    def max_sequence_len(self) -> int:
        """Most tokens of prompt and completion together: ``max_model_len``, or fewer where the blocks hold fewer."""
        return longest_sequence(self.max_model_len, self.block_manager)[0]

    def stats(self) -> dict[str, float]:
        """Gauges and totals under vLLM's names: see ``engine_stats``.

        Beside those generation_tokens and num_steps since the engine was made, and weight_version of the last step.
        """
        return engine_stats(
            self.scheduler,
            self.encoder_cache,
            self.speculation,
            generation_tokens=self._steps.num_tokens,
            num_steps=self._steps.count,
            weight_version=self._weights.version,
        )

    def load_adapter(self, lora_name: str, lora_path: str | Path, load_inplace: bool = False) -> None:
        """Take in the adapter of a PEFT folder, LoRA or DoRA, for requests with this ``lora_name``.

        Args:
            lora_name: that no other adapter has.
            lora_path: a folder with adapter_config.json and adapter_model.safetensors.
            load_inplace: take the place of a loaded adapter of this name, for requests under way too.

        Raises:
            ToolkitError: for a name that is taken, or a folder that is no adapter of this model whose layers are fused.
        """
        self.synchronize()
        self._adapters(lora_name).load(lora_name, lora_path, load_inplace)

    def unload_adapter(self, lora_name: str) -> None:
        """Let no more requests choose a loaded adapter; those under way finish. ToolkitError if none has the name."""
        self._adapters(lora_name).unload(lora_name)

    def _adapters(self, name: str) -> ModelAdapters:
        self._check_open()
        if self.adapters is None:
            raise ToolkitError(f"lora_name must be None for this backend, got {name!r}.")
        return self.adapters

    def sleep(self) -> None:
        """Give the memory of all state to others, such as a training step, until ``wake``.

        Cached prefixes are forgotten but for offloaded ones; sequences under way are swapped out and later continue
        where they were, under the weights of then. Requests may be submitted meanwhile; ``step`` runs nothing. Does
        nothing when asleep.
        """
        if self.is_sleeping or self.is_closed:
            return
        self.synchronize()
        for sequence in list(self.scheduler.running):
            self.scheduler.preempt(sequence, unlimited=True)
        self.block_manager.reset_prefix_cache()
        self.encoder_cache.clear()
        self.pool.sleep()
        if self.speculation is not None:
            self.speculation.drafter.sleep()
        self.is_sleeping = True

    def wake(self) -> None:
        """Take the memory back after ``sleep``."""
        if self.is_sleeping and not self.is_closed:
            self.pool.wake()
            self.is_sleeping = False

    def see_weights(self) -> int:
        """The weight version; where it has moved, cached state of other weights is dropped. Steps do it themselves."""
        self._steps.commit()
        weights = weight_keys(self.backend, self.adapters)
        if weights != self._weights:
            self._weights = weights
            self.block_manager.drop_outdated(weights)
            self.encoder_cache.drop_outdated(weights)
            if self.offloading is not None:
                self.offloading.drop_outdated(weights)
        return weights.version

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes that no sequence holds, offloaded ones too."""
        self.block_manager.reset_prefix_cache()
        if self.offloading is not None:
            self.offloading.clear()

    def save_prefixes(self, folder: str | Path) -> PrefixFiles:
        """Write the cached prefixes of the current weights, offloaded ones too: see ``SavedPrefixes.save``."""
        self._check_open()
        self.see_weights()
        return self._saved_prefixes.save(folder, self._weights)

    def load_prefixes(self, folder: str | Path) -> PrefixFiles:
        """Read what ``save_prefixes`` wrote, perhaps in another process: see ``SavedPrefixes.load``."""
        self._check_open()
        self.see_weights()
        return self._saved_prefixes.load(folder, self._weights)

    def check_integrity(self) -> None:
        """Raise AssertionError where queues or blocks do not add up. Not for hot paths."""
        self.scheduler.check_integrity()

    def close(self) -> None:
        """Cancel what is left, take no further requests and free the pool. Does nothing when closed."""
        if self.is_closed:
            return
        self.is_closed = True
        self.requests.close()
        self._steps.close()
        self.scheduler.swap = None
        if self.offloading is not None:
            self.offloading.close()
        if self.speculation is not None:
            self.speculation.drafter.close()
        del self.pool, self.runner, self.backend, self._saved_prefixes

    def _make(self, prompts: Prompts, params: Params, sink: deque[Delta] | None) -> list[Request]:
        """Requests that are not queued; raises ToolkitError where one of the prompts cannot run."""
        return self._new_requests.make(prompts, params, sink, self.requests.media_bytes, self.config.media_space)

    def _check_open(self) -> None:
        if self.is_closed:
            raise ToolkitError("the engine is closed; make another one.")

    def _queue(self, requests: list[Request]) -> None:
        self._check_open()
        for request in requests:
            wrong = self._new_requests.outside_vocabulary(request.prompt)
            message = f"prompt must have token ids from 0 to {self.vocab_size - 1}, got {wrong}."
            self.requests.add(request, None if wrong is None else message)

    def _run(self, requests: list[Request]) -> Iterator[Delta]:
        """Step until the requests are finished, yielding their deltas; cancel them if the caller leaves."""
        sink = requests[0].sink if requests else None
        self._queue(requests)
        try:
            while sink or not all(request.finished for request in requests):
                if not sink:
                    if self.is_sleeping:
                        raise ToolkitError("the engine is asleep; call wake() first.")
                    self._advance()
                while sink:
                    yield sink.popleft()
        finally:
            for request in requests:
                self.cancel(request.request_id)

    def _advance(self) -> None:
        self.requests.end_expired()
        if not (self.is_closed or self.is_sleeping):
            self._steps.run(self._bring_weights)

    def _bring_weights(self) -> WeightKeys:
        """The keys of the weights, with the adapters of the next step among them."""
        self.requests.bring_adapters(self.see_weights)
        return self._weights
