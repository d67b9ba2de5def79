"""Captured graphs of steps: one per size, kept while the model stays the same.

A decode step has as many rows as sequences, and samples every row. A mixed step has tokens of prompts too: more rows
than sequences, of which some are wanted. No kernel needs to know how rows divide into sequences before it is launched,
attention neither, so that a mixed step is one graph, and not one for each region between two attentions.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.engine.step.executors import EXECUTORS, Executor, holds
from toolkit.engine.step.graph import CapturedGraph, capture
from toolkit.engine.step.passes import optimize
from toolkit.engine.step.sampling import StepSampling, sample_step
from toolkit.patching import report_of
from toolkit.patching.forward import context_forward
from toolkit.patching.multimodal.entry import MediaEntry
from toolkit.patching.padding import LabelsOnPadding
from toolkit.patching.weights import weight_clock
from toolkit.state import PagedContext, PagedRows, RaggedBatch

# A batch is padded up to the next size, so that a few graphs serve every batch. Rows cost little next to weights.
CAPTURE_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)


# Beyond the largest a device computes for longer than a host launches.
MIXED_SIZES = (16, 32, 64, 128, 256, 512)


def padded_size(count: int) -> int:
    """The smallest size that holds ``count`` sequences; ``count`` itself beyond the largest."""
    return next((size for size in CAPTURE_SIZES if size >= count), count)


def mixed_size(count: int) -> int:
    """The smallest size of a mixed step that holds ``count`` rows; 0 beyond the largest."""
    return next((size for size in MIXED_SIZES if size >= count), 0)


class DecodeGraphs:
    """Forwards of decode steps, and of mixed ones where ``mixed`` says so, of one patched model over one pool.

    A graph is captured at the first batch of its size and holds parameters by reference, so that it sees training
    between two replays. Graphs are dropped when the layout of the weights or a setting of a module changes
    (``WeightClock``), and when another patch is in place. A forward that reads weights on the host is captured again
    for each version of them. Hooks are found by ``find_hooks``, which the caller runs whenever a prompt enters. A model
    with a data-dependent op has no graphs and runs eagerly. A replay with fixed addresses (``FixedReplay``) is captured
    again where they, or the sizes of its buffers, do not hold.

    Args:
        model: patched.
        executors: of which the first that takes a graph runs it.
        mixed: whether mixed steps are captured. Their padding is computed too, so that it is for devices that compute
            while the host launches.
    """

    def __init__(self, model: nn.Module, executors: Sequence[Executor] = EXECUTORS, mixed: bool = False) -> None:
        self.model = model
        self.executors = executors
        self.mixed = mixed
        self._graphs: dict[tuple[Any, ...], Callable[..., Tensor]] = {}  # by size and what else decides the ops
        self._clock = weight_clock(model)
        self._captured_from: tuple[object, ...] = ()
        self._reads_weights = False
        self._hooked = False
        self.data_dependent_op = ""
        self.own_threads = False
        self.find_hooks()

    @property
    def captured(self) -> int:
        """How many graphs there are now."""
        return len(self._graphs)

    def find_hooks(self) -> None:
        """Look for forward hooks: they are the user's Python and must run at every step.

        The patch's own, which put pictures among embeddings and look at labels, do nothing in a decode step.
        """
        own = (MediaEntry, LabelsOnPadding)
        self._hooked = any(
            m._forward_hooks or any(not isinstance(hook, own) for hook in m._forward_pre_hooks.values())
            for m in self.model.modules()
        )

    def _refresh(self) -> None:
        """Drop the graphs if the model is no longer what they were captured from."""
        now = (report_of(self.model), self._clock.layout, self._clock.key if self._reads_weights else None)
        if now != self._captured_from:
            self._graphs.clear()
            self._captured_from, self._reads_weights, self.data_dependent_op = (*now[:2], None), False, ""

    def serves(self, context: PagedContext, rows: Tensor) -> bool:
        """Whether the batch is on pages and of a size that graphs are captured for.

        Args:
            context: of a decode step, which has one new token per sequence, or of a mixed one.
            rows: [R] whose logits are wanted; of a mixed step as many as there are sequences.
        """
        self._refresh()
        batch = context.batch
        plain = batch.embedding_rows is None and batch.spans is None
        steady = plain and context.pool.capturable and not self._hooked and not self.data_dependent_op
        return steady and (_decodes(batch) or (self.mixed and _is_mixed(batch, rows)))

    def forward(self, context: PagedContext, rows: Tensor, sampling: StepSampling | None = None) -> Tensor:
        """Logits [S, V] of all rows of a decode step, padding included, or of ``rows`` of a mixed one.

        With ``sampling`` every row of a decode step is sampled too (``StepSampling.result``).

        Args:
            context: that ``serves`` accepts.
            rows: [S] of a mixed step; of a decode step not looked at.
            sampling: of a decode step.
        """
        batch = context.batch
        wanted = () if _decodes(batch) else (rows,)
        inputs = [*_tensors(context), *wanted, *(sampling.tensors if sampling is not None else ())]
        adapters = None if batch.adapter_ids is None else batch.adapters
        parts = None if sampling is None else sampling.parts
        sequences = len(batch.kv_lengths)
        size = len(batch.tokens), sequences, batch.positions.dim(), adapters, parts, batch.previous_hidden is not None
        widths = tuple(view.block_tables.shape[1] for view in batch.views if isinstance(view, PagedRows))
        replay = self._graphs.get(size) or self._graphs.get((*size, widths))
        if replay is None or not holds(replay, inputs):
            # Captured outside inference mode: tensors made by the capture belong to later steps too.
            with torch.inference_mode(False), torch.no_grad():
                graph = capture(self._function(context, len(wanted), sampling), inputs)
                # The capture was this step: run twice, a recurrence would advance by two tokens.
                logits = graph.output.tensor
                self.data_dependent_op = graph.data_dependent_op
                if graph.reads_constants and not self._reads_weights:
                    self._reads_weights, self._captured_from = True, (*self._captured_from[:2], self._clock.key)
                if not self.data_dependent_op:
                    graph.idle_inputs = _idle(context, len(inputs))
                    made = self._executable(optimize(graph))
                    self._graphs[(*size, widths) if hasattr(made, "fits") else size] = made
            return logits
        self.own_threads = getattr(replay, "own_threads", False)
        return replay(*inputs)

    def _executable(self, graph: CapturedGraph) -> Callable[..., Tensor]:
        return next(replay for executor in self.executors if (replay := executor(graph)) is not None)

    def _function(self, context: PagedContext, wanted: int, sampling: StepSampling | None) -> Callable[..., Tensor]:
        model = self.model
        own = len(_tensors(context))

        def forward(*tensors: Tensor) -> Tensor:
            rows, of_sampling = tensors[own : own + wanted], tensors[own + wanted :]
            logits = context_forward(model, _with_tensors(context, tensors[:own]), *rows)
            if sampling is not None:
                sample_step(logits, sampling.parts, of_sampling)
            return logits

        return forward


def _decodes(batch: RaggedBatch) -> bool:
    count = len(batch.tokens)
    return count == len(batch.kv_lengths) and count in CAPTURE_SIZES


def _is_mixed(batch: RaggedBatch, rows: Tensor) -> bool:
    return len(batch.tokens) in MIXED_SIZES and len(rows) == len(batch.kv_lengths)


_OWN = ("tokens", "positions", "query_offsets", "kv_offsets", "kv_lengths")


def _own(batch: RaggedBatch) -> tuple[str, ...]:
    optional = ("rotary_lengths", "adapter_ids", "previous_hidden")
    return (*_OWN, *(name for name in optional if getattr(batch, name) is not None))


def _tensors(context: PagedContext) -> list[Tensor]:
    """Every tensor of a paged batch."""
    batch = context.batch
    return [getattr(batch, name) for name in _own(batch)] + [
        getattr(view, part.name) for view in batch.views for part in fields(view)
    ]


_NOWHERE = {"slot_mapping": -1, "store_blocks": -1}


def _idle(context: PagedContext, count: int) -> list[int | None]:
    """What to fill each of ``count`` inputs with for a run whose state goes nowhere; None: as it is."""
    names = _own(context.batch) + tuple(part.name for view in context.batch.views for part in fields(view))
    found = [_NOWHERE.get(name) for name in names]
    return found + [None] * (count - len(found))


def _with_tensors(context: PagedContext, tensors: Sequence[Tensor]) -> PagedContext:
    """The same context over a batch of other ``_tensors``."""
    left = iter(tensors)
    own: dict[str, Any] = {name: next(left) for name in _own(context.batch)}
    views = tuple(type(view)(*(next(left) for _ in fields(view))) for view in context.batch.views)
    batch = replace(context.batch, views=views, **own)
    return PagedContext(batch, context.pool)
