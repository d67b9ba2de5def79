"""Sequences in, embeddings or scores out: packs them into ragged batches and runs one forward for each batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from toolkit.engine.backend import PatchedModel
from toolkit.engine.checks import check_names
from toolkit.engine.config import EngineConfig
from toolkit.engine.pooling.params import PoolerConfig, PoolingParams
from toolkit.engine.pooling.poolers import activate, default_activation, embed, pool
from toolkit.engine.prompts import outside_vocabulary
from toolkit.errors import ToolkitError, first_line, must_be_one_of
from toolkit.patching import choose_rotary_lengths, report_of
from toolkit.patching.eval_mode import eval_mode
from toolkit.patching.forward import hidden_states
from toolkit.patching.pooled_head import check_head, has_head, head_outputs
from toolkit.state import RaggedBatch
from toolkit.state.dense import DenseContext

TYPES = "token_type_ids"


@dataclass(frozen=True)
class PoolingInput:
    """One sequence.

    Args:
        token_ids: with the special tokens that the model wants around it.
        token_type_ids: of each token, for models of pairs (BERT); None for none.
    """

    token_ids: list[int]
    token_type_ids: list[int] | None = None


@dataclass(frozen=True)
class Pooled:
    """The result of one sequence.

    Args:
        data: on the CPU: an embedding [D], one for each token [n, D], or scores [N] or [n, N].
        token_ids: of the sequence.
    """

    data: Tensor
    token_ids: list[int] = field(default_factory=list)


class PoolingEngine:
    """Embeds or scores whole sequences with ``model``, which is patched here if it is not yet.

    Sequences are packed one behind the other: there is no padding, a common prefix is computed once (encoders: equal
    sequences), and no bit of a result depends on what else is in the batch (bitwise mode). Call it from one thread.

    Args:
        model: a Hugging Face model without a head, with one output a sequence (sequence classification, rewards) or
            with one for each token. Of a model that predicts tokens the hidden states are pooled.
        pooler_config: defaults in the place of the model's own: a ``PoolerConfig``, or a mapping of its fields.
        max_num_batched_tokens: tokens in a forward. A longer sequence runs alone.
        max_num_seqs: sequences in a forward.
        max_model_len: tokens of a sequence; None for what the model was made for.
        numerics: "fast" or "bitwise"; None for the device's default, or for the mode that is patched in.

    Attributes:
        tasks: what the model serves, its own first.
        num_tokens: of all sequences so far.
        weight_version: of the weights that were seen last.
        is_sleeping: whether a queue is to run nothing.

    Raises:
        ToolkitError: a model that a ragged batch is not proven for, a head that is not proven, or a bad value.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pooler_config: PoolerConfig | dict[str, Any] | None = None,
        max_num_batched_tokens: int = 2048,
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        numerics: str | None = None,
        **unknown: Any,
    ) -> None:
        taken = ("max_num_batched_tokens", "max_num_seqs", "max_model_len", "numerics")
        check_names("PoolingEngine", unknown, ("pooler_config", *taken))
        self.config = EngineConfig.check(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len,
            numerics=numerics,
        )  # fmt: skip
        self._patched = _patched(model, numerics)
        self.model = cast(Any, self._patched.model)
        report = report_of(self.model)
        assert report is not None
        self.bidirectional = report.bidirectional
        self.vocab_size = self._patched.vocab_size
        self.max_model_len = self._patched.max_model_len
        if max_model_len is not None:
            if max_model_len > self.max_model_len:
                raise ToolkitError(
                    f"max_model_len must be <= {self.max_model_len}, which {type(self.model).__name__} was made for, "
                    f"got {max_model_len}."
                )
            self.max_model_len = max_model_len
        self._given = PoolerConfig.of(pooler_config)
        self._of_head = has_head(self.model) and self.model.get_output_embeddings() is None
        self.tasks: tuple[str, ...] = ("embed", "token_embed")
        self._forward(RaggedBatch.from_sequences([[0]], self._patched.device))  # refuses what is not proven
        if self._of_head:
            self.tasks = ("token_classify",) if check_head(self.model) else ("classify",)
        self.num_tokens = 0
        self.weight_version = self.see_weights()
        self.is_sleeping = False

    @property
    def backend(self) -> PatchedModel:
        """The patched model, as an ``Engine`` has it."""
        return self._patched

    def see_weights(self) -> int:
        """The weight version now."""
        self.weight_version = self._patched.version()
        return self.weight_version

    def sleep(self) -> None:
        """Run nothing until ``wake``. There is no memory to give back: nothing is kept between forwards."""
        self.is_sleeping = True

    def wake(self) -> None:
        """Continue after ``sleep``."""
        self.is_sleeping = False

    @property
    def pooling_type(self) -> str:
        """Of embeddings: LAST, MEAN, CLS or ALL."""
        return self._given.pooling_type or ("CLS" if self.bidirectional else "LAST")

    @property
    def activation(self) -> str:
        """Of logits: identity, sigmoid or softmax."""
        return self._given.activation or default_activation(self.model.config, self.tasks == ("token_classify",))

    @property
    def labels(self) -> list[str]:
        """The names of a classifier's classes."""
        names = getattr(self.model.config, "id2label", None) or {}
        return [str(names.get(at, at)) for at in range(self.model.config.num_labels)]

    @property
    def embedding_size(self) -> int:
        """Dimensions of an embedding, before a cut."""
        if self._given.projections:
            return self._given.projections[-1].weight.shape[0]
        size: int = self.model.config.get_text_config().hidden_size
        return size

    def check(self, params: PoolingParams) -> str:
        """The task that ``params`` ask for. Raises ToolkitError where the model does not serve it."""
        task = params.task or self.tasks[0]
        if task not in self.tasks:
            raise ToolkitError(f"{must_be_one_of('task', task, self.tasks)[:-1]} of {type(self.model).__name__}.")
        if params.dimensions is not None and "embed" not in task:
            raise ToolkitError(f"dimensions must be None for task {task!r}, got {params.dimensions}.")
        if params.dimensions is not None and params.dimensions > self.embedding_size:
            raise ToolkitError(f"dimensions must be >= 1 and <= {self.embedding_size}, got {params.dimensions}.")
        return task

    def check_input(self, given: PoolingInput, name: str = "prompt") -> None:
        """Raise ToolkitError for a sequence that the model does not take."""
        ids, types = given.token_ids, given.token_type_ids
        if not 1 <= len(ids) <= self.max_model_len:
            raise ToolkitError(f"{name} must have >= 1 and <= {self.max_model_len} tokens, got {len(ids)}.")
        wrong = outside_vocabulary(ids, self.vocab_size)
        if wrong is not None:
            raise ToolkitError(f"{name} must have token ids from 0 to {self.vocab_size - 1}, got {wrong}.")
        if self._patched.uncounted_token is not None and self._patched.uncounted_token in ids:
            raise ToolkitError(
                f"{name} must not contain token {self._patched.uncounted_token}, got one: the model takes it for "
                "padding and gives it no position, which a ragged batch would."
            )
        if types is not None and len(types) != len(ids):
            raise ToolkitError(
                f"token_type_ids of {name} must have one entry per token ({len(ids)}), got {len(types)}."
            )

    def pool(
        self,
        inputs: Sequence[PoolingInput],
        params: PoolingParams | Sequence[PoolingParams] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Pooled]:
        """The results of all sequences, in their order.

        Args:
            inputs: the sequences.
            params: one for all, or one for each.
            progress: is told how many sequences each forward has finished.

        Raises:
            ToolkitError: if any sequence or parameter does not fit; nothing is run then.
        """
        if params is None or isinstance(params, PoolingParams):
            params = [params or PoolingParams()] * len(inputs)
        if len(params) != len(inputs):
            raise ToolkitError(f"params must be one, or one per prompt ({len(inputs)}), got {len(params)}.")
        tasks = [self.check(one) for one in params]
        for at, one in enumerate(inputs):
            self.check_input(one, f"prompt {at}" if len(inputs) > 1 else "prompt")
        found: list[Pooled | None] = [None] * len(inputs)
        for indices in self._packed(inputs):
            hidden = self._hidden([inputs[at] for at in indices])
            for at, rows in zip(indices, hidden, strict=True):
                data = self._pooled(inputs[at].token_ids, rows, params[at], tasks[at])
                found[at] = Pooled(data.cpu(), inputs[at].token_ids)
            if progress is not None:
                progress(len(indices))
        self.num_tokens += sum(len(one.token_ids) for one in inputs)
        return [one for one in found if one is not None]

    def _packed(self, inputs: Sequence[PoolingInput]) -> list[list[int]]:
        """Indices of the sequences of each forward. Those with a common prefix come together: it is computed once."""
        order = sorted(range(len(inputs)), key=lambda at: inputs[at].token_ids)
        batches: list[list[int]] = []
        room = 0
        for at in order:
            count = len(inputs[at].token_ids)
            if not batches or count > room or len(batches[-1]) == self.config.max_num_seqs:
                batches.append([])
                room = max(self.config.max_num_batched_tokens, count)
            batches[-1].append(at)
            room -= count
        return batches

    def _hidden(self, inputs: Sequence[PoolingInput]) -> list[Tensor]:
        """[n, H] of each sequence, by one forward."""
        sequences = [one.token_ids for one in inputs]
        typed = any(one.token_type_ids is not None for one in inputs)
        spans = [[(0, len(one))] for one in sequences] if self.bidirectional else None
        batch = RaggedBatch.from_sequences(
            sequences,
            self._patched.device,
            share=not typed,  # sequences with other types are others
            rotary_lengths=choose_rotary_lengths(self.model, [len(one) for one in sequences]),
            spans=spans,
        )
        types = None
        if typed:
            flat = [kind for one in inputs for kind in one.token_type_ids or [0] * len(one.token_ids)]
            types = torch.tensor(flat, device=self._patched.device)
        hidden = self._forward(batch, types)
        rows = hidden if batch.sample_rows is None else hidden[batch.sample_rows]
        return list(rows.split([len(one) for one in sequences]))

    def _forward(self, batch: RaggedBatch, types: Tensor | None = None) -> Tensor:
        self.see_weights()  # those that a framework has sharded or moved since
        inputs = {} if types is None else {TYPES: types}
        with eval_mode(self.model), torch.no_grad():
            return hidden_states(self.model, DenseContext(batch), inputs)

    def _pooled(self, token_ids: list[int], hidden: Tensor, params: PoolingParams, task: str) -> Tensor:
        if "embed" in task:
            given = params.normalize if params.normalize is not None else params.use_activation
            normalize = given if given is not None else self._given.normalize is not False
            rows = pool("ALL" if task == "token_embed" else self.pooling_type, hidden)
            return embed(rows, self._given.projections, params.dimensions, normalize)
        with eval_mode(self.model), torch.no_grad():
            logits = head_outputs(self.model, torch.tensor(token_ids, device=hidden.device), hidden)
        use = params.use_activation if params.use_activation is not None else self._given.use_activation is not False
        return activate(logits, self.activation if use else "identity")


def _patched(model: nn.Module, numerics: str | None) -> PatchedModel:
    """The patched model. Raises ToolkitError for one that no patch can look at."""
    try:
        return PatchedModel(model, numerics)
    except ToolkitError:
        raise
    except Exception as problem:  # models without an embedding of tokens, or with parts of other kinds
        name, why = type(model).__name__, first_line(problem, with_class=True)
        raise ToolkitError(f"model {name} must be one that can be patched, got {why}.") from None
