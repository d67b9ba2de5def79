"""Forwards over state: new tokens read their past from a pool's blocks and leave theirs there."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.attention import attention
from toolkit.ops.attention_int8 import attention_int8
from toolkit.ops.select_keys import select_keys, selected_rows
from toolkit.ops.sparse_attention import sparse_attention
from toolkit.state.batch import RaggedBatch
from toolkit.state.context import AttentionSettings, ForwardContext
from toolkit.state.kinds import PagedRows, Snapshots
from toolkit.state.pool import StatePool
from toolkit.state.pools import Plan, Pools, select_pools
from toolkit.state.prompt_windows import attend_prompt, sequence_positions
from toolkit.state.relative_bias import biased_attention


class PagedContext(ForwardContext):
    """``batch`` over ``pool``: ``batch.views`` has one view for each of ``pool.groups``. No gradients."""

    def __init__(self, batch: RaggedBatch, pool: StatePool) -> None:
        super().__init__(batch)
        self.pool = pool

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        """Attention over the blocks, after the new tokens' own keys and values went there."""
        batch = self.batch
        state, view = self._state(layer, "attend")
        assert isinstance(view, PagedRows)
        state.write((k, v), view, batch.query_offsets)
        keys, values, tables, *scales = state.operands(view)
        blocks = batch.kv_lengths, tables, self.pool.block_size, *settings.of_op
        if scales:  # of codes
            of_keys, of_values = scales
            plan = of_keys, of_values, batch.query_offsets, *blocks, self.seen_ahead(layer)
            out, _ = attention_int8(q, keys, values, *plan)
        else:
            dense = batch.query_offsets, batch.kv_offsets, *blocks, None, self.seen_ahead(layer)
            out, _ = attention(q, keys, values, *dense)
        return out

    def attend_biased(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, bias: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        batch = self.batch
        self.check_nothing_ahead(layer)
        state, view = self._state(layer, "attend")
        assert isinstance(view, PagedRows)

        def attend(q: Tensor, keys: Tensor, v: Tensor, window: int, behind: int) -> tuple[Tensor, Tensor]:
            if not behind:
                state.write((keys, v), view, batch.query_offsets)
            kept, values, tables = state.operands(view)
            lengths = (batch.kv_lengths - behind).clamp_min(0) if behind else batch.kv_lengths
            plan = batch.query_offsets, batch.kv_offsets, lengths, tables, self.pool.block_size
            return attention(q, kept, values, *plan, settings.scale, window)

        return biased_attention(attend, q, k, v, settings, bias, sinks, sequence_positions(batch))

    def attend_prompt(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, window: int
    ) -> Tensor:
        return attend_prompt(self, layer, q, k, v, settings, window)

    def select(self, layer: int, q: Tensor, k: Tensor, weights: Tensor, topk: int, *, scale: float) -> Tensor:
        """The selection over the blocks, after the new tokens' own keys went there."""
        keys, plan = self._indexed(layer, k)
        return self._selected(
            layer, lambda: select_keys(q.to(keys.dtype), keys, weights, *plan, topk=topk, scale=scale)
        )

    def select_pools(self, layer: int, q: Tensor, rows: Tensor, weights: Tensor, pools: Pools) -> Tensor:
        kept, plan = self._indexed(layer, rows)
        return self._selected(layer, lambda: select_pools(q, kept, weights, plan, pools))

    def _indexed(self, layer: int, rows: Tensor) -> tuple[Tensor, Plan]:
        """What a layer's indexer has kept of all tokens, those of the new ones included, and where it lies."""
        batch = self.batch
        state, view = self._state(layer, "select")
        assert isinstance(view, PagedRows)
        state.write((rows[:, None],), view, batch.query_offsets)
        kept, tables = state.operands(view)
        return kept, (batch.query_offsets, batch.kv_offsets, batch.kv_lengths, tables, self.pool.block_size)

    def _selected(self, layer: int, choose: Callable[[], Tensor]) -> Tensor:
        """What ``choose`` selects, or the batch gives, after it was recorded where the state does."""
        self.check_nothing_ahead(layer)
        selected = self.selections.take(layer, choose)
        if self.pool.has(layer, "record_selection"):
            kept, view = self._state(layer, "record_selection")
            kept.write((selected[:, None],), view, self.batch.query_offsets)
        return selected

    def attend_selected(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, settings: AttentionSettings
    ) -> Tensor:
        batch = self.batch
        state, view = self._state(layer, "attend")
        assert isinstance(view, PagedRows)
        state.write((k, v), view, batch.query_offsets)
        keys, values, tables = state.operands(view)
        plan = batch.query_offsets, batch.kv_offsets, batch.kv_lengths, tables, self.pool.block_size
        out, _ = sparse_attention(q, keys, values, selected_rows(selected, *plan), settings.scale, settings.sinks)
        return out

    def scan(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, *, scale: float, delta: bool,
        rates: Tensor | None = None, part: int = 0,
    ) -> Tensor:  # fmt: skip
        state, view = self._state(layer, "scan", part)
        plan = view, self.batch.query_offsets
        out: Tensor = state.scan(q, k, v, g, beta, *plan, scale, delta, rates, chunked=self.chunked)
        return out

    def convolve(
        self, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
        part: int = 0,
    ) -> Tensor:  # fmt: skip
        state, view = self._state(layer, "convolve", part)
        out: Tensor = state.convolve(x, weight, bias, activation, view, self.batch.query_offsets)
        return out

    def record_routing(self, layer: int, ids: Tensor) -> None:
        if self.pool.has(layer, "record_routing"):
            if len(ids) != len(self.batch.tokens):
                raise ToolkitError(
                    f"a router must choose experts for all {len(self.batch.tokens)} tokens where they are returned, "
                    f"got {len(ids)}; the model routes tokens of images apart: set enable_return_routed_experts=False."
                )
            state, view = self._state(layer, "record_routing")
            state.write((ids[:, None],), view, self.batch.query_offsets)

    @property
    def keeps_hidden(self) -> bool:
        return self.pool.has(0, "record_hidden")

    def record_hidden(self, hidden: Tensor) -> None:
        state, view = self._state(0, "record_hidden")
        state.write((hidden[:, None],), view, self.batch.query_offsets)

    def _state(self, layer: int, op: str, part: int = 0) -> tuple[Any, PagedRows | Snapshots]:
        """The state kind that serves an op of a layer, and the batch's view of its group."""
        state, group = self.pool.find(layer, op, part)
        return state, self.batch.views[group]
