"""Random prefix trees of sequences, and dense float64 attention of the same sequences unshared: the oracle.

The oracle walks from each leaf to its root, gathers the rows of q, k and v on the way and attends to them by an
explicit softmax; autograd adds up what rows get from several sequences. It shares no code with the ops.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (scores, query positions, key positions, head)

# The modifiers' own definitions, and parameters for four heads.
SLOPES = torch.tensor([[0.5], [0.1], [-0.2], [0.0]])
CHUNKS = torch.tensor([[7.0], [16.0], [1.0], [1000.0]])


def alibi(x, query, key, head):
    return x + SLOPES[head, 0].double() * (key - query)


def chunked(x, query, key, head):
    size = int(CHUNKS[head, 0])
    return x.masked_fill(query // size != key // size, -math.inf)


ORACLES = {"": (None, None), "alibi": (alibi, SLOPES), "chunked": (chunked, CHUNKS)}


@dataclass
class Node:
    parent: int  # -1: none
    queries: int
    past: int  # tokens before the queries that are not in the batch, of a root


def random_nodes(rng: random.Random, trees: int, depth: int, longest: int, page: int) -> list[Node]:
    """Nodes of random trees, depth first. Some have no queries; what has children fills its pages."""
    nodes: list[Node] = []

    def grow(parent: int, level: int) -> None:
        children = rng.choice([0, 1, 2, 3]) if level < depth else 0
        queries = rng.choice([0, 1, rng.randint(1, longest), rng.randint(1, longest)])
        past = rng.choice([0, 0, rng.randint(1, longest)]) if parent < 0 else 0
        if children:
            queries += -(queries + past) % page
        nodes.append(Node(parent, queries, past))
        own = len(nodes) - 1
        for _ in range(children):
            grow(own, level + 1)

    for _ in range(trees):
        grow(-1, 1)
    return nodes


class PrefixTrees:
    """Tensors and indices of prefix trees. Rows of k and v that no sequence holds are NaN."""

    def __init__(
        self,
        seed: int,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        d: int = 16,
        v_dim: int | None = None,
        page: int = 1,
        trees: int = 2,
        depth: int = 5,
        longest: int = 9,
        padding: int = 2,
        dtype: torch.dtype = torch.float64,
        shuffled: bool = True,
        nodes: list[Node] | None = None,
    ) -> None:
        rng, g = random.Random(seed), torch.Generator("cpu").manual_seed(seed)
        self.nodes = random_nodes(rng, trees, depth, longest, page) if nodes is None else nodes
        self.page = page
        counts = [node.queries for node in self.nodes]
        self.query_offsets = torch.tensor([0, *counts]).cumsum(0)
        starts = self.query_offsets.tolist()
        lengths, self.last = [], list(range(len(self.nodes)))  # the last node of each subtree
        for node in self.nodes:
            lengths.append((lengths[node.parent] if node.parent >= 0 else node.past) + node.queries)
        for i in reversed(range(len(self.nodes))):
            if self.nodes[i].parent >= 0:
                self.last[self.nodes[i].parent] = max(self.last[self.nodes[i].parent], self.last[i])
        self.kv_lengths = torch.tensor(lengths)
        pages = [-(-n // page) for n in lengths]
        before = [pages[node.parent] if node.parent >= 0 else 0 for node in self.nodes]
        spare = 3
        free = list(range(sum(pages) - sum(before) + spare))
        if shuffled:
            rng.shuffle(free)
        free.reverse()
        self.rows = len(free) * page
        self.tables = torch.full((len(self.nodes), max(pages) + 1), 10**9)
        for i, node in enumerate(self.nodes):
            if node.parent >= 0:
                self.tables[i, : before[i]] = self.tables[node.parent, : before[i]]
            for p in range(before[i], pages[i]):
                self.tables[i, p] = free.pop()
        self.query_ranges = torch.zeros(self.rows, 3, dtype=torch.int64)
        for i, node in enumerate(self.nodes):
            own = range(lengths[i] - node.queries - node.past, lengths[i])
            for position in own:
                row = int(self.tables[i, position // page]) * page + position % page
                self.query_ranges[row] = torch.tensor([starts[i], starts[self.last[i] + 1], position])
        total = starts[-1] + padding
        v_dim = v_dim or d
        self.q = torch.randn(total, heads, d, generator=g, dtype=torch.float64).to(dtype)
        self.k = torch.randn(self.rows, kv_heads, d, generator=g, dtype=torch.float64).to(dtype)
        self.v = torch.randn(self.rows, kv_heads, v_dim, generator=g, dtype=torch.float64).to(dtype)
        self.grad = torch.randn(total, heads, v_dim, generator=g, dtype=torch.float64).to(dtype)
        self.held = torch.zeros(self.rows, dtype=torch.bool)
        for i, n in enumerate(lengths):
            self.held[[int(self.tables[i, j // page]) * page + j % page for j in range(n)]] = True
        self.k[~self.held], self.v[~self.held] = math.nan, math.nan

    @property
    def plan(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        offsets = torch.zeros(len(self.nodes), dtype=torch.int64)  # not looked at
        return self.query_offsets, offsets, self.kv_lengths, self.tables, self.page

    def paths(self) -> list[tuple[list[int], list[int]]]:
        """Of every leaf: the rows of its keys, and the row of q at each position (-1: not in the batch)."""
        starts, parents = self.query_offsets.tolist(), {node.parent for node in self.nodes}
        found = []
        for leaf in range(len(self.nodes)):
            if leaf in parents:
                continue
            queries, at = [], leaf
            while at >= 0:
                queries = [-1] * self.nodes[at].past + list(range(starts[at], starts[at + 1])) + queries
                at = self.nodes[at].parent
            keys = [int(self.tables[leaf, j // self.page]) * self.page + j % self.page for j in range(len(queries))]
            found.append((keys, queries))
        return found

    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        score: Score | None = None,
    ) -> tuple[Tensor, Tensor]:
        """out and lse of every row of q by the unshared sequences."""
        group = q.shape[1] // k.shape[1]
        out, lse = q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], -math.inf)
        done: set[int] = set()
        for key_rows, query_rows in self.paths():
            position = torch.tensor([p for p, row in enumerate(query_rows) if row >= 0 and row not in done])
            if not len(position):
                continue
            rows = torch.tensor(query_rows)[position]
            done.update(rows.tolist())
            key = torch.arange(len(key_rows))
            for h in range(q.shape[1]):
                x = q[rows, h] @ k[key_rows, h // group].T * scale
                if softcap:
                    x = softcap * torch.tanh(x / softcap)
                if score is not None:
                    x = score(x, position[:, None], key[None, :], h)
                hidden = key[None, :] > position[:, None]
                if window:
                    hidden = hidden | (key[None, :] <= position[:, None] - window)
                x = x.masked_fill(hidden, -math.inf)
                if sinks is not None:
                    x = torch.cat([x, sinks[h].expand(len(rows), 1)], 1)
                weights = x.softmax(-1)[:, : len(key_rows)]
                index = rows, torch.full_like(rows, h)
                out = out.index_put(index, weights @ v[key_rows, h // group])
                lse = lse.index_put(index, x.logsumexp(-1))
        return out, lse


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest value expected (of 1 where that is smaller)."""
    if not expected.numel():
        return 0.0
    wanted = expected.detach().double()
    return float((actual.detach().double() - wanted).abs().max() / wanted.abs().max().clamp(min=1))
