"""Rotary tables: cosines and sines of each token's position."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.ops.rotary import rotary_tables
from toolkit.state.active import get_forward_context
from toolkit.state.rotary_regimes import RotaryRegimes

# From (cos, sin), [..., F] each, to the tables in the layout that a model multiplies by.
LAYOUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "twice": lambda cos, sin: (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)),
    "repeated": lambda cos, sin: (cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)),
    "once": lambda cos, sin: (cos, sin),
    "complex": torch.complex,
}

Frequencies = Callable[[nn.Module, int, str | None], tuple[Tensor, float]]
"""Of a module, a sequence length and a layer type: the frequencies [F] and the factor of the tables."""


def rotary_tables_forward(
    layout: str = "twice", axes: Tensor | None = None, in_float32: bool = False
) -> Callable[..., Any]:
    """Forward of a rotary embedding with the buffer ``inv_freq`` [F], or one ``<layer_type>_inv_freq`` per layer type.

    The forward takes x (for its dtype), position_ids [B, T] and a layer_type, and returns cosines and sines in x's
    dtype, or complex numbers in complex64.

    Args:
        layout: a name of ``LAYOUTS``.
        axes: [F] the axis of each frequency; position_ids may be [A, B, T] then, positions along each of A axes
            (``toolkit.ops.rotary.rotary_tables``).
        in_float32: whether cosines and sines are float32 beside an x of 16 bits (OLMo, ERNIE 4.5).
    """

    @torch.no_grad()
    def forward(self: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        prefix = "" if layer_type is None else f"{layer_type}_"
        inv_freq = getattr(self, f"{prefix}inv_freq")
        scaling = float(getattr(self, f"{prefix}attention_scaling", 1.0))
        return _tables(x, position_ids, inv_freq, scaling, layout, axes, in_float32)

    return forward


def _tables(
    x: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    scaling: float,
    layout: str,
    axes: Tensor | None,
    in_float32: bool,
) -> Any:
    along = axes.to(inv_freq.device) if axes is not None and position_ids.dim() == 3 else None
    dtype = torch.promote_types(x.dtype, torch.float32) if in_float32 else x.dtype
    dtype = torch.float32 if layout == "complex" else dtype
    if position_ids.is_floating_point() and not torch.equal(position_ids, position_ids.trunc()):
        cos, sin = _between_positions(position_ids, inv_freq, scaling, dtype, along)
    else:
        cos, sin = rotary_tables(position_ids.long(), inv_freq, scaling, dtype, along)
    if layout == "twice":
        return cos, sin
    half = inv_freq.shape[0]
    return LAYOUTS[layout](cos[..., :half], sin[..., :half])


def _between_positions(
    position_ids: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype, along: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``rotary_tables`` of positions that are no whole numbers: the frames of Qwen3-Omni's videos."""
    positions = position_ids.float()
    of_frequency = positions[..., None] if along is None else positions[along].movedim(0, -1)
    angles = of_frequency * inv_freq.float()
    angles = torch.cat([angles, angles], -1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def length_dependent_forward(
    own: Callable[..., Any],
    frequencies: Frequencies,
    regimes: dict[str | None, RotaryRegimes | None],
    layout: str = "twice",
    axes: Tensor | None = None,
    in_float32: bool = False,
) -> Callable[..., Any]:
    """``rotary_tables_forward`` of a module whose frequencies depend on the length of the sequence (LongRoPE, NTK).

    In a ragged batch every row has the tables of its sequence's length (``RaggedBatch.rotary_lengths``), beside any
    other sequences, and the module does not change. An ordinary call has those of its longest sequence, as the
    module's own forward.

    Args:
        own: the module's own forward.
        frequencies: of a sequence length.
        regimes: of each layer type, which lengths have the same tables; None where all have.
    """
    kept: dict[tuple[Any, ...], tuple[Tensor, float]] = {}
    live = rotary_tables_forward(layout, axes, in_float32)

    def of_length(module: nn.Module, length: int, layer_type: str | None, device: torch.device) -> tuple[Tensor, float]:
        buffer = getattr(module, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq")
        key = length, layer_type, device, buffer.dtype
        if key not in kept:
            if len(kept) >= _MOST_KEPT:  # one more for each length, where every length has other frequencies
                kept.clear()
            with torch.inference_mode(False):  # kept, and read by later forwards of every kind
                inv_freq, scaling = frequencies(module, length, layer_type)
                kept[key] = inv_freq.to(device), scaling
        return kept[key]

    @torch.no_grad()
    def forward(self: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        context, regime = get_forward_context(), regimes[layer_type]

        def tables(length: int) -> Any:
            frequencies_F, scaling = of_length(self, length, layer_type, position_ids.device)
            return _tables(x, position_ids, frequencies_F, scaling, layout, axes, in_float32)

        if regime is None:
            return tables(1)
        if context is not None:
            lengths = context.rotary_lengths(regime)
        elif regime.varies_after is None:
            lengths = position_ids.amax()[None] + 1
        else:  # by the calls before, too: what a long one has set stays until a short one comes
            own(self, x, position_ids, *(() if layer_type is None else (layer_type,)))
            return live(self, x, position_ids, layer_type)
        if regime.varies_after is not None:
            found = None
            for length in lengths.unique().tolist():
                one = tables(length)
                found = one if found is None else _where(lengths == length, one, found)
            return found
        found = tables(1)
        for border in regime.borders:
            found = _where(lengths > border, tables(border + 1), found)
        return found

    return forward


_MOST_KEPT = 256


def _where(rows: Tensor, tables: Any, others: Any) -> Any:
    """``tables`` in ``rows`` [T], ``others`` elsewhere; [1, T, F] each, or pairs of those."""
    if isinstance(tables, Tensor):
        return torch.where(rows[None, :, None], tables, others)
    return tuple(torch.where(rows[None, :, None], one, other) for one, other in zip(tables, others, strict=True))
