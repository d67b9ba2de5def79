"""What the engine asks of a model, and a patched Hugging Face model that gives it."""

from collections import abc
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from toolkit.engine.media import PromptMedia
from toolkit.engine.step.cuda_device import records
from toolkit.engine.step.decode_graphs import DecodeGraphs, mixed_size, padded_size
from toolkit.engine.step.sampling import StepSampling
from toolkit.errors import ToolkitError
from toolkit.numerics import Numerics
from toolkit.ops.collectives import gather_objects, num_ranks
from toolkit.ops.executor import step_threads
from toolkit.patching import patch, report_of
from toolkit.patching.adapters import (
    adapter_parts,
    fuse_adapters,
    inner_model,
    refresh_scales,
    vocabulary_size,
)
from toolkit.patching.eval_mode import eval_mode
from toolkit.patching.forward import context_forward
from toolkit.patching.multimodal import encode, expand, span_layers, takes_media
from toolkit.patching.sharding import check_unsharded
from toolkit.patching.state_spec import state_spec
from toolkit.patching.tensor_parallel import group_of_model
from toolkit.patching.weights import weight_clock
from toolkit.state import PagedContext, PrefixKey, StateSpec
from toolkit.state.media import Features


@runtime_checkable
class Backend(Protocol):
    """What the engine needs of a model; anything with these methods may stand in for one.

    A backend whose rotary tables depend on the length of the sequence also has ``rotary_length``, as ``PatchedModel``;
    batches then say by which length each row's are made (``RaggedBatch.rotary_lengths``). ``sampling_threads`` gives a
    context in which the logits of the last forward are sampled. One that takes pictures has ``expand``, ``encode`` and
    ``span_layers``. One with ``keeps_prompts`` is told what each row's prompt is (``RaggedBatch.prompt_lengths``). One
    with ``sampled`` takes a third argument of ``forward``, a ``StepSampling`` of a decode step's rows, and says by
    ``sampled`` whether that forward sampled them, and by ``captures_ahead`` whether graphs are to be captured before
    the first request. One with ``mixed_size`` says how many rows a step that does not only decode is padded to, 0 for
    none; such a step wants as many rows as it has sequences, both padded. One whose model is split over ranks has
    ``agree`` and ``least``, by which they take one value of what clocks and memory say.
    """

    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_model_len: int
    eos: frozenset[int]

    def layers(self) -> abc.Sequence[StateSpec]:
        """What each layer remembers of a token."""

    def version(self) -> int:
        """A number that changes whenever the weights do."""

    def prefix_key(self) -> PrefixKey:
        """The key of state computed by the weights that ``version`` found."""

    def forward(self, context: PagedContext, rows: Tensor) -> Tensor:
        """Logits [len(rows), vocab_size] at ``rows`` of the batch's tokens."""

    def decode_size(self, rows: int) -> int:
        """The number of rows to pad a decode batch of ``rows`` to; ``rows`` for no padding.

        It is padded to as many sequences too, where several rows are one's.
        """


class PatchedModel:
    """A Hugging Face causal language model as a backend. Patches it unless it is patched already."""

    def __init__(self, model: nn.Module, numerics: str | None = None, kv_cache_dtype: str = "auto") -> None:
        model = inner_model(model)
        report = report_of(model)
        if report is None:
            report = patch(
                model, numerics=numerics, kv_cache_dtype=None if kv_cache_dtype == "auto" else kv_cache_dtype
            )
        if kv_cache_dtype not in ("auto", report.kv_cache_dtype):
            raise ToolkitError(
                f"kv_cache_dtype must be 'auto', as the model is patched, got {kv_cache_dtype!r}; call "
                f"toolkit.patch(model, kv_cache_dtype={kv_cache_dtype!r}) first, so that training computes the same."
            )
        parameter = next(model.parameters())
        if numerics is not None and report.numerics is not Numerics.choose(numerics, parameter.device):
            raise ToolkitError(
                f"numerics must be '{report.numerics}', as the model is patched, or None, got {numerics!r}; "
                "unpatch the model first to change it."
            )
        self.model = model
        self.numerics = report.numerics
        self._rotary_regimes = report.rotary_regimes()
        self.keeps_prompts = report.keeps_prompts
        self.device = parameter.device
        self.dtype = parameter.dtype
        config: Any = model.config
        text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocab_size = vocabulary_size(model)
        self.hidden_size = int(getattr(text, "hidden_size", 0) or 0)
        # A table of positions has no rows for those before a sequence's first one.
        self.max_model_len = int(getattr(text, "max_position_embeddings", None) or 2048) - report.ragged.position_offset
        self.uncounted_token = report.ragged.uncounted_token
        sources = (getattr(model, "generation_config", None), config, text)
        self.eos = frozenset().union(*(_ids(getattr(source, "eos_token_id", None)) for source in sources))
        self.graphs = DecodeGraphs(model, mixed=records(parameter.device))
        self.clock = weight_clock(model)
        self.sampled = False
        self.group = group_of_model(model)
        self.captures_ahead = records(parameter.device)
        self._seen = (-1, -1)
        self._adapter_parts: list[nn.Module] = []

    def layers(self) -> abc.Sequence[StateSpec]:
        return state_spec(self.model)

    @property
    def grows(self) -> bool:
        """Whether sequences may be longer than ``max_model_len`` when asked for: dynamic NTK, in fast mode."""
        varies = self._rotary_regimes is not None and self._rotary_regimes.varies_after is not None
        return varies and self.numerics is Numerics.FAST

    def rotary_length(self, declared: int) -> int | None:
        """``Completion.rotary_length`` of a request of ``declared`` tokens, so that its tables stay while it grows.

        None where tables do not depend on the length. Raises ToolkitError in bitwise mode where every length has other
        ones.
        """
        regimes = self._rotary_regimes
        if regimes is None:
            return None
        most = regimes.varies_after
        if self.numerics is Numerics.BITWISE and most is not None and declared > most:
            raise ToolkitError(
                f"prompt and max_tokens together must be <= {most} tokens in bitwise mode, got {declared}: beyond that "
                "this model's rotary tables (dynamic NTK) are others for every length. Set a smaller max_tokens, or "
                'numerics="fast".'
            )
        return regimes.canonical(declared)

    def version(self) -> int:
        version = self.clock.version()
        seen = self.clock.layout, self.clock.changes
        if seen != self._seen:
            if seen[0] != self._seen[0]:
                check_unsharded(self.model, "generating")
                self._check_group()
                fuse_adapters(self.model, self.numerics)
                self._adapter_parts = adapter_parts(self.model)
            refresh_scales(self.model)
            self._seen = seen
        return version

    def _check_group(self) -> None:
        """Raise ToolkitError where the model is split over other ranks than when its state was laid out."""
        if group_of_model(self.model) != self.group:
            was, now = ("whole", "split over ranks") if self.group is None else ("split over ranks", "whole")
            raise ToolkitError(f"the model must be {was}, as when its engine was made, got one that is {now}.")

    @property
    def ranks(self) -> int:
        """Processes that the model is split over."""
        return 1 if self.group is None else num_ranks(self.group)

    def agree(self, value: Any) -> Any:
        """``value``, of a model that is split over ranks the first rank's; all of them must call this."""
        return value if self.group is None else gather_objects(value, self.group)[0]

    def least(self, value: int) -> int:
        """``value``, of a model that is split over ranks the least of theirs; all of them must call this."""
        return value if self.group is None else min(gather_objects(value, self.group))

    def prefix_key(self) -> PrefixKey:
        return self.clock.key

    def decode_size(self, rows: int) -> int:
        return padded_size(rows)

    def mixed_size(self, rows: int) -> int:
        """The number of rows to pad a step of ``rows``, some of them of prompts, to; 0 for no padding."""
        return mixed_size(rows) if self.graphs.mixed else 0

    def sampling_threads(self) -> AbstractContextManager[None]:
        """In what the logits of the last forward are sampled: on its threads."""
        return step_threads() if self.graphs.own_threads else nullcontext()

    @property
    def span_layers(self) -> frozenset[int] | None:
        """Indices of the layers in which the tokens of a picture see each other."""
        return span_layers(self.model)

    def expand(self, inputs: abc.Mapping[str, Any]) -> PromptMedia:
        """A prompt of the outputs of the model's processor.

        Raises ToolkitError for a model that takes no pictures, and for outputs that it does not take.
        """
        if not takes_media(self.model):
            raise ToolkitError(
                f"prompt must be a text or token ids, since {type(self.model).__name__} takes no pictures."
            )
        found = expand(self.model, inputs)
        return PromptMedia(found.tokens.tolist(), found.spans, found.items, found.positions, found.delta, found.prompt)

    def encode(self, item: Any) -> Features:
        """What the model computes of one picture, alone: no bit depends on others."""
        with eval_mode(self.model), torch.no_grad():
            return encode(self.model, item)

    def forward(self, context: PagedContext, rows: Tensor, sampling: StepSampling | None = None) -> Tensor:
        with eval_mode(self.model, self._adapter_parts):
            self.graphs.own_threads = self.sampled = False
            if self.graphs.serves(context, rows):
                logits = self.graphs.forward(context, rows, sampling)
                if len(context.batch.tokens) != len(context.batch.kv_lengths):
                    return logits.clone()  # a device's next replay overwrites them
                self.sampled = sampling is not None
                # A native replay's memory is fresh, and to copy these rows would wake OpenMP's threads.
                if self.graphs.own_threads and len(rows) and int(rows[-1]) == len(rows) - 1:
                    return logits[: len(rows)]
                return logits[rows]
            self.graphs.find_hooks()
            return context_forward(self.model, context, rows)


def _ids(eos: Any) -> frozenset[int]:
    return frozenset() if eos is None else frozenset(eos) if isinstance(eos, list | tuple) else frozenset([eos])
