"""Recorded forwards for decode steps: one flat program a batch size, kept while the model stays the same."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from toolkit.engine.fusion import fuse
from toolkit.engine.program import build, record
from toolkit.patch import report_of
from toolkit.patch.forward import ragged_forward
from toolkit.state import RaggedBatch

# A batch is padded up to the next size, so that a few programs serve every batch. Rows cost little next to weights.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)


def padded_size(count: int) -> int:
    """The smallest size that holds ``count`` sequences; ``count`` itself beyond the largest."""
    return next((size for size in SIZES if size >= count), count)


class DecodePrograms:
    """Decode forwards of one patched model over one pool.

    A program is made at the first batch of its size and holds parameters by reference: training between two replays
    is seen. What a recording cannot see (another patch, replaced parameters, hooks) is looked for by ``refresh``, which
    the caller runs whenever a prompt enters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._programs: dict[int, Callable[..., Tensor]] = {}
        self._made_of: tuple[object, ...] = ()
        self._hooked = False
        self.refresh()

    def refresh(self) -> None:
        """Drop the programs if the model is no longer made of what they were recorded from."""
        made_of = (report_of(self.model), *map(id, self.model.parameters()), *map(id, self.model.buffers()))
        if made_of != self._made_of:
            self._programs.clear()
            self._made_of = made_of
        # A hook is the user's Python and must run at every step.
        self._hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())

    def serves(self, batch: RaggedBatch) -> bool:
        """Whether the batch is one new token a sequence, on pages, of a size that programs are made for."""
        count = len(batch.tokens)
        return batch.state is not None and count == len(batch.kv_lengths) and count in SIZES and not self._hooked

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Logits [S, V] of all rows, padding included. The batch must be one that ``serves`` accepts."""
        inputs = (
            batch.tokens,
            batch.positions,
            batch.query_offsets,
            batch.kv_offsets,
            batch.kv_lengths,
            batch.block_tables,
            batch.slots,
        )
        assert batch.block_tables is not None
        assert batch.slots is not None
        program = self._programs.get(len(batch.tokens))
        if program is None:
            # Recorded outside inference mode: tensors made by the recording belong to later steps too.
            with torch.inference_mode(False), torch.no_grad():
                recording = record(self._function(batch), [part.clone() for part in inputs])  # type: ignore[union-attr]
                program = build(fuse(recording))
            self._programs[len(batch.tokens)] = program
        return program(*inputs)

    def _function(self, batch: RaggedBatch) -> Callable[..., Tensor]:
        page_size, state, model = batch.page_size, batch.state, self.model

        def forward(
            tokens: Tensor,
            positions: Tensor,
            query_offsets: Tensor,
            kv_offsets: Tensor,
            kv_lengths: Tensor,
            block_tables: Tensor,
            slots: Tensor,
        ) -> Tensor:
            rows = RaggedBatch(
                tokens,
                positions,
                query_offsets,
                kv_offsets,
                kv_lengths,
                block_tables,
                slots,
                page_size,
                state=state,
            )
            return ragged_forward(model, rows)

        return forward
