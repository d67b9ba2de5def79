"""Norm, rotation and writing of new keys and values in plain torch: the specification."""

from torch import Tensor

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
    tokens = slots.shape[0]
    queries = q.reshape(tokens, -1, keys.shape[2])
    new_keys = k.reshape(tokens, keys.shape[1], keys.shape[2])
    if eps is not None:
        queries = rms_norm(queries, q_weight, eps, offset)
        new_keys = rms_norm(new_keys, k_weight, eps, offset)
    state_write(keys, rotary(new_keys, cos, sin, interleaved), slots)
    state_write(values, v.reshape(tokens, values.shape[1], values.shape[2]), slots)
    return rotary(queries, cos, sin, interleaved)


def rotary_write_fake(q: Tensor, k: Tensor, v: Tensor, *given: object) -> Tensor:
    keys, slots = given[-3], given[-1]
    assert isinstance(keys, Tensor)
    assert isinstance(slots, Tensor)
    return q.new_empty(slots.shape[0], q.numel() // (slots.shape[0] * keys.shape[2]), keys.shape[2])
