"""What the tests of the recurrent ops share: prefix trees of segments, and an oracle that knows nothing of sharing."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.rowwise import seeded

PrefixTrees = tuple[list[int], list[int]]  # lengths of the segments, and their parents as linear_recurrence takes them


def tensors(trees: PrefixTrees) -> tuple[Tensor, Tensor]:
    """(query_offsets, parents)."""
    lengths, parents = trees
    return torch.tensor([0, *lengths]).cumsum(0), torch.tensor(parents, dtype=torch.int64)


def random_trees(seed: int, segments: int, longest: int = 12, given: int = 0) -> PrefixTrees:
    """Segments in depth-first order, some of them empty; roots start from zeros or from one of ``given`` states."""
    choose = random.Random(seed)
    lengths = [choose.choice([0, 1, 2, choose.randint(1, longest)]) for _ in range(segments)]
    parents: list[int] = []
    path: list[int] = []
    for s in range(segments):
        path = path[: choose.randint(0, len(path))]
        parents.append(path[-1] if path else -1 - choose.randint(0, given))
        path.append(s)
    return lengths, parents


def sequences(trees: PrefixTrees) -> list[tuple[int, list[int]]]:
    """For each segment what its first ancestor starts from, and the rows from there to its end."""
    lengths, parents = trees
    bounds = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
    found: list[tuple[int, list[int]]] = []
    for s, parent in enumerate(parents):
        origin, before = found[parent] if parent >= 0 else (parent, [])
        found.append((origin, [*before, *range(bounds[s], bounds[s + 1])]))
    return found


def inputs(
    rows: int, key_heads: int, heads: int, depth: int, width: int, dtype: torch.dtype | None = None, seed: int = 0
) -> list[Tensor]:
    """q, k, v, g, beta as models make them: keys of length one, decays below one, beta between 0 and 1."""
    q, k = (F.normalize(seeded(rows, key_heads, depth, seed=seed + i), dim=-1) for i in (0, 1))
    v = seeded(rows, heads, width, seed=seed + 2)
    g = -F.softplus(seeded(rows, heads, seed=seed + 3) - 2)
    beta = seeded(rows, heads, seed=seed + 4).sigmoid()
    return [x.to(dtype or v.dtype) for x in (q, k, v, g, beta)]


def keyed_inputs(
    rows: int, key_heads: int, heads: int, depth: int, width: int, rated: bool, dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
    """``inputs`` whose gates are [T, H, K] without rates, or time steps [T, H] with rates [H, K]."""
    given = inputs(rows, key_heads, heads, depth, width, dtype, seed)
    if rated:
        given[3] = F.softplus(seeded(rows, heads, seed=seed + 3) - 1).to(given[0].dtype)
        return given, -seeded(heads, depth, seed=seed + 5).exp().to(given[0].dtype)
    given[3] = -F.softplus(seeded(rows, heads, depth, seed=seed + 3) - 2).to(given[0].dtype)
    return given, None


def unshared(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, initial: Tensor | None, trees: PrefixTrees,
    scale: float, delta: bool, rates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, finals): every segment's sequence from its beginning, with nothing shared."""
    group = v.shape[1] // k.shape[1]
    finals: list[Tensor] = []
    rows_out: dict[int, Tensor] = {}
    for s, (origin, rows) in enumerate(sequences(trees)):
        state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2]) if origin == -1 else initial[-2 - origin]
        own = len(rows) - trees[0][s]
        for i, t in enumerate(rows):
            key = k[t].repeat_interleave(group, 0)[:, None]  # [H, 1, K]
            log = g[t][:, None] if g.dim() == 2 else g[t]
            state = torch.exp(log if rates is None else log * rates)[..., None] * state
            u = v[t][:, None] - key @ state if delta else v[t][:, None]
            u = u if beta is None else beta[t][:, None, None] * u
            state = state + key.mT @ u
            if i >= own:
                rows_out[t] = scale * (q[t].repeat_interleave(group, 0)[:, None] @ state)[:, 0]
        finals.append(state)
    out = torch.stack([rows_out.get(t, torch.zeros_like(v[0])) for t in range(v.shape[0])])
    return out, torch.stack(finals)


@contextmanager
def poisoned() -> Iterator[None]:
    """torch fills fresh memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(5).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def cuts(rows: int, count: int, seed: int) -> list[tuple[int, int]]:
    """[0, rows) in chunks, some perhaps empty."""
    choose = random.Random(seed)
    return list(pairwise([0, *sorted(choose.randint(0, rows) for _ in range(count)), rows]))


def past_rows(trees: PrefixTrees, held: int) -> Tensor:
    """[S, held]: what lies before each segment, as ``causal_conv`` takes it; roots below -1 follow a tail."""
    found = []
    for s, (origin, rows) in enumerate(sequences(trees)):
        carried = [-2 - ((-2 - origin) * held + i) for i in range(held)] if origin < -1 else [-1] * held
        before = rows[: len(rows) - trees[0][s]]
        found.append([*carried, *before][-held:])
    return torch.tensor(found, dtype=torch.int64).view(-1, held)
