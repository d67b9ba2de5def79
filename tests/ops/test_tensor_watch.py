"""A watch of tensors sees what may happen to them, in both implementations."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from toolkit.ops import native
from toolkit.ops.tensor_watch import MemoryHints, watch_tensors

IMPLEMENTATIONS = ["reference", *(["cpu"] if native.load() else [])]


def some():
    torch.manual_seed(0)
    whole = torch.randn(8, 6)
    return [torch.randn(3, 4), nn.Parameter(torch.randn(5)), torch.zeros(()), whole[2:4], whole.t(), torch.empty(0, 3)]


WRITES = {
    "in place": (0, lambda one: one.mul_(2)),
    "a parameter": (1, lambda one: one.detach().add_(1)),
    "a scalar": (2, lambda one: one.fill_(3)),
    "past the counter": (0, lambda one: one.data.copy_(one * 2)),
    "past the counter of a view": (3, lambda one: one.data.copy_(one * 2)),
    "an empty tensor": (5, lambda one: one.zero_()),
}
MOVES = {
    "other memory": (0, lambda one: setattr(one, "data", one.clone())),
    "other memory of a parameter": (1, lambda one: setattr(one, "data", one.detach() + 1)),
    "another view": (0, lambda one: setattr(one, "data", one.t())),
    "fewer rows": (0, lambda one: setattr(one, "data", one[:2])),
    "later rows": (0, lambda one: setattr(one, "data", one[1:])),
    "another shape of as many": (0, lambda one: setattr(one, "data", one.view(4, 3))),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_watch_sees_writes_and_moves(impl):
    for name, (at, write) in {**WRITES, **MOVES}.items():
        tensors = some()
        watch = watch_tensors(tensors, impl)
        watch.ask_for_all()
        before = watch.stamps()
        assert watch.look(tensors) == [], name
        with torch.no_grad():
            write(tensors[at])
        seen = watch.look(tensors)
        if name in MOVES:
            assert seen is None, name
            assert watch.look(tensors) is None, name
            assert watch.stamps() == before, name
            continue
        assert at in seen, name
        # Views of one storage share a counter.
        assert set(seen) <= ({at, 3, 4} if at in (3, 4) else {at}), name
        assert watch.look(tensors) == [], name
        assert [one for one, (old, new) in enumerate(zip(before, watch.stamps())) if old != new] == seen, name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_tensor_that_replaces_another_is_seen(impl):
    tensors = some()
    watch = watch_tensors(tensors, impl)
    assert watch.look([*tensors[:2], tensors[2].detach(), *tensors[3:]]) is None
    assert watch.look([tensors[1], tensors[0], *tensors[2:]]) is None
    assert watch.look(tensors[:-1]) is None
    assert watch.look(tensors) == []
    for other in (None, "weight", 3):
        with contextlib.suppress(RuntimeError, TypeError):
            assert watch.look([other, *tensors[1:]]) is None


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_watch_keeps_nothing_alive_and_tells_reused_memory_apart(impl):
    layer = nn.Linear(64, 64)
    watch = watch_tensors([layer.weight], impl)
    hints = MemoryHints([{}], [id(layer.weight), 8, 0])
    dead, storage = weakref.ref(layer.weight), StorageWeakRef(layer.weight.untyped_storage())
    moved = 0
    for _ in range(30):
        layer.weight = nn.Parameter(torch.zeros(64, 64))
        assert watch.look([layer.weight]) is None
        moved += 1
    gc.collect()
    assert dead() is None
    assert storage.expired()
    hints.ask_for_all()  # of memory that may be freed
    assert moved == 30


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_watched_tensors_can_be_swapped(impl):
    """As ``Module.to`` does where torch is asked to: it refuses tensors that something refers to weakly."""
    one, other = torch.zeros(3), torch.ones(3)
    watch = watch_tensors([one], impl)
    torch.utils.swap_tensors(one, other)
    assert watch.look([one]) is None
