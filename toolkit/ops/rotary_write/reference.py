"""Norm, rotation and writing of new keys and values in plain torch: the specification."""

from torch import Tensor

from toolkit.ops.int8_rows import state_write_int8
from toolkit.ops.rms_norm import rms_norm
from toolkit.ops.rotary import rotary
from toolkit.ops.state_write import state_write


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
) -> Tensor:
    """The ops one after the other, by the device of their tensors."""
    rows = _rows(q, k, v, q_weight, k_weight, eps, offset, cos, sin, interleaved, keys, values)
    for pool, new in zip((keys, values), rows[1:], strict=True):
        state_write(pool, new, slots)
    return rows[0]


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
) -> Tensor:
    """The ops one after the other, by the device of their tensors."""
    rows = _rows(q, k, v, q_weight, k_weight, eps, offset, cos, sin, interleaved, keys, values)
    state_write_int8(keys, key_scales, rows[1], slots)
    state_write_int8(values, value_scales, rows[2], slots)
    return rows[0]


def _rows(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the new tokens, as attention reads them."""
    tokens = cos.shape[0]
    queries = q.reshape(tokens, -1, keys.shape[2])
    new_keys = k.reshape(tokens, keys.shape[1], keys.shape[2])
    if eps is not None:
        queries = rms_norm(queries, q_weight, eps, offset)
        new_keys = rms_norm(new_keys, k_weight, eps, offset)
    new_values = v.reshape(tokens, values.shape[1], values.shape[2])
    return rotary(queries, cos, sin, interleaved), rotary(new_keys, cos, sin, interleaved), new_values


def rotary_write_fake(q: Tensor, k: Tensor, v: Tensor, *given: object) -> Tensor:
    return _empty(q, given[-3], given[-1])


def rotary_write_int8_fake(q: Tensor, k: Tensor, v: Tensor, *given: object) -> Tensor:
    return _empty(q, given[-5], given[-1])


def _empty(q: Tensor, keys: object, slots: object) -> Tensor:
    assert isinstance(keys, Tensor)
    assert isinstance(slots, Tensor)
    return q.new_empty(slots.shape[0], q.numel() // (slots.shape[0] * keys.shape[2]), keys.shape[2])
