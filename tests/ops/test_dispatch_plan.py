"""dispatch_plan: against a plain construction in Python, for any routing."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.implementations import only_triton
from tests.helpers.moe_dense import routing
from toolkit.errors import ToolkitError
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.dispatch_plan import reference as plans
from toolkit.ops.registry import has_native

IMPLEMENTATIONS = ["reference", "cpu"] if has_native("dispatch_plan") else ["reference"]
every_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


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


@every_impl
@given(routings())
@settings(max_examples=200, deadline=None)
def test_is_the_plain_construction(impl, routing):
    ids, experts, tile = routing
    order, rows, offsets, tiles = dispatch_plan(ids, experts, tile, impl=impl)
    expected = plain(ids.tolist(), experts, tile)
    assert order.tolist() == expected[0]
    assert rows.flatten().tolist() == expected[1]
    assert rows.shape == ids.shape
    assert offsets.tolist() == expected[2]
    assert len(tiles) == ids.numel() // tile + min(experts, ids.numel()) >= len(expected[3])
    assert tiles.tolist() == expected[3] + [[experts, offsets.tolist()[-1]]] * (len(tiles) - len(expected[3]))
    assert {value.dtype for value in (order, rows, offsets, tiles)} == {torch.int64}


@every_impl
def test_edges(impl):
    order, rows, offsets, tiles = dispatch_plan(torch.empty(0, 4, dtype=torch.int64), 3, impl=impl)
    assert (order.numel(), rows.shape, offsets.tolist(), tiles.shape) == (0, (0, 4), [0, 0, 0, 0], (0, 2))
    order, rows, offsets, tiles = dispatch_plan(torch.zeros(5, 1, dtype=torch.int32), 1, 2, impl=impl)
    assert (order.tolist(), offsets.tolist(), tiles.tolist()) == ([0, 1, 2, 3, 4], [0, 5], [[0, 0], [0, 2], [0, 4]])
    order, rows, offsets, tiles = dispatch_plan(torch.full((3, 2), 4), 4, impl=impl)  # all skipped
    assert rows.eq(-1).all()
    assert (order.tolist(), offsets.tolist(), tiles.tolist()) == ([0, 1, 2, 3, 4, 5], [0] * 5, [[4, 0]] * 4)
    ids = torch.randint(0, 7, (50, 6), generator=torch.Generator().manual_seed(0))
    for strided in (ids[::2, 1::2], ids.T):
        got = dispatch_plan(strided, 7, 4, impl=impl)
        assert all(torch.equal(*pair) for pair in zip(got, dispatch_plan(strided.contiguous(), 7, 4, impl=impl)))


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


# The Triton launchers: their tiles, splits and limits.
launch_dispatch_plan = torch.ops.toolkit.dispatch_plan


def listed(ids, count, tile):
    """The plan in Python."""
    flat = ids.flatten().tolist()
    flat = [one if 0 <= one < count else count for one in flat]
    order = sorted(range(len(flat)), key=lambda slot: flat[slot])
    rows = [-1] * len(flat)
    for row, slot in enumerate(order):
        rows[slot] = row if flat[slot] < count else -1
    offsets = [sum(one < expert for one in flat) for expert in range(count + 1)]
    tiles = [
        [expert, first]
        for expert, (begin, end) in enumerate(itertools.pairwise(offsets))
        for first in range(begin, end, tile)
    ]
    bound = len(flat) // tile + min(count, len(flat))
    tiles += [[count, offsets[-1]]] * (bound - len(tiles))
    shapes = (len(flat),), ids.shape, (count + 1,), (bound, 2)
    return [torch.tensor(v, dtype=torch.int64).reshape(s) for v, s in zip((order, rows, offsets, tiles), shapes)]


@only_triton
@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "tile"),
    [
        (0, 2, 4, 4), (3, 0, 4, 4), (1, 1, 1, 1), (7, 2, 5, 3), (40, 4, 9, 8), (90, 3, 7, 16), (64, 1, 3, 64),
        (33, 8, 128, 64), (5, 2, 0, 4), (70, 130, 20, 300),
    ],
)  # fmt: skip
def test_the_plan_is_the_specification_s(tokens, slots, experts, tile):
    ids = routing(tokens, slots, experts) if experts else torch.zeros(tokens, slots, dtype=torch.int64)
    ids[::3] -= 1  # -1 is skipped as experts is
    got, wanted = launch_dispatch_plan(ids, experts, tile), plans.dispatch_plan(ids, experts, tile)
    for one, other, third in zip(got, wanted, listed(ids, experts, tile), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@only_triton
@pytest.mark.usefixtures("impl")
def test_all_slots_of_one_expert_or_of_none():
    for expert in (0, 6, 7, -5):
        ids = torch.full((50, 3), expert)
        for one, other in zip(launch_dispatch_plan(ids, 7, 16), plans.dispatch_plan(ids, 7, 16), strict=True):
            assert torch.equal(one, other)
    ids = routing(20, 4, 6)
    for one, other in zip(
        launch_dispatch_plan(ids.T.contiguous().T, 6, 8), plans.dispatch_plan(ids, 6, 8), strict=True
    ):
        assert torch.equal(one, other)


# experts, k, score, groups, kept groups, best of a group, normalise
ROUTERS = [
    (1, 1, "softmax", 1, 1, 1, False),
    (8, 2, "softmax", 1, 1, 1, True),
    (60, 4, "sigmoid", 6, 2, 2, True),
    (160, 6, "softmax", 8, 3, 1, False),
    (33, 33, "softplus", 1, 1, 1, True),
    (24, 6, "sigmoid", 3, 2, 4, False),
]
