"""Writing rows of state into their slots, in plain torch: the specification."""

from torch import Tensor


def state_write(pool: Tensor, rows: Tensor, slots: Tensor) -> None:
    """See ``toolkit.ops.state_write.state_write``. Without a synchronisation between host and device."""
    if slots.numel() == 0:
        return
    # A skipped row repeats the write of the first kept one; with none kept, slot 0 gets what it holds.
    kept = slots >= 0
    first = kept.long().argmax()
    target = slots[first].clamp(min=0)
    shape = (-1,) + (1,) * (rows.dim() - 1)
    fallback = rows[first].to(pool.dtype).where(kept[first], pool[target])
    source = rows.to(pool.dtype).where(kept.view(shape), fallback)
    pool.index_put_((slots.where(kept, target),), source)
