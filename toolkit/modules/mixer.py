"""Recurrent mixers over a ragged batch: the functions that a mixer's own forward calls, with the context's past.

A mixer (gated delta rule, state-space duality, selective scan, short convolution) projects, convolves, scans and
projects again. Its own code does the projecting; the convolution and the scan are these. Shapes: B = 1 batch, T tokens,
C channels, H value heads, G key heads, K key width, V value width, N states of a channel.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.ops.rms_norm import rms_norm
from toolkit.state.context import ForwardContext


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    width = x.shape[-1]
    normed: Tensor = rms_norm(x, None, eps / width)
    out: Tensor = normed * width**-0.5
    return out


def convolution(layer: int, context: ForwardContext, part: int = 0) -> Callable[..., Tensor]:
    """``f(hidden_states [1, C, T], weight [C, width], bias, activation)``: [1, C, T]."""

    def convolve(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
    ) -> Tensor:
        kind = "silu" if activation in ("silu", "swish") else activation
        return context.convolve(layer, hidden_states[0].T, weight, bias, kind, part=part).T[None]

    return convolve


def gated_delta_rule(layer: int, context: ForwardContext) -> Callable[..., tuple[Tensor, None]]:
    """``f(query, key [1, T, G, K], value [1, T, H, V], g, beta [1, T, H])``: ([1, T, H, V], None).

    g may be [1, T, H, K], with a decay for each key (Kimi delta attention).
    """

    def scan(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[Tensor, None]:
        q, k = (l2_norm(x) if use_qk_l2norm_in_kernel else x for x in (query[0], key[0]))
        dtype = torch.promote_types(value.dtype, torch.float32)
        q, k, v = (x.to(value.dtype if context.chunked else dtype) for x in (q, k, value[0]))
        g, beta = (x[0].to(dtype) for x in (g, beta))
        out = context.scan(layer, q, k, v, g, beta, scale=q.shape[-1] ** -0.5, delta=True)
        return out[None].to(value.dtype), None

    return scan


def state_space(layer: int, context: ForwardContext) -> Callable[..., Tensor]:
    """``f(x [1, T, H, V], dt [1, T, H], A [H], B, C [1, T, G, K], chunk, D [H])``: [1, T, H, V]."""

    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int = 0,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **_: Any,
    ) -> Any:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        if dt_bias is not None:
            dt = dt + dt_bias.to(dt.dtype)
        if dt_softplus:
            dt = F.softplus(dt)
        step = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])[0].to(dtype)
        rows = hidden_states.dtype if context.chunked else dtype
        x, b, c = (part[0].to(rows) for part in (hidden_states, B, C))
        out = context.scan(layer, c, b, x, A.to(dtype) * step, step, scale=1.0, delta=False).to(dtype)
        if D is not None:
            out = out + D.to(dtype)[:, None] * x
        return (out[None], None) if return_final_states else out[None]

    return scan


def selective_scan(layer: int, context: ForwardContext) -> Callable[..., Any]:
    """``f(x, dt [1, C, T], A [C, N], B, C [1, N, T], D [C], z [1, C, T], delta_bias [C])``: [1, C, T].

    A mixer with heads calls it once for each.
    """
    parts = itertools.count()

    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **_: Any,
    ) -> Any:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        step = dt[0].T if delta_bias is None else dt[0].T + delta_bias.to(dt.dtype)
        step = (F.softplus(step) if delta_softplus else step).to(dtype)
        x, b, c = (part[0].T.to(dtype) for part in (hidden_states, B, C))
        settings: dict[str, Any] = {"scale": 1.0, "delta": False, "rates": A.to(dtype), "part": next(parts)}
        out = context.scan(layer, c[:, None], b[:, None], x[..., None], step, step, **settings)[..., 0]
        if D is not None:
            out = out + x * D
        if z is not None:
            out = out * F.silu(z[0].T)
        return (out.T[None], None) if return_last_state else out.T[None]

    return scan


def declined(layer: int, context: ForwardContext) -> Callable[..., None]:
    """For a function that fuses the whole mixer where it can: None, so that the mixer runs its unfused code."""
    return lambda *args, **kwargs: None
