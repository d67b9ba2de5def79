"""Completions of models with experts."""

from torch import nn

from toolkit import Engine, SamplingParams
from toolkit.engine import Completion


def greedy_with_experts(model: nn.Module, prompt: list[int], count: int) -> Completion:
    """``count`` greedy tokens behind a prompt, with the experts of all tokens."""
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    with Engine(model, max_num_seqs=2, enable_return_routed_experts=True) as engine:
        return engine.generate([prompt], params)[0]
