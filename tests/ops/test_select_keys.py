"""select_keys against sorted scores: integers, so that scores are exact and often equal; and over schedules."""

import pytest
import torch

from tests.helpers.attention import offsets
from tests.helpers.implementations import NATIVE, REFERENCE, SMALL, TRITON, impl_and_dtype, implementations, only_triton
from tests.helpers.rowwise import integers, seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.select_keys import select_keys, selected_rows

CASES = [(3, 7, 5), (1, 16, 1), (17, 24, 20)]  # H, D, K


def expected(q, k, weights, plan, topk):
    """By sorting (score, position) of every key that a row sees."""
    query_offsets, kv_offsets, kv_lengths = (x.tolist() for x in plan)
    found = [[] for _ in range(q.shape[0])]
    for s, (start, length) in enumerate(zip(kv_offsets, kv_lengths)):
        first, last = query_offsets[s], query_offsets[s + 1]
        for i in range(first, last):
            seen = length - (last - i) + 1
            products = q[i].double() @ k[start : start + max(seen, 0)].double().T
            scores = (weights[i].double()[:, None] * products.clamp_min(0)).sum(0).tolist()
            best = sorted(range(len(scores)), key=lambda j, of=scores: (-of[j], j))[:topk]
            found[i] = sorted(best)
    return found


def lists(selected):
    found = [[j for j in row if j >= 0] for row in selected.tolist()]
    assert all((row[len(own) :] == -1).all() for row, own in zip(selected, found))
    return found


@impl_and_dtype(implementations=[REFERENCE, NATIVE])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_best_keys_of_each_row(impl, dtype, case):
    """Keys that no sequence has are NaN; rows of padding select nothing; several rows see too few keys."""
    check_best_keys(impl, dtype, *case)


@only_triton
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(CASES[2], torch.float32)]
    + [pytest.param(case, dtype, marks=pytest.mark.sweep) for case in CASES[:2] for dtype in TRITON.dtypes],
    ids=str,
)
def test_the_best_keys_of_each_row_in_triton(impl, dtype, case):
    check_best_keys(impl, dtype, *case)


def check_best_keys(impl, dtype, heads, depth, topk):
    few = SMALL and impl is TRITON
    counts, lengths = ([1, 3, 2, 0], [33, 7, 1, 4]) if few else ([3, 40, 2, 0, 5], [30, 40, 1, 4, 70])
    starts = [2 + sum(lengths[:s]) + s for s in range(len(lengths))]
    plan = offsets(counts), torch.tensor(starts), torch.tensor(lengths)
    rows = int(plan[0][-1])
    q, weights = integers(-2, 3, rows + 2, heads, depth).to(dtype), integers(-2, 3, rows + 2, heads, seed=1).to(dtype)
    k = torch.full((160, depth), torch.nan, dtype=dtype)
    for start, length in zip(plan[1].tolist(), plan[2].tolist()):
        k[start : start + length] = integers(-2, 3, length, depth, seed=start).to(dtype)
    selected = select_keys(q, k, weights, *plan, topk=topk, scale=1.0)
    assert selected.shape == (rows + 2, topk)
    assert lists(selected) == [*expected(q[:rows], k, weights[:rows], plan, topk), [], []]


def test_in_blocks_and_step_by_step(impl):
    """Bitwise what one call over contiguous keys selects: for any chunks, neighbours and order of blocks."""
    n, topk = (11, 6) if SMALL and impl is TRITON else (37, 9)
    heads, depth, page = 5, 12, 4
    q, k, weights = seeded(n, heads, depth, dtype=torch.float32), seeded(n, depth, dtype=torch.float32, seed=1), None
    weights = seeded(n, heads, dtype=torch.float32, seed=2)
    zero, length = torch.tensor([0]), torch.tensor([n])
    whole = select_keys(q, k, weights, offsets([n]), zero, length, topk=topk)
    generator = torch.Generator("cpu").manual_seed(5)
    order = torch.randperm(14, generator=generator, device="cpu")[:10].to(k.device)
    pool = torch.full((14 * page, depth), torch.nan)
    pool[(order[:, None] * page + torch.arange(page)).flatten()[:n]] = k
    for first, last in ((0, 1), (1, 8), (8, 9), (9, n)):
        tables = torch.stack([order, order])
        stray = seeded(2, heads, depth, dtype=torch.float32, seed=last)
        asked, given = torch.cat([stray, q[first:last]]), torch.cat([weights[:2], weights[first:last]])
        plan = offsets([2, last - first]), zero.expand(2).contiguous(), torch.tensor([5, last])
        found = select_keys(asked, pool, given, *plan, tables, page, topk=topk)
        assert torch.equal(found[2:], whole[first:last])


@implementations(NATIVE)
def test_long_contexts_in_parts(impl):
    """More keys than one task takes, with few rows and with many, on one thread and on two."""
    n, topk = 9001, 300
    q, k = integers(-3, 4, 24, 2, 3).float(), integers(-3, 4, n, 3, seed=1).float()
    weights = integers(-3, 4, 24, 2, seed=2).float()
    zero, length = torch.tensor([0]), torch.tensor([n])
    want = expected(q, k, weights, (offsets([24]), zero, length), topk)
    for count in (1, 2):
        with threads(count):
            assert lists(select_keys(q, k, weights, offsets([24]), zero, length, topk=topk, scale=1.0)) == want
            last = select_keys(q[-1:], k, weights[-1:], offsets([1]), zero, length, topk=topk, scale=1.0)
            assert lists(last) == want[-1:]


def test_nan_ranks_last_and_zeros_are_equal(impl):
    """Heads of weight -0.0 and 0.0 give zeros of both signs: the lower position wins."""
    q = torch.ones(1, 1, 4)
    k = torch.tensor([[-1.0], [1.0], [-1.0], [torch.nan], [1.0]]).expand(5, 4).contiguous()
    plan = offsets([1]), torch.tensor([0]), torch.tensor([5])
    for weight, best in ((-0.0, [0, 1]), (0.0, [0, 1]), (1.0, [1, 4]), (-1.0, [0, 2])):
        weights = torch.full((1, 1), weight)
        assert lists(select_keys(q, k, weights, *plan, topk=2)) == [best]
    assert lists(select_keys(q, k, torch.ones(1, 1), *plan, topk=4)) == [[0, 1, 2, 4]]


def test_strided_and_empty(impl):
    q, k, weights = seeded(2, 3, 8), seeded(30, 8, seed=1), seeded(2, 3, seed=2)
    plan = offsets([2]), torch.tensor([5]), torch.tensor([25])
    want = select_keys(q, k, weights, *plan, topk=4)
    fused = torch.cat([k, k], 1)[:, 8:]
    heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(select_keys(heads_first, fused, weights.T.contiguous().T, *plan, topk=4), want)
    none = torch.zeros(0, dtype=torch.int64)
    assert select_keys(q[:0], k, weights[:0], offsets([]), none, none, topk=4).shape == (0, 4)
    assert (select_keys(q, k, weights, offsets([]), none, none, topk=4) == -1).all()


def test_rows_of_selected_positions():
    selected = torch.tensor([[0, 3], [2, -1], [1, 4], [-1, -1]])
    plan = offsets([2, 0, 1]), torch.tensor([10, 0, 20]), torch.tensor([4, 0, 5])
    assert selected_rows(selected, *plan).tolist() == [[10, 13], [12, -1], [21, 24], [-1, -1]]
    tables = torch.tensor([[7, 3], [0, 0], [1, 2]])
    assert selected_rows(selected, *plan, tables, 3).tolist() == [[21, 9], [23, -1], [4, 7], [-1, -1]]


def test_errors_are_one_sentence(impl):
    plan = offsets([2]), torch.tensor([0]), torch.tensor([2])
    with pytest.raises(ToolkitError, match=r"must have shapes \[T, H, D\], \[rows, D\] and \[T, H\], got"):
        select_keys(seeded(2, 1, 4), seeded(2, 5), seeded(2, 1), *plan, topk=1)
    with pytest.raises(ToolkitError, match="topk must be >= 1, got 0"):
        select_keys(seeded(2, 1, 4), seeded(2, 4), seeded(2, 1), *plan, topk=0)
    if impl is not TRITON:
        with pytest.raises((RuntimeError, IndexError)):
            select_keys(seeded(2, 1, 4), seeded(2, 4), seeded(2, 1), plan[0], plan[1] + 1, plan[2], topk=1)


def test_opcheck():
    q, k, weights = seeded(5, 2, 8, dtype=torch.float32), seeded(7, 8, dtype=torch.float32, seed=1), seeded(5, 2)
    plan = offsets([5]), torch.tensor([0]), torch.tensor([7])
    op = torch.ops.toolkit.select_keys.default
    torch.library.opcheck(op, (q, k, weights.float(), *plan, None, 0, 3, 3, 0.5))
