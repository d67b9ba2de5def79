"""Loggers of other projects: what they are given, and what a recipe says of them."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.training_recipes import tiny_recipe
from toolkit.config import dump, validate
from toolkit.errors import ToolkitError
from toolkit.training.details import StepDetails
from toolkit.training.loggers import check_loggers
from toolkit.training.metrics import Metrics, read_metrics


class Stand(ModuleType):
    """Stands for wandb or trackio."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> Any:
        self.calls.append(("init", options))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", (values, step)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_logger_gets_every_step(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand = Stand(name)
    monkeypatch.setitem(sys.modules, name, stand)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    recipe = tiny_recipe(tmp_path, log={"report_to": [name], "project": "colours"})
    check_loggers(recipe)
    for step in (0, 1):
        metrics = Metrics(recipe, tmp_path, step, StepDetails(recipe.log))
        metrics.write({"step": step + 1, "loss": 2.0})
        metrics.sync()
        metrics.close()
    kinds = [kind for kind, _ in stand.calls]
    assert kinds == ["init", "log", "finish"] * 2
    (_, first), (_, logged), _, (_, again), *_ = stand.calls
    assert (first["project"], first["name"]) == ("colours", "tiny")
    assert first["config"]["train"]["max_steps"] == 8
    assert logged == ({"loss": 2.0}, 1)
    if name == "wandb":
        assert first["mode"] == "offline"
        assert first["id"] == again["id"]
        assert first["dir"] == str(tmp_path)
    else:
        assert (first["resume"], again["resume"]) == ("never", "allow")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_one_logger_several_or_none(tmp_path: Path) -> None:
    for given, found in (("none", []), ("wandb", ["wandb"]), (["tensorboard", "trackio"], ["tensorboard", "trackio"])):
        recipe = tiny_recipe(tmp_path, log={"report_to": given})
        assert recipe.log.report_to == found
        assert dump(recipe).count("report_to") == 1
        assert validate(recipe.model_dump()) == recipe


def test_a_logger_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolkitError, match=r"log\.report_to 'wandb' needs the package 'wandb'"):
        check_loggers(tiny_recipe(tmp_path, log={"report_to": "wandb"}))
