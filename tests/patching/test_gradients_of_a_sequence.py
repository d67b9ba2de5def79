"""Whole models in bitwise mode: the gradient of a sequence's embeddings does not depend on the other sequences."""

from itertools import accumulate
from random import Random

import pytest
import torch

import toolkit
from tests.helpers.rowwise import threads
from toolkit.ops import native
from toolkit.testing.models import random_model

pytestmark = pytest.mark.skipif(native.load() is None, reason="a promise of the native kernels")
VOCABULARY = 331
OTHERS = (5, 40, 1, 33)  # lengths
FAMILIES = ("llama", "qwen3_moe", "qwen3_next", "gemma2")


def tokens(length, seed):
    random = Random(seed)
    return [random.randrange(3, VOCABULARY) for _ in range(length)]


def run(model, sequences, which):
    """Log-probabilities of sequence ``which``, and the gradient of its embeddings."""
    kept = []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        logprobs = toolkit.token_logprobs(model, sequences, share=False)
    finally:
        hook.remove()
    # A loss as of a policy: each token with a weight.
    sum((one * torch.linspace(-1, 1, len(one))).sum() for one in logprobs).backward()
    (output,) = kept
    starts = [0, *accumulate(map(len, sequences))]
    gradient = output.grad.flatten(0, -2)[starts[which] : starts[which + 1]]
    assert len(gradient) == len(sequences[which])
    return logprobs[which].detach(), gradient


def check(family, hidden, lengths, **settings):
    model = random_model(family, hidden=hidden, vocabulary=VOCABULARY, **settings)
    toolkit.patch(model, numerics="bitwise")
    others = [tokens(length, seed) for seed, length in enumerate(OTHERS)]
    for length in lengths:
        own = tokens(length, 99 + length)
        with threads(1):
            logprobs, alone = run(model, [own], 0)
        assert length == 1 or bool(alone.any())
        for at, count in ((0, 1), (2, 2), (len(others), 1)):
            with threads(count):
                found, among = run(model, [*others[:at], own, *others[at:]], at)
            assert torch.equal(found, logprobs), (length, at)
            assert torch.equal(among, alone), (length, at, float((among - alone).abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_a_short_sequence(family):
    """MKL GEMMs change their order for few rows."""
    check(family, 192, (2, 5))


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden", [192, 320])
def test_gradient_of_a_sequence(family, hidden):
    check(family, hidden, (1, 2, 3, 5, 7, 16, 37, 40))
