"""PEFT folders of LoRA and DoRA adapters with random factors, as PEFT saves them."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.testing.oracle import eager

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def save_adapter(model: nn.Module, folder: Path, seed: int = 0, rank: int = 4, **options: Any) -> Path:
    """A folder with an adapter of ``model``, which stays as it is.

    Args:
        seed: of its factors.
        rank: of them.
        options: of ``LoraConfig``.
    """
    import peft

    settings = {"target_modules": list(LINEAR), "lora_alpha": 2 * rank, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(eager(copy.deepcopy(model)), peft.LoraConfig(r=rank, **settings))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name and "magnitude" not in name:
                    parameter.normal_(std=0.08)
    adapted.save_pretrained(str(folder))
    return folder


def oracle_logprobs(model: nn.Module, folder: Path | None, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """[tokens - 1] log-probabilities of each sequence: the unpatched model with PEFT's own forward, in float64."""
    import peft

    adapted: Any = eager(copy.deepcopy(model)).double().eval()
    if folder is not None:
        adapted = peft.PeftModel.from_pretrained(adapted, str(folder), autocast_adapter_dtype=False).double().eval()
    found = []
    for sequence in sequences:
        ids = torch.tensor([list(sequence)])
        with torch.no_grad():
            logits = adapted(input_ids=ids, use_cache=False).logits[0, :-1]
        found.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    return found
