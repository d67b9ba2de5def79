"""What lies between a layer's projections and its attention as one op, for captured decode steps."""

from torch import Tensor

from toolkit.ops.registry import register
from toolkit.ops.rotary_write import reference

__all__ = ["rotary_write"]

_OP = register(
    "rotary_write(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, float? eps, float offset,"
    " Tensor cos, Tensor sin, bool interleaved, Tensor(a!) keys, Tensor(b!) values, Tensor slots) -> Tensor",
    reference=reference.rotary_write,
    fake=reference.rotary_write_fake,
    triton="toolkit.ops.rotary_write.reference.rotary_write",  # the ops one after the other, by their own kernels
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

    Numerics: bitwise identical to the ops one after the other, 16-bit rows rounded as they round them. On CUDA it is
    those ops.
    """
    return _OP.select(impl)(q, k, v, q_weight, k_weight, eps, offset, cos, sin, interleaved, keys, values, slots)
