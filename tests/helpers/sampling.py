"""Random filters and seeds for the tests of sampling, and the distribution of a row by sorting."""

import itertools
import math

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

# temperature, top_k, top_p, min_p
FILTERS: list[tuple[float, int, float, float]] = [
    (1.0, 0, 1.0, 0.0),
    (0.3, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 7, 1.0, 0.0),
    (1.0, 10**6, 1.0, 0.0),
    (1.0, -1, 0.1, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.9999, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.0, 0, 1.0, 1.0),
    (2.0, 50, 0.7, 0.02),
]


def columns(filters: list[tuple[float, int, float, float]], seed: int = 0) -> list[Tensor]:
    """The op's arguments after the logits, a row each, with random seeds and steps."""
    generator = torch.Generator().manual_seed(seed)
    temperature, top_k, top_p, min_p = (list(one) for one in zip(*filters)) if filters else ([], [], [], [])
    return [
        torch.tensor(temperature, dtype=torch.float64),
        torch.tensor(top_k, dtype=torch.int64),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p, dtype=torch.float64),
        torch.randint(-(2**63), 2**63 - 1, (len(filters),), generator=generator),
        torch.randint(0, 2**40, (len(filters),), generator=generator),
    ]


def some_filters(rows: int, vocabulary: int, seed: int = 0) -> list[tuple[float, int, float, float]]:
    generator = torch.Generator().manual_seed(seed)

    def pick(values: list) -> list:
        return [values[i] for i in torch.randint(len(values), (rows,), generator=generator).tolist()]

    return list(
        zip(
            pick([0.0, 0.5, 1.0, 1.7]),
            pick([0, 0, -1, 1, 5, 40, vocabulary - 1, vocabulary]),
            pick([1.0, 1.0, 0.3, 0.9, 0.999, 1e-9]),
            pick([0.0, 0.0, 0.1]),
        )
    )


def probabilities(row: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The distribution of one row, by sorting; independent of the code under test."""
    best = max(row)
    weights = [math.exp(x / temperature - best / temperature) for x in row]
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if 0 < top_k < len(row):
        order = [i for i in order if row[i] >= row[order[top_k - 1]]]
    if top_p < 1:
        enough = top_p * math.fsum(weights[i] for i in order)
        before = [0.0, *itertools.accumulate(weights[i] for i in order)]
        order = [i for i, mass in zip(order, before) if mass < enough]
    kept = {i for i in order if weights[i] >= min_p}
    total = math.fsum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(row))]


def oracle(row: list[float], temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> tuple[int, float]:
    if temperature == 0:
        return row.index(max(row)), 0.0
    p = probabilities(row, temperature, top_k, top_p, min_p)
    token = next(i for i, mass in enumerate(itertools.accumulate(p)) if mass > u)
    return token, math.log(p[token])


def warped(scores: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The same filters by transformers."""
    scores = scores / temperature
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)
