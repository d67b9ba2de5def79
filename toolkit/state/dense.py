"""Forwards without state: a batch brings all its keys, and gradients reach every input."""

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.attention import attention
from toolkit.ops.attention.with_lse import attention_with_lse
from toolkit.ops.causal_conv import causal_conv
from toolkit.ops.linear_recurrence import linear_recurrence
from toolkit.ops.select_keys import select_keys, selected_rows
from toolkit.ops.sparse_attention import sparse_attention
from toolkit.state.batch import RaggedBatch
from toolkit.state.context import AttentionSettings, ForwardContext
from toolkit.state.pools import Pools, select_pools
from toolkit.state.prompt_windows import attend_prompt, sequence_positions
from toolkit.state.relative_bias import biased_attention
from toolkit.state.rotary_regimes import RotaryRegimes


class DenseContext(ForwardContext):
    """Sequences from their first token on; shared prefixes are computed once, with gradients through the block table.

    Keys and values are the given rows; those of ``RaggedBatch.for_padded`` have more of them than queries.
    """

    def __init__(self, batch: RaggedBatch) -> None:
        super().__init__(batch)
        self._parents = batch.parents
        self._past: dict[int, Tensor] = {}
        self._spans: dict[int, Tensor] = {}

    def rotary_lengths(self, regimes: RotaryRegimes) -> Tensor:
        """As given, else by each sequence's own length: all of its tokens are here."""
        return regimes.of_batch(self.batch) if self.batch.rotary_lengths is None else self.batch.rotary_lengths

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        batch = self.batch
        k, v = settings.kept(k, v)
        plan = batch.query_offsets, batch.kv_offsets, batch.kv_lengths, batch.block_tables, 1, *settings.of_op
        out, _ = attention(q, k, v, *plan, batch.query_ranges, self.seen_ahead(layer))
        return out

    def attend_bidirectional(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        batch = self.batch
        plan = batch.query_offsets, batch.kv_offsets, batch.kv_lengths, batch.block_tables, 1, *settings.of_op
        out, _ = attention(q, k, v, *plan, batch.query_ranges, self._both_sides(settings.window))
        return out

    def _both_sides(self, window: int) -> Tensor:
        """[T, 2] spans by which each row sees the rest of its sequence, or of its window, from its own position on."""
        batch = self.batch
        if batch.parents is not None and bool((batch.parents >= 0).any()):
            raise ToolkitError(
                "sequences of the batch must not share prefixes where tokens see those after them, got a prefix tree; "
                "make it with share=False, or with one span over each sequence."
            )
        if window not in self._spans:
            position = sequence_positions(batch)
            end = torch.cat([batch.kv_lengths, batch.kv_lengths.new_zeros(1)])[batch.sequence_ids]
            end = torch.minimum(end, position + window) if window else end
            self._spans[window] = torch.stack([position, end], 1)
        return self._spans[window]

    def attend_biased(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, bias: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        self.check_nothing_ahead(layer)
        offsets, begins, lengths, tables, block_size = self._plan()

        def attend(q: Tensor, keys: Tensor, v: Tensor, window: int, behind: int) -> tuple[Tensor, Tensor]:
            seen = (lengths - behind).clamp_min(0) if behind else lengths
            return attention_with_lse(q, keys, v, (offsets, begins, seen, tables, block_size), settings.scale, window)

        return biased_attention(attend, q, k, v, settings, bias, sinks, sequence_positions(self.batch))

    def attend_prompt(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, window: int
    ) -> Tensor:
        return attend_prompt(self, layer, q, k, v, settings, window)

    def select(self, layer: int, q: Tensor, k: Tensor, weights: Tensor, topk: int, *, scale: float) -> Tensor:
        self.check_nothing_ahead(layer)

        def choose() -> Tensor:
            return select_keys(q, k, weights, *self._plan(), topk=topk, scale=scale)

        return self.selections.take(layer, choose)

    def select_pools(self, layer: int, q: Tensor, rows: Tensor, weights: Tensor, pools: Pools) -> Tensor:
        self.check_nothing_ahead(layer)
        return self.selections.take(layer, lambda: select_pools(q, rows, weights, self._plan(), pools))

    def attend_selected(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, settings: AttentionSettings
    ) -> Tensor:
        out, _ = sparse_attention(q, k, v, self.rows_of(selected), settings.scale, settings.sinks)
        return out

    def rows_of(self, selected: Tensor) -> Tensor:
        """[T, K] rows of the batch's keys at ``selected`` positions of each row's sequence; -1 where there is none."""
        return selected_rows(selected, *self._plan())

    def _plan(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
        batch = self.batch
        return batch.query_offsets, batch.kv_offsets, batch.kv_lengths, batch.block_tables, 1

    def scan(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, *, scale: float, delta: bool,
        rates: Tensor | None = None, part: int = 0,
    ) -> Tensor:  # fmt: skip
        if self._parents is None:
            self._parents = torch.full_like(self.batch.kv_lengths, -1)
        plan = self.batch.query_offsets, self._parents, None
        out, _ = linear_recurrence(q, k, v, g, beta, *plan, scale, delta, rates=rates, chunked=self.chunked)
        return out

    def convolve(
        self, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
        part: int = 0,
    ) -> Tensor:  # fmt: skip
        past = self.past(weight.shape[1] - 1)
        return causal_conv(x, weight, bias, self.batch.query_offsets, past, None, activation)

    def record_routing(self, layer: int, ids: Tensor) -> None:
        """Nothing: there is no state to keep it."""

    def past(self, count: int) -> Tensor:
        """[S, count] rows of the tokens before each segment's first, oldest first; -1 where there is none."""
        if count not in self._past:
            batch = self.batch
            start = batch.kv_lengths - batch.query_offsets.diff()
            position = start[:, None] + torch.arange(-count, 0, device=start.device)
            if batch.block_tables is None:
                self._past[count] = torch.full_like(position, -1)
            else:
                self._past[count] = torch.where(position < 0, -1, batch.block_tables.gather(1, position.clamp_min(0)))
        return self._past[count]
