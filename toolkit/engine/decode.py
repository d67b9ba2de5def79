"""Recorded forwards for decode steps: one flat program a batch size, kept while the model stays the same."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from toolkit.engine.fusion import fuse
from toolkit.engine.program import build, record
from toolkit.patching import report_of
from toolkit.patching.forward import ragged_forward
from toolkit.patching.linear_adapters import adapter_layers, adapter_state
from toolkit.state import RaggedBatch, StatePool

# A batch is padded up to the next size, so that a few programs serve every batch. Rows cost little next to weights.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)


def padded_size(count: int) -> int:
    """The smallest size that holds ``count`` sequences; ``count`` itself beyond the largest."""
    return next((size for size in SIZES if size >= count), count)


class DecodePrograms:
    """Decode forwards of one patched model over one pool.

    A program is made at the first batch of its size and holds parameters by reference: training between two replays
    is seen. What a recording cannot see (another patch, replaced parameters, hooks) is looked for by ``refresh``, which
    the caller runs whenever a prompt enters. A model whose own code looks at values on the way has no programs, and is
    run as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._programs: dict[int, Callable[..., Tensor]] = {}
        self._made_of: tuple[object, ...] = ()
        self._hooked = False
        self.decided_by = ""
        self.refresh()

    def refresh(self) -> None:
        """Drop the programs if the model is no longer made of what they were recorded from."""
        parts = (*map(id, self.model.parameters()), *map(id, self.model.buffers()))
        made_of = (report_of(self.model), adapter_state(adapter_layers(self.model)), *parts)
        if made_of != self._made_of:
            self._programs.clear()
            self._made_of, self.decided_by = made_of, ""
        # A hook is the user's Python and must run at every step.
        self._hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())

    def serves(self, batch: RaggedBatch) -> bool:
        """Whether the batch is one new token a sequence, on pages, of a size that programs are made for."""
        count = len(batch.tokens)
        steady = isinstance(batch.state, StatePool) and batch.state.recordable
        steady = steady and not self._hooked and not self.decided_by
        return steady and count == len(batch.kv_lengths) and count in SIZES

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Logits [S, V] of all rows, padding included. The batch must be one that ``serves`` accepts."""
        inputs = _tensors(batch)
        program = self._programs.get(len(batch.tokens))
        if program is None:
            # Recorded outside inference mode: tensors made by the recording belong to later steps too.
            with torch.inference_mode(False), torch.no_grad():
                recording = record(self._function(batch), [part.clone() for part in inputs])
                # The recording was this step: run twice, a recurrence would go two tokens further.
                logits = recording.tensors[recording.output]
                self.decided_by = recording.decided_by
                if not self.decided_by:
                    self._programs[len(batch.tokens)] = build(fuse(recording))
            return logits
        return program(*inputs)

    def _function(self, batch: RaggedBatch) -> Callable[..., Tensor]:
        model = self.model

        def forward(*tensors: Tensor) -> Tensor:
            return ragged_forward(model, _with_tensors(batch, tensors))

        return forward


_OWN = ("tokens", "positions", "query_offsets", "kv_offsets", "kv_lengths")


def _tensors(batch: RaggedBatch) -> list[Tensor]:
    """Every tensor of a batch with state."""
    found = [getattr(batch, name) for name in _OWN]
    return found + [getattr(view, part.name) for view in batch.views for part in fields(view)]


def _with_tensors(batch: RaggedBatch, tensors: Sequence[Tensor]) -> RaggedBatch:
    """The same batch of other ``_tensors``."""
    left = iter(tensors)
    own = {name: next(left) for name in _OWN}
    views = tuple(type(view)(*(next(left) for _ in fields(view))) for view in batch.views)
    return replace(batch, views=views, **own)  # type: ignore[arg-type]
