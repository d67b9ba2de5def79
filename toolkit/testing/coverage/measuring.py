"""Measurements that rows of every kind share: losses, gradients, generation, comparisons with the unpatched model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

NEW_TOKENS = 8


def text(count: int = 13, rows: int = 2, first: int = 5, last: int = 300) -> Tensor:
    """[rows, count] ids that are in the vocabulary of every small model."""
    return torch.randint(first, last, (rows, count), generator=torch.Generator().manual_seed(3))


def loss_and_gradient(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and the gradients of all parameters in one vector, float64."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    parts = [
        p.grad.flatten().double() if p.grad is not None else torch.zeros(p.numel()).double() for p in model.parameters()
    ]
    model.zero_grad(set_to_none=True)
    return loss.detach().double(), torch.cat(parts)


def relative(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a share of the norm of what is expected."""
    return float((got - expected).double().norm() / expected.double().norm().clamp_min(1e-30))


def next_logprobs(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Log-probability of every token [1, n] given those before it, by the model's ordinary forward: [n - 1]."""
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, :-1].float()
    found: Tensor = logits.log_softmax(-1).gather(1, inputs["input_ids"][0, 1:, None])[:, 0]
    return found


def greedy(model: Any, inputs: Mapping[str, Tensor]) -> list[int]:
    """transformers' greedy completion of one prompt."""
    given = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    out = model.generate(
        **given, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=None,
        pad_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    completion: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return completion


def greedy_by_forwards(model: Any, prompt: Sequence[int]) -> list[int]:
    """The greedy completion of one prompt by ordinary forwards over everything so far, without a cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def same_greedy(model: Any, prompts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> bool:
    """Whether the engine's greedy tokens are ``expected``."""
    from toolkit.engine import Engine, SamplingParams
    from toolkit.errors import ToolkitError

    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    with Engine(model, max_num_seqs=4) as engine:
        outputs = engine.generate([list(prompt) for prompt in prompts], params)
    for output in outputs:
        if output.error is not None:
            raise ToolkitError(output.error)
    return all(output.token_ids == list(tokens) for output, tokens in zip(outputs, expected, strict=True))
