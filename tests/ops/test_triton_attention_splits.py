"""Triton attention over contexts of several splits, in Triton's interpreter, whose splits are of 32 keys: against dense
float64 attention, and the bits of a row."""

import itertools
import math
import random

import pytest
import torch
import triton
import triton.language as tl
from test_triton_attention import Batch
from test_triton_attention_forest import check, run
from triton.runtime.interpreter import InterpreterBuilder

from tests.helpers.interpreter import poisoned, row_by_row
from tests.helpers.prefix_trees import Forest, Node
from toolkit.ops.attention import modifiers, tiles
from toolkit.ops.attention.modifiers import find
from toolkit.ops.attention.triton import attention
from toolkit.ops.attention.triton_backward import attention_backward

SPLIT = tiles.SPLITS.find("interpreter", torch.float32, 64)


@pytest.fixture(autouse=True)
def way(request, monkeypatch):
    """Every split a program of its own, one program for all of a row's splits, and that some row tiles at a time."""
    chosen = getattr(request, "param", "apart")
    if chosen != "apart":
        monkeypatch.setattr(tiles, "APART_ROWS", 0)
    if chosen == "in several launches":
        monkeypatch.setattr(tiles, "WORKSPACE", 1)
    return chosen


@pytest.mark.parametrize(
    ("way", "heads", "kv_heads", "d", "v_dim", "page", "options"),
    [
        ("apart", 4, 2, 20, 20, 7, {}),
        ("in turn", 4, 2, 20, 20, 7, {}),
        ("apart", 2, 1, 64, 40, 4, {"window": 41, "softcap": 2.0}),
        ("in several launches", 2, 1, 64, 40, 4, {"window": 41, "softcap": 2.0}),
        ("in turn", 17, 1, 16, 16, 16, {}),
    ],
    indirect=["way"],
)
def test_matches_dense_oracle(way, heads, kv_heads, d, v_dim, page, options):
    """Lengths on both sides of a split's end, a chunk across it, an empty sequence, and padding."""
    lengths = [(1, 3 * SPLIT + 5), (9, 2 * SPLIT - 4), (1, SPLIT - 1), (0, 7), (1, SPLIT), (3, 0)]
    if heads > 8:
        lengths = [(1, 2 * SPLIT), (2, SPLIT - 1)]
    with poisoned():
        Batch(1, lengths, heads, kv_heads, d, v_dim, page, padding=3).check(2e-5, **options)


@pytest.mark.parametrize(
    ("way", "modifier"), [("apart", "alibi"), ("in turn", ""), ("apart", "chunked"), ("in turn", "chunked")],
    indirect=["way"],
)  # fmt: skip
def test_gradients_of_a_forest(way, modifier):
    """Shared prefixes of several splits, with a sink, a window and a soft-cap; CHUNKS begin splits late."""
    nodes = [Node(-1, 9, 2 * SPLIT), Node(0, 5, 0), Node(0, 2, 0)]
    sinks = torch.tensor([0.3, 6.0, -40.0, 1.0])
    forest = Forest(3, heads=4, kv_heads=2, d=12, page=1, nodes=nodes, dtype=torch.float32)
    check(forest, 60 if modifier else 0, 2.0, modifier, sinks)


@pytest.mark.parametrize("way", ["apart", "in turn"], indirect=True)
def test_latent_heads(way):
    forest = Forest(4, heads=3, kv_heads=1, d=576, v_dim=512, nodes=[Node(-1, 3, 2 * SPLIT)], dtype=torch.float32)
    forest.q *= (16 / 576) ** 0.5
    forest.v = forest.k[..., :512]
    check(forest, tolerance=2e-5)


def test_a_window_of_one_key_at_the_edge_of_a_split():
    """The first of the two queries of a tile sees nothing of the second one's split, and the value is a key's own."""
    nodes = [Node(-1, 2, 3 * SPLIT - 1)]
    forest = Forest(5, heads=2, kv_heads=1, d=8, nodes=nodes, dtype=torch.float32)
    out, lse, *_ = run(forest, window=1)
    assert (lse[:2] > -math.inf).all()
    rows = [int(forest.tables[0, 3 * SPLIT - 1 + i]) for i in range(2)]
    assert torch.equal(out[:2], forest.v[rows].expand(-1, 2, -1))


@pytest.mark.parametrize(("window", "modifier"), [(0, ""), (45, ""), (0, "chunked")])
def test_bits_do_not_depend_on_chunks_neighbours_or_programs(window, modifier, monkeypatch):
    """Whole, in chunks and alone; beside longer and shorter sequences, so with other grids; in pages; in both ways."""
    monkeypatch.setattr(InterpreterBuilder, "create_dot", row_by_row)
    heads, length = 4, 2 * SPLIT + 9
    options = {}
    if modifier:
        options = {"modifier": modifier, "parameters": torch.tensor([[40.0], [7.0], [1000.0], [33.0]])}
    whole = Batch(8, [(length, 0)], heads, 2, 16)
    assert whole.q.shape[0] > SPLIT

    def call(q, k, v, *plan):
        return attention(q, k, v, *plan, whole.scale, window, 0.0, **options)

    monkeypatch.setattr(tiles, "APART_ROWS", 0)
    out, lse = call(whole.q, whole.k, whole.v, whole.offsets, whole.kv_offsets, whole.kv_lengths, None, 0)
    monkeypatch.undo()
    monkeypatch.setattr(InterpreterBuilder, "create_dot", row_by_row)
    rng = random.Random(9)
    cuts = sorted({0, SPLIT - 3, SPLIT, 2 * SPLIT - 1, 2 * SPLIT + 4, length - 1, length})
    for begin, end in itertools.pairwise(cuts):
        monkeypatch.setattr(tiles, "APART_ROWS", rng.choice([0, 512]))
        # Alone with exactly its keys (within one split: no split at all), and beside a longer neighbour in pages.
        plan = torch.tensor([0, end - begin]), whole.kv_offsets, torch.tensor([end]), None, 0
        rows = int(whole.kv_offsets[0])
        got = call(whole.q[begin:end], whole.k[: rows + end], whole.v[: rows + end], *plan)
        assert torch.equal(got[0], out[begin:end])
        assert torch.equal(got[1], lse[begin:end])
        noise = Batch(rng.randrange(1000), [(2, 3 * SPLIT), (1, 5)], heads, 2, 16)
        packed = torch.cat([noise.q[:2], whole.q[begin:end], noise.q[2:]])
        tables = torch.zeros(3, max(whole.tables.shape[1], noise.tables.shape[1]), dtype=torch.int64)
        pages = whole.k_pool.shape[0] // whole.page
        tables[1, : whole.tables.shape[1]] = whole.tables[0]
        for row, source in ((0, 0), (2, 1)):
            tables[row, : noise.tables.shape[1]] = noise.tables[source] + pages
        plan = (
            torch.tensor([0, 2, 2 + end - begin, 3 + end - begin]), torch.zeros(3, dtype=torch.int64),
            torch.tensor([noise.kv[0], end, noise.kv[1]]), tables, whole.page,
        )  # fmt: skip
        pools = torch.cat([whole.k_pool, noise.k_pool]), torch.cat([whole.v_pool, noise.v_pool])
        got = call(packed, *pools, *plan)
        assert torch.equal(got[0][2 : 2 + end - begin], out[begin:end])
        assert torch.equal(got[1][2 : 2 + end - begin], lse[begin:end])


@triton.jit
def chunk_begin(query, p):
    """The bound that a file may state as ``triton_first``; that of chunked costs registers, so it states none."""
    size = tl.load(p).to(tl.int32)
    return query // size * size


@pytest.mark.parametrize("paged", [False, True])
def test_skipping_what_a_modifier_hides_changes_no_bit(paged, monkeypatch):
    """Forward and every gradient with and without the bound; with it, whole tiles are not read."""
    length, heads = 2 * SPLIT + 7, 4
    q, k, v = (torch.randn(length, n, 16, generator=torch.Generator().manual_seed(n)) for n in (heads, 2, 2))
    parameters = torch.tensor([[16.0], [7.0], [40.0], [33.0]])
    plan = torch.tensor([0, length]), torch.tensor([0]), torch.tensor([length])
    tables = (torch.arange(length)[None], 1) if paged else (None, 0)
    position = torch.arange(length)
    query_ranges = torch.stack([torch.zeros_like(position), torch.full_like(position, length), position], 1)

    def everything():
        out, lse = attention(q, k, v, *plan, *tables, 0.3, 0, 0.0, None, "chunked", parameters)
        options = {"modifier": "chunked", "parameters": parameters, "query_ranges": query_ranges if paged else None}
        tensors = torch.ones_like(out), q, k, v, out, lse
        return out, lse, *attention_backward(*tensors, *plan, 0.3, 0, 0.0, *tables, **options)

    bare = everything()
    used = []
    bounded = {**find("chunked").device(), "first": chunk_begin}
    monkeypatch.setattr(modifiers.Modifier, "device", lambda self: used.append(self.name) or bounded)
    for a, b in zip(bare, everything()):
        assert torch.equal(a, b)
    assert used == ["chunked", "chunked"]
    # Keys of the chunks before the last queries' may be anything, which a weight of 0 would not forgive.
    k[:16], v[:16] = math.nan, math.nan
    last = torch.tensor([0, 3]), torch.tensor([0]), torch.tensor([length])
    out, lse = attention(q[-3:], k, v, *last, *tables, 0.3, 0, 0.0, None, "chunked", parameters)
    assert out.isfinite().all()
    tensors = torch.ones_like(out), q[-3:], k, v, out, lse
    options = {"modifier": "chunked", "parameters": parameters, "query_ranges": None}
    if paged:
        options["query_ranges"] = torch.stack([torch.zeros_like(position), torch.full_like(position, 3), position], 1)
    assert attention_backward(*tensors, *last, 0.3, 0, 0.0, *tables, **options)[0].isfinite().all()
