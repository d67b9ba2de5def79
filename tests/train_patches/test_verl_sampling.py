"""Which log-probabilities verl is given. verl's own source is in ``tests/soak/test_verl_contract.py``."""

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest

ROLLOUT = "train_patches.verl.rollout"
STANDINS = {
    "ray": [],
    "verl": [],
    "verl.workers": [],
    "verl.workers.rollout": [],
    "verl.workers.rollout.base": ["BaseRollout"],
    "verl.workers.rollout.replica": ["RolloutReplica", "TokenOutput"],
    "verl.workers.rollout.utils": ["ensure_async_iterator"],
}


@pytest.fixture
def rollout(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, classes in STANDINS.items():
        module = ModuleType(name)
        vars(module).update({one: type(one, (), {}) for one in classes})
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module(ROLLOUT)
    del sys.modules[ROLLOUT]


@pytest.mark.parametrize(
    ("changed", "whole"),
    [
        ({}, True),
        ({"top_k": -1, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": None, "min_tokens": 0}, True),
        ({"temperature": 0.7}, False),
        ({"top_k": 5}, False),
        ({"top_p": 0.9}, False),
        ({"min_p": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.5}, False),
        ({"frequency_penalty": 0.5}, False),
        ({"min_tokens": 3}, False),
    ],
)
def test_parameters_that_change_the_distribution(rollout: Any, changed: dict[str, Any], whole: bool) -> None:
    assert rollout.Server._is_whole({"temperature": 1.0} | changed) is whole
