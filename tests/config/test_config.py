"""Recipes: what is accepted, and that each refusal is one sentence naming field, value and range."""

from pathlib import Path

import pytest
import yaml

from toolkit.config import Recipe, dump, find, load_recipe, shipped, validate
from toolkit.config.load import field_names
from toolkit.errors import ToolkitError

BASE = """
model: {config: {model_type: llama, hidden_size: 64}}
optimizer: {lr: 2e-3}
train: {steps: 50}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(BASE)
    return str(path)


def refusal(recipe: str, *overrides: str) -> str:
    with pytest.raises(ToolkitError) as caught:
        load_recipe(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message[-1] in ".?"
    assert "pydantic" not in message.lower()
    return message


def test_values_and_overrides_are_typed(recipe: str) -> None:
    loaded = load_recipe(
        recipe,
        [
            "train.batch_tokens=128",
            "optimizer.betas=[0.5, 0.75]",
            "optimizer.eps=1e-6",
            "optimizer.clip=null",
            "model.config.hidden_size=32",
            "model.config.tie_word_embeddings=true",
            "checkpoint.every=",
            "schedule.kind=wsd",
            "schedule.decay=10",
        ],
    )
    assert loaded.name == "small"
    assert loaded.optimizer.lr == 0.002
    assert loaded.optimizer.eps == 1e-6
    assert loaded.optimizer.clip is None
    assert loaded.checkpoint.every is None
    assert loaded.optimizer.betas == [0.5, 0.75]
    assert loaded.model.config == {"model_type": "llama", "hidden_size": 32, "tie_word_embeddings": True}
    assert loaded.train.batch_tokens == 128


def test_the_resolved_recipe_is_a_recipe(recipe: str, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, ["optimizer.eps=1e-12", "resume=step-000010"])
    assert validate(yaml.safe_load(dump(loaded))) == loaded
    copy = tmp_path / "other.yaml"
    copy.write_text(dump(loaded))
    assert load_recipe(str(copy)) == loaded


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trian.steps=5", "Unknown field 'trian'; did you mean 'train'?"),
        ("train.step=5", "Unknown field 'train.step'; did you mean 'train.steps'?"),
        ("lr=3", "Unknown field 'lr'; did you mean 'optimizer.lr'?"),
        ("qqqq=1", "Unknown field 'qqqq'; fields are name, output, "),
        ("train.zzzzz=1", "Unknown field 'train.zzzzz'; fields are steps, batch_tokens, "),
        ("train.steps=0", "train.steps is 0; it must be at least 1."),
        ("train.steps=many", "train.steps is 'many'; it must be an integer."),
        ("train.steps=true", "train.steps is True; it must be an integer."),
        ("train.steps=1.5", "train.steps is 1.5; it must be an integer."),
        ("train=3", "train is 3; it must be a mapping of fields."),
        ("model=[]", "model is []; it must be a mapping of fields."),
        ("schedule.kind=cosin", "schedule.kind is 'cosin'; it must be one of 'cosine', 'wsd' or 'constant'."),
        ("optimizer.betas=[0.5, 1]", "optimizer.betas.1 is 1; it must be less than 1.0."),
        ("optimizer.betas=[0.5]", "optimizer.betas is [0.5]; it must be a list of at least 2."),
        ("optimizer.lr=-1", "optimizer.lr is -1; it must be greater than 0.0."),
        ("optimizer.lr=.nan", "optimizer.lr is nan; it must be a finite number."),
        ("optimizer.clip=off", "optimizer.clip is False; it must be a number or null."),
        ("overwrite=1", "overwrite is 1; it must be true or false."),
        ("name=../x", "name is '../x'; it must be a folder name of letters, digits, '.', '_' and '-'."),
        ("output=''", "output is ''; it must be text of at least 1 character."),
        ("resume=later", "resume is 'later'; it must be 'never', 'auto' or 'step-' and a number."),
        ("seed=-1", "seed is -1; it must be at least 0."),
        ("data.include=*.py", "The value of override 'data.include=*.py' is not valid YAML"),
        ("data.include=[]", "data.include is []; it must be a list of at least 1."),
        ("data.include=[3]", "data.include.0 is 3; it must be text."),
        ("data.held_out=1.0", "data.held_out is 1.0; it must be less than 1.0."),
        ("tokenizer.vocab_size=256", "tokenizer.vocab_size is 256; it must be at least 257."),
        ("checkpoint.every=x", "checkpoint.every is 'x'; it must be an integer or null."),
        ("model.dtype=int8", "model.dtype is 'int8'; it must be one of 'float32', 'float64', "),
        ("model.path=/x", "Exactly one of model.path and model.config must be given, not both."),
        ("model.config=null", "Exactly one of model.path and model.config must be given, not neither."),
        ("model.config.model_type=3", "model.config.model_type is 3; it must be a transformers model type"),
        (
            "schedule.warmup=51",
            "schedule.warmup + schedule.decay is 51; it must be at most train.steps, which is 50.",
        ),
        ("schedule.decay=2", "schedule.decay is 2; it must be 0 unless schedule.kind is 'wsd'."),
        ("train.steps", "Override 'train.steps' is not of the form key=value, e.g. train.steps=100."),
        ("=3", "Override '=3' is not of the form key=value"),
        ("a..b=3", "Override 'a..b=3' is not of the form key=value"),
        ("name.x=3", "Override 'name.x=3' names a field inside name, which is 'small', not a mapping."),
        ("train.steps=[1", "The value of override 'train.steps=[1' is not valid YAML"),
    ],
)
def test_a_wrong_override_is_one_sentence(recipe: str, override: str, expected: str) -> None:
    assert refusal(recipe, override).startswith(expected)


ON_TASK = "task: {name: countdown}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective=3", "objective is 3; it must be a mapping of fields."),
        ("objective={}", "objective.kind is missing; it must be one of 'pretrain', 'sft', 'dpo', 'grpo' or 'distill'."),
        ("objective.kind=grp", "objective.kind is 'grp'; it must be one of "),
        ("objective.kind=[grpo]", "objective.kind is ['grpo']; it must be one of "),
        ("objective={kind: grpo}", "objective.task is null; a rollout needs a task."),
        (
            f"objective={{kind: grpo, {ON_TASK}, clip_lo: 3}}",
            "Unknown field 'objective.clip_lo'; did you mean 'objective.clip_low'?",
        ),
        (f"objective={{kind: dpo, {ON_TASK}, group: 3}}", "Unknown field 'objective.group'; did you mean "),
        (f"objective={{kind: grpo, {ON_TASK}, clip_low: 3}}", "objective.clip_low is 3; it must be less than 1.0."),
        (f"objective={{kind: grpo, {ON_TASK}, group: 1}}", "objective.group is 1; it must be at least 2."),
        (
            f"objective={{kind: grpo, {ON_TASK}, importance_cap: x}}",
            "objective.importance_cap is 'x'; it must be a number or null.",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, ratio: 3}}",
            "objective.ratio is 3; it must be one of 'token' or 'sequence'.",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, warmup: 3}}",
            "objective.warmup is 3; it must be a mapping of fields or null.",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, warmup: {{steps: 0}}}}",
            "objective.warmup.steps is 0; it must be at least 1.",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, warmup: {{step: 1}}}}",
            "Unknown field 'objective.warmup.step'; did you mean 'objective.warmup.steps'?",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, rollout: {{temperature: 0.7}}}}",
            "objective.rollout.temperature is 0.7; it must be 1.0 with objective.kind 'grpo'",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, rollout: {{max_tokens: 512}}}}",
            "objective.rollout.max_tokens is 512; it must be below train.max_length, which is 512.",
        ),
        ("objective={kind: sft}", "Exactly one of objective.task and objective.data must be given, not neither."),
        (
            f"objective={{kind: sft, data: x, {ON_TASK}}}",
            "Exactly one of objective.task and objective.data must be given, not both.",
        ),
        (
            "objective={kind: sft, data: x, warmup: {steps: 1}}",
            "objective.warmup.task is null; without objective.task it must be given.",
        ),
        (f"objective={{kind: distill, {ON_TASK}}}", "objective.teacher is missing; it must be given."),
        (
            f"objective={{kind: distill, {ON_TASK}, teacher: {{steps: 3}}}}",
            "Exactly one of objective.teacher.path and objective.teacher.config must be given, not neither.",
        ),
        ("model.lora={rank: 0}", "model.lora.rank is 0; it must be at least 1."),
        ("model.lora={targets: all}", "model.lora.targets is 'all'; it must be a list or null."),
        (
            "model.lora={rank: 4}",
            "model.lora is given while model.path and objective.warmup are null; adapters need a trained model.",
        ),
    ],
)
def test_a_wrong_objective_is_one_sentence(recipe: str, override: str, expected: str) -> None:
    assert refusal(recipe, override).startswith(expected)


def test_accumulation_is_for_objectives_without_rollouts(recipe: str) -> None:
    message = refusal(recipe, f"objective={{kind: grpo, {ON_TASK}}}", "train.accumulate=2")
    assert message.startswith("train.accumulate is 2; it must be 1 with objective.kind 'grpo'")


def test_the_fields_of_every_kind_are_known(recipe: str) -> None:
    for kind in ("sft", "dpo", "grpo", "distill"):
        assert "objective.warmup.batch_tokens" in field_names(kind=kind)
    assert "objective.clip_high" in field_names(kind="grpo")
    assert "objective.clip_high" not in field_names(kind="sft")
    loaded = load_recipe(recipe, [f"objective={{kind: grpo, {ON_TASK}, warmup: {{steps: 3}}}}"])
    assert validate(yaml.safe_load(dump(loaded))) == loaded


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "model is missing; it must be given."),
        ("model: {}", "Exactly one of model.path and model.config must be given, not neither."),
        ("- a\n- b\n", "holds a list; it must be a mapping of fields."),
        ("train: {steps: 3\nmodel:", "line 2 is not valid YAML"),
        (
            "train: {steps: 3}\ntrain: {steps: 4}\n",
            "line 2 is not valid YAML: the key 'train' is given twice.",
        ),
        ("train: !!python/object:os.system {}\n", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert expected in refusal(str(path))


def test_an_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert refusal(str(path)).endswith("cannot be read: it is not UTF-8.")
    assert "is a folder" in refusal(str(tmp_path))


def test_a_misspelt_key_is_named_before_what_follows_from_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("modle: {config: {model_type: llama}}\n")
    assert refusal(str(path)) == "Unknown field 'modle'; did you mean 'model'?"


def test_overwrite_and_resume_exclude_each_other(recipe: str) -> None:
    assert refusal(recipe, "overwrite=true", "resume=auto").startswith("overwrite is true while resume is 'auto'")


def test_shipped_recipes_are_found_by_name_and_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # so that only the packaged file can be meant
    names = shipped()
    assert "pretrain" in names
    for name, path in names.items():
        assert find(name) == find(f"recipes/{name}.yaml") == path
        assert isinstance(load_recipe(name), Recipe)
    message = refusal("pretrian")
    assert "neither a file nor a shipped recipe" in message
    assert message.endswith("did you mean 'pretrain'?")
    assert "neither a file nor" in refusal("elsewhere/pretrain.yaml")


def test_every_field_name_resolves(recipe: str) -> None:
    values = load_recipe(recipe).model_dump()
    for name in field_names():
        inner = values
        for part in name.split("."):
            inner = inner[part] if inner is not None else {}  # null in place of a section
