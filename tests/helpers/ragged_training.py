"""What a patched model's ragged batches are compared with: the unpatched model, one sequence at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import toolkit


def _gradients(model: nn.Module, values: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.cat(values).sum().backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


def check_against_unpatched(model: nn.Module, texts: Sequence[Sequence[int]], atol: float) -> None:
    """Log-probabilities, and the gradient of every parameter, of a patched model. It is patched again afterwards."""
    got = toolkit.token_logprobs(model, texts)
    mine = _gradients(model, got)
    toolkit.unpatch(model)
    expected = []
    for text in texts:
        ids = torch.tensor([text])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        expected.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    theirs = _gradients(model, expected)
    toolkit.patch(model)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)
    assert mine.keys() == theirs.keys()
    difference = sum((mine[name] - theirs[name]).square().sum() for name in mine).sqrt()
    assert difference < 1e-4 * sum(one.square().sum() for one in theirs.values()).sqrt()
