"""Masks in which every query sees one run of keys: torch's attention with the mask, and the bits of a ragged batch."""

import random

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.prefix_trees import error
from tests.helpers.rowwise import seeded
from toolkit.errors import ToolkitError
from toolkit.state import DenseContext, RaggedBatch
from toolkit.state.context import AttentionSettings
from toolkit.state.seen_runs import all_seen, context_of_mask

SETTINGS = AttentionSettings(0.3, window=5)  # a mask has its windows itself


def masks(rng: random.Random) -> dict[str, torch.Tensor]:
    """By name a mask [B, 1, 12, 12]."""
    query, key = torch.arange(12)[:, None], torch.arange(12)[None]
    padded = torch.tensor([[0] * 3 + [1] * 9, [1] * 7 + [0] * 5, [1] * 12]).bool()[:, None, None]
    picture = torch.tensor([-1] * 4 + [1] * 5 + [-1] * 3)[:, None] == torch.tensor([-2] * 4 + [1] * 5 + [-2] * 3)[None]
    packed = torch.tensor([rng.randint(0, 1) for _ in range(12)]).cumsum(0)
    causal = key <= query
    return {
        "causal": causal[None, None],
        "padding": causal & padded,
        "window": causal & (key > query - 4) & padded,
        "picture": (causal | picture)[None, None],
        "picture, window": ((causal | picture) & (key > query - 3)) & padded,
        "picture beyond the window": (causal & (key > query - 3)) | picture[None, None],
        "chunks": (causal & (query // 5 == key // 5))[None, None],
        "packed": (causal & (packed[:, None] == packed[None]))[None, None],
        "encoder": padded.expand(-1, -1, 12, -1),
        "blocks": (packed[:, None] == packed[None])[None, None],
        "both sides": ((query - key).abs() < 4)[None, None],
        "nothing": torch.zeros(2, 1, 12, 12, dtype=torch.bool),
    }


@pytest.mark.parametrize("name", list(masks(random.Random(0))))
def test_a_mask_of_runs(name: str) -> None:
    mask = masks(random.Random(1))[name]
    rows = mask.shape[0]
    q, k, v = (seeded(rows, 12, heads, 8, seed=i).requires_grad_() for i, heads in enumerate((4, 2, 2)))
    context = context_of_mask(mask)
    out = context.attend(0, *(x.flatten(0, 1) for x in (q, k, v)), SETTINGS).unflatten(0, (rows, 12))
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    want = torch.where(mask.any(-1).transpose(1, 2)[..., None], want, 0.0)
    assert error(out, want) < 1e-12
    grad = seeded(*want.shape, seed=9)
    wanted = torch.autograd.grad(want, (q, k, v), grad)
    for actual, expected in zip(torch.autograd.grad(out, (q, k, v), grad), wanted):
        assert error(actual, expected.nan_to_num(0)) < 1e-12


def test_sequences_have_the_bits_that_they_have_in_a_ragged_batch() -> None:
    lengths = [5, 1, 6]
    q, k, v = (seeded(12, heads, 8, dtype=torch.float32, seed=i) for i, heads in enumerate((4, 2, 2)))
    want = DenseContext(RaggedBatch.from_sequences([[0] * n for n in lengths], share=False)).attend(
        0, q, k, v, SETTINGS
    )
    own = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    query, key = torch.arange(12)[:, None], torch.arange(12)[None]
    mask = (own[:, None] == own[None]) & (key <= query) & (key > query - 5)
    assert torch.equal(context_of_mask(mask[None, None]).attend(0, q, k, v, SETTINGS), want)


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (3, 9), (9, 3), (5, 0), (0, 4)])
def test_all_seen(queries: int, keys: int) -> None:
    q, k, v = seeded(2, queries, 2, 8), seeded(2, keys, 1, 8, seed=1), seeded(2, keys, 1, 6, seed=2)
    context = all_seen(2, queries, keys)
    out = context.attend(0, *(x.flatten(0, 1) for x in (q, k, v)), SETTINGS).unflatten(0, (2, queries))
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads, scale=0.3, enable_gqa=True).transpose(1, 2)
    assert error(out, want.nan_to_num(0)) < 1e-12


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        ([[1, 0, 1], [0, 1, 0], [1, 1, 1]], "hole"),
        ([[1, 1, 1], [1, 1, 0], [1, 1, 1]], "falls"),
        ([[1, 0, 0], [0, 1, 0], [1, 1, 1]], "falls"),
    ],
)
def test_other_masks_are_named(mask: list[list[int]], problem: str) -> None:
    with pytest.raises(ToolkitError, match=problem):
        context_of_mask(torch.tensor(mask).bool()[None, None])
    with pytest.raises(ToolkitError, match="boolean of shape"):
        context_of_mask(torch.tensor(mask).float()[None, None])
