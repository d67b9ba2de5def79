"""dispatch_plan: against a plain construction in Python, for any routing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.implementations import TRITON
from tests.helpers.moe_dense import routing
from tests.helpers.rowwise import integers
from toolkit.errors import ToolkitError
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.registry import has_native


def plain(ids: list[list[int]], experts: int, tile: int):
    """order, rows, offsets and the tiles that there are, by lists."""
    slots = [expert if 0 <= expert < experts else experts for token in ids for expert in token]
    order = sorted(range(len(slots)), key=lambda slot: (slots[slot], slot))
    row_of = {slot: row for row, slot in enumerate(order) if slots[slot] < experts}
    members = [[slot for slot in order if slots[slot] == e] for e in range(experts)]
    offsets = [sum(map(len, members[:e])) for e in range(experts + 1)]
    tiles = [[e, row] for e in range(experts) for row in range(offsets[e], offsets[e + 1], tile)]
    rows = [row_of.get(slot, -1) for slot in range(len(slots))]
    return order, rows, offsets, tiles


@st.composite
def routings(sample):
    experts, tokens, slots = (sample(st.integers(low, high)) for low, high in ((0, 6), (0, 20), (1, 4)))
    ids = sample(st.lists(st.lists(st.integers(-2, experts + 2), min_size=slots, max_size=slots),
                        min_size=tokens, max_size=tokens))  # fmt: skip
    return torch.tensor(ids, dtype=torch.int64).view(tokens, slots), experts, sample(st.sampled_from([1, 2, 3, 7, 64]))


def check(impl, ids, experts, tile):
    order, rows, offsets, tiles = dispatch_plan(ids, experts, tile, impl=impl.option)
    expected = plain(ids.tolist(), experts, tile)
    assert order.tolist() == expected[0]
    assert rows.flatten().tolist() == expected[1]
    assert rows.shape == ids.shape
    assert offsets.tolist() == expected[2]
    assert len(tiles) == ids.numel() // tile + min(experts, ids.numel()) >= len(expected[3])
    assert tiles.tolist() == expected[3] + [[experts, offsets.tolist()[-1]]] * (len(tiles) - len(expected[3]))
    assert {value.dtype for value in (order, rows, offsets, tiles)} == {torch.int64}


def test_random_routings(impl):
    """Any routing; fewer of them in Triton's interpreter."""

    @given(routings())
    @settings(max_examples=30 if impl is TRITON else 200, deadline=None)
    def run(sample):
        check(impl, *sample)

    run()


@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "tile"),
    [
        (0, 2, 4, 4), (3, 0, 4, 4), (1, 1, 1, 1), (7, 2, 5, 3), (40, 4, 9, 8), (90, 3, 7, 16), (64, 1, 3, 64),
        (33, 8, 128, 64), (5, 2, 0, 4), (70, 130, 20, 300),
    ],
)  # fmt: skip
def test_routings_of_every_size(impl, tokens, slots, experts, tile):
    ids = routing(tokens, slots, experts) if experts else torch.zeros(tokens, slots, dtype=torch.int64)
    ids[::3] -= 1  # -1 is skipped as experts is
    check(impl, ids, experts, tile)


def test_all_slots_of_one_expert_or_of_none(impl):
    for expert in (0, 6, 7, -5):
        check(impl, torch.full((50, 3), expert), 7, 16)


def test_edges(impl):
    order, rows, offsets, tiles = dispatch_plan(torch.empty(0, 4, dtype=torch.int64), 3, impl=impl.option)
    assert (order.numel(), rows.shape, offsets.tolist(), tiles.shape) == (0, (0, 4), [0, 0, 0, 0], (0, 2))
    order, rows, offsets, tiles = dispatch_plan(torch.zeros(5, 1, dtype=torch.int32), 1, 2, impl=impl.option)
    assert (order.tolist(), offsets.tolist(), tiles.tolist()) == ([0, 1, 2, 3, 4], [0, 5], [[0, 0], [0, 2], [0, 4]])
    order, rows, offsets, tiles = dispatch_plan(torch.full((3, 2), 4), 4, impl=impl.option)  # all skipped
    assert rows.eq(-1).all()
    assert (order.tolist(), offsets.tolist(), tiles.tolist()) == ([0, 1, 2, 3, 4, 5], [0] * 5, [[4, 0]] * 4)
    ids = integers(0, 7, 50, 6)
    for strided in (ids[::2, 1::2], ids.T):
        got = dispatch_plan(strided, 7, 4, impl=impl.option)
        assert all(torch.equal(*pair) for pair in zip(got, dispatch_plan(strided.contiguous(), 7, 4, impl=impl.option)))


def test_wrong_arguments_are_one_sentence():
    ids = torch.zeros(3, 2, dtype=torch.int64)
    for arguments in ((ids[0], 4), (ids.float(), 4), (ids, -1), (ids, 4, 0)):
        with pytest.raises(ToolkitError, match="dispatch_plan needs integer topk_ids"):
            dispatch_plan(*arguments)
    if has_native("dispatch_plan"):
        with pytest.raises(RuntimeError, match=r"needs int64 topk_ids \[T, K\]"):
            torch.ops.toolkit.dispatch_plan(ids.int(), 4, 64)


def test_opcheck():
    for ids in (torch.randint(0, 5, (7, 2)), torch.empty(0, 2, dtype=torch.int64)):
        torch.library.opcheck(torch.ops.toolkit.dispatch_plan.default, (ids, 4, 3))
