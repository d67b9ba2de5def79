"""Which modules dispatch through transformers' experts interface, in every version that is supported."""

import functools
from typing import Any

import pytest
from torch import Tensor, nn

from toolkit.patching.experts_interface import dispatches
from toolkit.patching.roles.moe_layers import moe_layers
from toolkit.testing.models import random_model


def experts(family: str) -> Any:
    return next(layer.module for layer in moe_layers(random_model(family)) if layer.stacked)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_modules_of_transformers_dispatch(family: str) -> None:
    assert dispatches(experts(family))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_attributes_of_5_17_are_enough(family: str) -> None:
    module = experts(family)
    for later in ("_is_expert_parallel", "has_post_expert_norm"):
        vars(module).pop(later, None)
    assert dispatches(module)


def test_a_forward_that_something_else_wraps_does_not() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Wrapped(nn.Module):
        @functools.wraps(Plain.forward)
        def forward(self, x: Tensor) -> Tensor:
            return Plain.forward(self, x)  # type: ignore[arg-type]

    assert not dispatches(Plain())
    assert not dispatches(Wrapped())
