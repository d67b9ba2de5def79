"""One sequence in chunks has the gradients of the whole."""

from contextlib import nullcontext

import pytest
import torch

import toolkit
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model
from toolkit.testing.oracle import lifted_to_double
from toolkit.training.long_sequence import backward_in_chunks

LENGTH = 130


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


SWEPT = ("granite_swa", "deepseek_v3", "qwen3_next", "mamba2", "lfm2")
CASES = [
    ("llama", torch.float64),
    ("qwen3_next", torch.float32),
    *(pytest.param(family, torch.float64, marks=pytest.mark.sweep) for family in SWEPT),
    pytest.param("llama", torch.float32, marks=pytest.mark.sweep),
]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_chunks_have_the_gradients_of_the_whole(family, dtype):
    model = random_model(family).to(dtype)
    toolkit.patch(model)
    tokens = torch.randint(3, 300, (LENGTH,), generator=torch.Generator().manual_seed(0))
    double = dtype == torch.float64
    with lifted_to_double() if double else nullcontext():
        loss = -toolkit.token_logprobs(model, [tokens])[0].mean()
        loss.backward()
        expected = gradients(model)
        for chunk in (9, 64, LENGTH):
            model.zero_grad()
            got = backward_in_chunks(model, tokens, chunk_tokens=chunk)
            assert got == pytest.approx(float(loss.detach()), rel=1e-12 if double else 1e-6)
            found = gradients(model)
            assert set(found) == set(expected)
            for name, exact in expected.items():
                assert (found[name] - exact).norm() <= (1e-10 if double else 1e-5) * exact.norm(), (chunk, name)


def test_targets_choose_what_counts_and_gradients_add_up():
    model = random_model("llama")
    toolkit.patch(model)
    tokens = list(range(3, 40))
    targets = torch.full((37,), -100)
    targets[[4, 20, 35]] = torch.tensor([7, 8, 9])
    model.zero_grad()
    loss = backward_in_chunks(model, tokens, targets=targets, chunk_tokens=8)
    once = gradients(model)
    logprobs = toolkit.token_logprobs(model, [[*tokens[: at + 1], int(targets[at])] for at in (4, 20, 35)])
    expected = -torch.stack([values[-1] for values in logprobs]).mean()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    backward_in_chunks(model, tokens, targets=targets, chunk_tokens=8)
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, 2 * once[name], rtol=1e-5, atol=1e-7)
    assert backward_in_chunks(model, tokens, targets=torch.full((37,), -100)) == 0.0


def test_bad_arguments_are_named():
    model = random_model("llama")
    toolkit.patch(model)
    with pytest.raises(ToolkitError, match="chunk_tokens must be >= 8, got 4"):
        backward_in_chunks(model, [3, 4, 5], chunk_tokens=4)
    with pytest.raises(ToolkitError, match=r"targets must have the tokens' shape \[3\], got \[2\]"):
        backward_in_chunks(model, [3, 4, 5], targets=torch.tensor([1, 2]))
