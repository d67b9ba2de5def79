"""Sequences that share prefixes train like the same sequences alone: every family, forward and every gradient.

The oracle is transformers' eager attention (and its own mixers) on each unshared sequence.
"""

import copy
import random

import pytest
import torch

import toolkit
from tests.helpers.rowwise import threads
from toolkit.errors import ToolkitError
from toolkit.patching.forward import ragged_forward
from toolkit.state import RaggedBatch
from toolkit.testing.models import FAMILIES, random_model
from toolkit.testing.oracle import eager, lifted_to_double

SHARING = ["llama", "gemma2", "granite_swa", "deepseek_v3", "qwen3_next", "mamba2", "bamba", "lfm2"]
MIXERS = {"qwen3_next", "mamba2", "bamba"}


def tree(seed, count=8, depth=5):
    """Sequences that branch up to ``depth`` times, some in the middle of others."""
    source, found = random.Random(seed), []

    def grow(prefix, left):
        node = prefix + [source.randrange(3, 300) for _ in range(source.randint(0, 6))]
        if left == 0 or source.random() < 0.3:
            found.append([*node, source.randrange(3, 300)])
            return
        for _ in range(source.randint(1, 3)):
            grow(node, left - 1)

    while len(found) < count:
        grow([source.randrange(3, 300) for _ in range(4)], depth)
    return found[:count]


def stock_logprobs(model, sequences):
    eager(model)
    for sequence in sequences:
        logits = model(torch.tensor([sequence]), use_cache=False).logits[0, :-1]
        yield logits.log_softmax(-1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]


def trained(model, logprobs, weights):
    """Log-probabilities of all sequences, and the gradients of a random sum of them."""
    values = list(logprobs)
    torch.stack([(value * weight).sum() for value, weight in zip(values, weights)]).sum().backward()
    return [value.detach() for value in values], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", SHARING)
def test_prefix_trees_train_like_their_sequences_alone(family):
    stock = random_model(family)
    exact = copy.deepcopy(stock).double()
    sides = {torch.float32: copy.deepcopy(stock), torch.float64: copy.deepcopy(exact)}
    for model in sides.values():
        toolkit.patch(model)
    for seed in (1, 2):
        sequences = tree(seed)
        batch = RaggedBatch.from_sequences(sequences)
        assert batch.block_tables is not None
        assert len(batch.tokens) < 0.7 * sum(map(len, sequences))
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(len(one) - 1, generator=generator) for one in sequences]
        for model in (stock, exact, *sides.values()):
            model.zero_grad()
        with lifted_to_double():
            values, wanted = trained(exact, stock_logprobs(exact, sequences), [w.double() for w in weights])
            double = sides[torch.float64]
            got, gradients = trained(double, toolkit.token_logprobs(double, sequences), [w.double() for w in weights])
        assert largest(got, values) <= 1e-10
        assert set(gradients) == set(wanted)
        assert all(relative(gradients[name], gradient) <= 1e-10 for name, gradient in wanted.items())
        _, own_gradients = trained(stock, stock_logprobs(stock, sequences), weights)
        single = sides[torch.float32]
        got, gradients = trained(single, toolkit.token_logprobs(single, sequences), weights)
        assert largest(got, values) <= 1e-5
        for name, gradient in wanted.items():
            # Where a model's gradients cancel so that transformers' own float32 is off by more, as much is allowed
            # here.
            limit = max(1e-5, 2 * relative(own_gradients[name], gradient))
            assert relative(gradients[name], gradient) <= limit, (name, limit)
            assert limit == 1e-5 or family in MIXERS, (name, limit)


def largest(values, expected):
    return max(float((value - exact).abs().max() / exact.abs().max()) for value, exact in zip(values, expected))


def relative(value, expected):
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("family", SHARING)
def test_activation_checkpointing_runs_the_same_prefix_trees_again(family):
    model = random_model(family)
    toolkit.patch(model)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.cat(toolkit.token_logprobs(model, tree(4))).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        assert relative(gradients[1][name], gradient) <= 1e-5, name


@pytest.mark.parametrize("family", ["llama", "granite_swa", "qwen3_next"])
def test_sharing_changes_no_bit_forward_and_every_run_gives_the_same_gradients(family):
    model = random_model(family)
    toolkit.patch(model)
    sequences = tree(3)
    plain = toolkit.token_logprobs(model, sequences, share=False)
    runs = []
    for count in (1, 2, 2):
        with threads(count):
            model.zero_grad()
            shared = toolkit.token_logprobs(model, sequences)
            assert all(torch.equal(a, b) for a, b in zip(shared, plain))
            torch.cat(shared).square().sum().backward()
        runs.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def test_the_last_tokens_alone_have_the_same_values():
    model = random_model("llama")
    toolkit.patch(model)
    sequences = [[5, 6, 7, 8, 9], [5, 6, 7, 4], [5, 6, 7, 8, 9], [3]]
    whole = toolkit.token_logprobs(model, sequences)
    some = toolkit.token_logprobs(model, sequences, last=[2, 1, 4, 0])
    assert [len(one) for one in some] == [2, 1, 4, 0]
    assert all(torch.equal(a, b[len(b) - len(a) :]) for a, b in zip(some, whole))
    with pytest.raises(ToolkitError, match=r"last\[1\] must be >= 0 and <= 3, the sequence's length - 1, got 4"):
        toolkit.token_logprobs(model, sequences, last=[2, 4, 4, 0])


@pytest.mark.parametrize("family", ["qwen3_next", "bamba"])
def test_a_layer_that_would_mix_sequences_is_noticed(family):
    """Without its role, a mixer's sequences run into each other."""
    model = random_model(family)
    toolkit.patch(model, ["norm", "attention", "linear", "head"])
    with pytest.raises(ToolkitError, match="mixes the sequences of a batch in a layer that is not patched"):
        ragged_forward(model, RaggedBatch.from_sequences([[1, 2], [3]]))


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.sweep] if f != "bamba" else []) for f in sorted(MIXERS | {"lfm2"})],
)
def test_ordinary_calls_of_a_hybrid_stay_what_they_were(family):
    stock = random_model(family)
    model = copy.deepcopy(stock)
    toolkit.patch(model)
    ids = torch.randint(3, 300, (2, 13), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
    prompt = ids[:1, :5]
    expected = stock.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), expected)


def test_every_family_is_listed_once():
    assert set(SHARING) <= set(FAMILIES)
