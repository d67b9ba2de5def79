"""What lies between a layer's projections and its attention as one op, for captured decode steps."""

from torch import Tensor

from toolkit.ops.registry import Op, register
from toolkit.ops.rotary_write import reference

__all__ = ["rotary_write", "rotary_write_int8"]

_OP: Op[Tensor] = register(
    "rotary_write(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, float? eps, float offset,"
    " Tensor cos, Tensor sin, bool interleaved, Tensor(a!) keys, Tensor(b!) values, Tensor slots) -> Tensor",
    reference=reference.rotary_write,
    fake=reference.rotary_write_fake,
    triton="toolkit.ops.rotary_write.triton.rotary_write",
)
_INT8: Op[Tensor] = register(
    "rotary_write_int8(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, float? eps, float offset,"
    " Tensor cos, Tensor sin, bool interleaved, Tensor(a!) keys, Tensor(b!) key_scales, Tensor(c!) values,"
    " Tensor(d!) value_scales, Tensor slots) -> Tensor",
    reference=reference.rotary_write_int8,
    fake=reference.rotary_write_int8_fake,
    triton="toolkit.ops.rotary_write.reference.rotary_write_int8",  # the ops one after the other, by their kernels
)


def rotary_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float | None,
    offset: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """RMS norm of each head (if any) and rotation of queries and keys; keys and values go to their slots.

    ``rotary(rms_norm(q, q_weight), cos, sin)`` is returned; ``state_write(keys, rotary(rms_norm(k, k_weight), cos,
    sin), slots)`` and ``state_write(values, v, slots)`` are done. No gradient.

    Args:
        q: the queries of T tokens, Hq * D numbers each, in any shape; float32, float64, bfloat16 or float16.
        k: H * D numbers each.
        v: H * V numbers each.
        q_weight, k_weight: [D] of the norms, or None.
        eps: of the norms; None for no norms.
        offset: added to their weights.
        cos, sin: [T, R], R even and at most D.
        interleaved: as for ``rotary``.
        keys: [slots, H, D] in q's dtype, written in place.
        values: [slots, H, V], written in place.
        slots: [T] int64, T >= 1, all different where not negative; negative ones are skipped.
        impl: None (by device), "reference", "cpu" or "triton".

    Returns:
        [T, Hq, D] in q's dtype.

    Raises:
        RuntimeError: for shapes or dtypes that do not fit; for a slot outside the pools, before anything is written.

    Numerics: bitwise identical to the ops one after the other, 16-bit rows rounded as they round them. On CUDA one
    launch, too; a slot outside the pools is skipped there.
    """
    return _OP.select(impl)(q, k, v, q_weight, k_weight, eps, offset, cos, sin, interleaved, keys, values, slots)


def rotary_write_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float | None,
    offset: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    keys: Tensor,
    key_scales: Tensor,
    values: Tensor,
    value_scales: Tensor,
    slots: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """``rotary_write`` into pools of eight bits: ``state_write_int8`` in the place of ``state_write``.

    Args:
        keys, values: [slots, H, D] and [slots, H, V] int8, written in place.
        key_scales, value_scales: [slots, H, 1] float32, written in place.
        Others as for ``rotary_write``.

    Returns:
        [T, Hq, D] in q's dtype.

    Raises:
        RuntimeError: as ``rotary_write``.
    """
    pools = keys, key_scales, values, value_scales
    return _INT8.select(impl)(q, k, v, q_weight, k_weight, eps, offset, cos, sin, interleaved, *pools, slots)
