"""Log-probabilities of given targets: those of the shifted sequence, and a head whose rows come in parts."""

import pytest
import torch

import toolkit
from toolkit.patching import target_logprobs
from toolkit.testing.models import random_model

LENGTHS = (150, 1, 97, 128)


def sequences(vocabulary):
    g = torch.Generator().manual_seed(0)
    first = torch.randint(vocabulary, (LENGTHS[0],), generator=g)
    others = [torch.randint(vocabulary, (length,), generator=g) for length in LENGTHS[1:]]
    others[1][:20] = first[:20]  # a shared prefix
    return [first, *others]


def found(model, tokens, targets, share, **options):
    """Values and the gradients of all weights that learn."""
    model.zero_grad()
    values = torch.cat(target_logprobs(model, tokens, targets, share=share, **options))
    if torch.is_grad_enabled():
        weights = torch.linspace(-1.0, 1.0, len(values))
        (values * weights).sum().backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return values.detach(), gradients


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("learns", [False, True], ids=["frozen-head", "head-that-learns"])
def test_rows_of_the_head_in_parts_change_no_bit(share, learns):
    model = random_model("llama")
    toolkit.patch(model, numerics="bitwise")
    model.lm_head.weight.requires_grad_(learns)
    tokens = sequences(model.config.vocab_size)
    targets = [one.roll(-1) for one in tokens]
    whole = found(model, tokens, targets, share)
    parts: list[int] = []
    apart = found(model, tokens, targets, share, after_rows=lambda values: parts.append(len(values)))
    assert torch.equal(whole[0], apart[0])
    assert whole[1].keys() == apart[1].keys()
    assert len(whole[1]) > 5
    assert [name for name, one in whole[1].items() if not torch.equal(one, apart[1][name])] == []
    assert len(parts) == (1 if learns else 3)
    assert sum(parts) <= sum(LENGTHS)
    with torch.no_grad():
        assert torch.equal(found(model, tokens, targets, share, after_rows=lambda values: None)[0], whole[0])


def test_targets_that_are_the_next_tokens_give_token_logprobs():
    model = random_model("llama")
    toolkit.patch(model, numerics="bitwise")
    tokens = sequences(model.config.vocab_size)
    values = target_logprobs(model, tokens, [one.roll(-1) for one in tokens])
    expected = toolkit.token_logprobs(model, tokens)
    assert all(torch.equal(one[:-1], other) for one, other in zip(values, expected, strict=True))
