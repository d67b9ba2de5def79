"""``LLM``: a model, its tokenizer and its engine, for scripts that have all of their prompts at hand."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from toolkit.chat import prompt_token_ids
from toolkit.engine import Completion, Engine, SamplingParams
from toolkit.engine.pooling import Pooled, PoolerConfig, PoolingEngine, PoolingParams
from toolkit.engine.pooling.params import pooling_params_of
from toolkit.engine.pooling.texts import ScorePlan, plain_prompt, read_inputs
from toolkit.engine.prompts import Params, Prompt, Prompts, check_params, split_prompts
from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.llm.beam_search import BeamSearchOutput, BeamSearchParams, beam_search
from toolkit.llm.chats import chat_prompt, conversations
from toolkit.llm.lora_request import Adapters, with_adapters
from toolkit.llm.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    completion_output,
    prompt_logprobs,
)
from toolkit.llm.progress import Bar, progress
from toolkit.loading import (
    RUNNERS,
    choose_runner,
    find_source,
    load_model,
    load_processor,
    sampling_defaults,
    with_draft_model,
)

Conversation = Sequence[Mapping[str, Any]]
PoolParams = PoolingParams | Sequence[PoolingParams] | None
Request = TypeVar("Request")


class LLM:
    """Generates, or embeds and scores, with one model; the names are those of vLLM's class.

    >>> llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> llm.generate(["def main():"], SamplingParams(max_tokens=32))[0].outputs[0].text

    Call it from one thread. ``close`` it, or use it as a context manager.

    Args:
        model: a folder, a run, a GGUF file or a repository of the Hub as for ``toolkit.loading.load_model``; or a
            Hugging Face model, which is patched.
        tokenizer: of the model; None for the one beside it (of a model that is given as a module: for token ids alone).
        runner: "generate", "pooling" (embeddings, scores, classes), or "auto" for what the checkpoint is for: its
            architecture, or files that say how it is pooled.
        dtype: of the weights: float32, bfloat16, float16 or float64.
        device: such as "cpu" or "cuda".
        revision: branch, tag or commit of a repository.
        trust_remote_code: run Python code that comes with the checkpoint.
        pooler_config: defaults of a pooling model, in the place of those of its files.
        generation_config: "auto" for the sampling defaults of the model, "vllm" for none, or a folder.
        processor: of images; None for the one beside the model, where there is one.
        limits: keyword arguments of ``Engine``, or of ``PoolingEngine``. The model of ``speculative_config`` may be a
            name, as ``model`` is.

    Raises:
        ToolkitError: what is missing or does not fit, in one sentence.
    """

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: Any = None,
        *,
        runner: str = "auto",
        dtype: str = "float32",
        device: str = "cpu",
        revision: str | None = None,
        trust_remote_code: bool = False,
        pooler_config: PoolerConfig | dict[str, Any] | None = None,
        generation_config: str = "auto",
        processor: Any = None,
        **limits: Any,
    ) -> None:
        settings: dict[str, Any] = {}
        module: Any = model
        if not isinstance(model, nn.Module):
            source = find_source(model, revision=revision, trust_remote_code=trust_remote_code)
            runner, settings = choose_runner(source, runner)
            module, own = load_model(
                model, dtype, device, revision=revision, trust_remote_code=trust_remote_code, runner=runner
            )
            tokenizer = own if tokenizer is None else tokenizer
            if processor is None and runner == "generate":
                with suppress(ToolkitError):  # prompts with images are refused then
                    processor = load_processor(source)
        elif runner not in ("auto", *RUNNERS):
            raise ToolkitError(must_be_one_of("runner", runner, ("auto", *RUNNERS)))
        elif runner == "auto":
            runner = "pooling" if model.get_output_embeddings() is None else "generate"  # type: ignore[operator]
        self.runner = runner
        self.tokenizer = tokenizer
        self._ids = itertools.count()
        self._defaults: dict[str, Any] = {}
        if runner == "generate":
            if pooler_config is not None:
                raise ToolkitError(f"pooler_config must be None for runner 'generate', got {pooler_config!r}.")
            self._defaults = sampling_defaults(module, generation_config)
            limits = with_draft_model(limits, dtype, device)
            self._engine: Engine | PoolingEngine = Engine(module, tokenizer, processor=processor, **limits)
            return
        longest = settings.pop("max_model_len", None)
        if longest is not None:
            limits.setdefault("max_model_len", longest)
        config = PoolerConfig.of(pooler_config, PoolerConfig(**settings))
        self._engine = PoolingEngine(module, pooler_config=config, **limits)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory of the engine's state back."""
        if isinstance(self._engine, Engine):
            self._engine.close()

    @property
    def engine(self) -> Engine:
        """The engine of a model that generates. Raises ToolkitError for another."""
        if not isinstance(self._engine, Engine):
            raise ToolkitError("runner must be 'generate' to generate, got 'pooling': LLM(model, runner='generate').")
        return self._engine

    @property
    def pooling_engine(self) -> PoolingEngine:
        """The engine of a pooling model. Raises ToolkitError for another."""
        if not isinstance(self._engine, PoolingEngine):
            raise ToolkitError(
                "runner must be 'pooling' for embeddings, scores and classes, got 'generate': LLM(model, "
                "runner='pooling')."
            )
        return self._engine

    def get_tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Those of the model's ``generation_config.json``."""
        return SamplingParams(**self._defaults)

    def generate(
        self, prompts: Prompts, sampling_params: Params = None, *, use_tqdm: Bar = None, lora_request: Adapters = None
    ) -> list[RequestOutput]:
        """The completions of all prompts, in order.

        Args:
            prompts: a text, a list of token ids, ``{"prompt": ...}``, ``{"prompt_token_ids": [...]}`` (with
                ``multi_modal_data`` for images), or a list of those.
            sampling_params: one for all, or one for each; None for the model's own defaults.
            use_tqdm: show a progress bar; None where standard error is a terminal.
            lora_request: the adapter, a ``LoRARequest`` for all prompts or one for each (None for none), which is
                loaded where it is new.

        Raises:
            ToolkitError: if any prompt cannot run; nothing is started then.
        """
        engine = self.engine
        given = split_prompts(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = with_adapters(engine, check_params(sampling_params, len(given)), lora_request)
        if engine.is_sleeping:
            raise ToolkitError("the engine is asleep; call llm.engine.wake() first.")
        order = engine.submit_batch(given, params)
        found: dict[int, list[Completion]] = {request: [] for request in order}
        unread = dict(zip(order, (one.n for one in params)))
        with progress(use_tqdm, len(given), "Processed prompts", "prompt") as done:
            try:
                while unread:
                    for delta in engine.step():
                        if delta.finished is None or delta.request_id not in unread:
                            continue
                        found[delta.request_id].append(delta.finished)
                        unread[delta.request_id] -= 1
                        if not unread[delta.request_id]:
                            del unread[delta.request_id]
                            done(1)
            finally:
                for request in unread:
                    engine.cancel(request)
        return [
            self._request_output(prompt, sorted(found[request], key=lambda one: one.index), one)
            for prompt, request, one in zip(given, order, params, strict=True)
        ]

    def _request_output(
        self, prompt: Prompt, completions: Sequence[Completion], params: SamplingParams
    ) -> RequestOutput:
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        return RequestOutput(
            self._next_id(),
            text if isinstance(text, str) else None,
            completions[0].prompt_token_ids,
            [completion_output(one, self.tokenizer) for one in completions],
            prompt_logprobs=prompt_logprobs(completions[0], params.prompt_logprobs, self.tokenizer),
            num_cached_tokens=completions[0].num_cached_tokens,
        )

    def _next_id(self) -> str:
        return str(next(self._ids))

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        use_tqdm: Bar = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora_request: Adapters = None,
    ) -> list[RequestOutput]:
        """The answers to one conversation, or to each of several, by the model's chat template.

        Args:
            messages: of a conversation, or a list of conversations. Content is text, or parts of text and images
                (OpenAI's or transformers'; paths and data URLs).
            sampling_params: as for ``generate``.
            use_tqdm: as for ``generate``.
            chat_template: in the place of the tokenizer's.
            add_generation_prompt: end with what opens the assistant's turn; not with ``continue_final_message``.
            continue_final_message: continue the last message.
            tools: JSON schemas.
            chat_template_kwargs: variables of the template, such as ``{"enable_thinking": False}``.
            lora_request: as for ``generate``.

        Raises:
            ToolkitError: there is no tokenizer or template, the template does not take the messages; as ``generate``.
        """
        engine = self.engine
        options = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs,
        }
        prompts = [chat_prompt(engine.tokenizer, engine.processor, one, options) for one in conversations(messages)]
        given = [prompt for _, prompt in prompts]
        found = self.generate(given, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)
        return [replace(output, prompt=text) for (text, _), output in zip(prompts, found, strict=True)]

    def beam_search(self, prompts: Prompts, params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The most probable continuations of every prompt, as beam search finds them.

        Args:
            prompts: as for ``generate``, without images.
            params: of all.

        Raises:
            ToolkitError: a prompt behind which ``max_tokens`` do not fit.
        """
        engine = self.engine
        plain = [plain_prompt(prompt) for prompt in split_prompts(prompts)]
        if self.tokenizer is None and any(isinstance(prompt, str) for prompt in plain):
            raise ToolkitError("prompt must be token ids, since the engine has no tokenizer, got a text.")
        read = [prompt_token_ids(self.tokenizer, one) if isinstance(one, str) else one for one in plain]
        return beam_search(engine, read, params, self.tokenizer)

    def embed(
        self, prompts: Prompts, pooling_params: PoolParams = None, *, use_tqdm: Bar = None
    ) -> list[EmbeddingRequestOutput]:
        """Embeddings, in order.

        Args:
            prompts: as for ``generate``, without images. Texts get all of the tokenizer's special tokens.
            pooling_params: one for all, or one for each; None for the model's defaults.
            use_tqdm: as for ``generate``.

        Raises:
            ToolkitError: a prompt that does not fit, or a model without embeddings.
        """
        return self._pooled(
            prompts, pooling_params, "embed", use_tqdm,
            lambda number, text, ids, result: EmbeddingRequestOutput(
                number, text, ids, EmbeddingOutput(result.data.tolist())
            ),
        )  # fmt: skip

    def classify(
        self, prompts: Prompts, pooling_params: PoolParams = None, *, use_tqdm: Bar = None
    ) -> list[ClassificationRequestOutput]:
        """Probabilities of classes, in order; as ``embed``."""
        return self._pooled(
            prompts, pooling_params, "classify", use_tqdm,
            lambda number, text, ids, result: ClassificationRequestOutput(
                number, text, ids, ClassificationOutput(result.data.tolist())
            ),
        )  # fmt: skip

    def encode(
        self,
        prompts: Prompts,
        pooling_params: PoolParams = None,
        *,
        pooling_task: str | None = None,
        use_tqdm: Bar = None,
    ) -> list[PoolingRequestOutput]:
        """Results as tensors, in order: of ``pooling_task`` (see ``PoolingParams.task``), None for the model's own."""
        return self._pooled(
            prompts, pooling_params, pooling_task, use_tqdm,
            lambda number, text, ids, result: PoolingRequestOutput(number, text, ids, PoolingOutput(result.data)),
        )  # fmt: skip

    def reward(
        self, prompts: Prompts, pooling_params: PoolParams = None, *, use_tqdm: Bar = None
    ) -> list[PoolingRequestOutput]:
        """What a head gives without its activation, in order: rewards of sequences, or of their tokens."""
        params = pooling_params_of(pooling_params, len(split_prompts(prompts)))
        raw = [PoolingParams(use_activation=False, truncate_prompt_tokens=one.truncate_prompt_tokens) for one in params]
        if "embed" in self.pooling_engine.tasks:
            raise ToolkitError("model must have a head for rewards, got one of embeddings.")
        return self.encode(prompts, raw, use_tqdm=use_tqdm)

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: Bar = None,
    ) -> list[ScoringRequestOutput]:
        """One score for each pair: by a cross-encoder (a classifier with one label), or the cosine of embeddings.

        Args:
            text_1: one text for all of ``text_2``, or one for each.
            text_2: a text, or several.
            pooling_params: of all.
            use_tqdm: as for ``generate``.

        Raises:
            ToolkitError: numbers of texts that do not fit, a text that is too long, or a model without scores.
        """
        engine = self.pooling_engine
        plan = ScorePlan.of(engine, self.tokenizer, text_1, text_2, pooling_params)
        with progress(use_tqdm, len(plan.inputs), "Processed texts", "text") as done:
            results = engine.pool(plan.inputs, plan.params, done)
        return [
            ScoringRequestOutput(self._next_id(), None, plan.token_ids(at), ScoringOutput(score))
            for at, score in enumerate(plan.scores(results))
        ]

    def _pooled(
        self,
        prompts: Prompts,
        given: PoolParams,
        task: str | None,
        use_tqdm: Bar,
        make: Callable[[str, str | None, list[int], Pooled], Request],
    ) -> list[Request]:
        engine = self.pooling_engine
        prompts = split_prompts(prompts)
        params = pooling_params_of(given, len(prompts), task)
        for one in params:
            engine.check(one)
        cuts = {one.truncate_prompt_tokens for one in params}
        if len(cuts) > 1:
            raise ToolkitError("truncate_prompt_tokens must be the same for all prompts of a call, got several.")
        read = read_inputs(prompts, self.tokenizer, engine.max_model_len, next(iter(cuts), None))
        with progress(use_tqdm, len(read), "Processed prompts", "prompt") as done:
            results: list[Pooled] = engine.pool([one for _, one in read], params, done)
        return [
            make(self._next_id(), text, one.token_ids, result)
            for (text, one), result in zip(read, results, strict=True)
        ]
