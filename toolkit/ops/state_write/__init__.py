"""Writing new rows of keys, values or other state into the slots of a pool."""

from torch import Tensor

from toolkit.ops.registry import register
from toolkit.ops.state_write import reference

__all__ = ["state_write"]


def _fake(pool: Tensor, rows: Tensor, slots: Tensor) -> None:
    return None


_OP = register(
    "state_write(Tensor(a!) pool, Tensor rows, Tensor slots) -> ()",
    reference=reference.state_write,
    fake=_fake,
    triton="toolkit.ops.state_write.triton.state_write",
)


def state_write(pool: Tensor, rows: Tensor, slots: Tensor, *, impl: str | None = None) -> None:
    """``pool[slots[t]] = rows[t]`` in place, for every t with ``slots[t] >= 0``; the others are skipped.

    Args:
        pool: [slots_total, H, D], any dtype.
        rows: [T, H, D], converted to pool's dtype.
        slots: [T] int64, all different where not negative.

    Raises:
        RuntimeError: in the native CPU kernel for a slot outside the pool, before anything is written. The reference
            raises torch's error; Triton skips such a slot, for it cannot tell without waiting for the device.

    No gradient: rows are written as values.
    """
    _OP.select(impl)(pool, rows.detach(), slots)
