"""Recipes: what is accepted, and that each error is one sentence naming field, value and range."""

from pathlib import Path

import pytest
import yaml

from toolkit.config import Recipe, dump, find, load_recipe, shipped, validate
from toolkit.config.load import field_names
from toolkit.errors import ToolkitError

BASE = """
model: {config: {model_type: llama, hidden_size: 64}}
optimizer: {learning_rate: 2e-3}
train: {max_steps: 50}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(BASE)
    return str(path)


def error_of(recipe: str, *overrides: str) -> str:
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
            "optimizer.adam_beta1=0.5",
            "data.include=[a, b]",
            "optimizer.adam_epsilon=1e-6",
            "optimizer.max_grad_norm=null",
            "model.config.hidden_size=32",
            "model.config.tie_word_embeddings=true",
            "checkpoint.save_steps=",
            "schedule.lr_scheduler_type=warmup_stable_decay",
            "schedule.num_decay_steps=10",
            "train.mixed_precision=no",
        ],
    )
    assert loaded.run_name == "small"
    assert loaded.optimizer.learning_rate == 0.002
    assert loaded.optimizer.adam_epsilon == 1e-6
    assert loaded.optimizer.max_grad_norm is None
    assert loaded.checkpoint.save_steps is None
    assert loaded.optimizer.adam_beta1 == 0.5
    assert loaded.data.include == ["a", "b"]
    assert loaded.model.config == {"model_type": "llama", "hidden_size": 32, "tie_word_embeddings": True}
    assert loaded.train.batch_tokens == 128
    assert loaded.train.mixed_precision == "no"


def test_the_resolved_recipe_is_a_recipe(recipe: str, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, ["optimizer.adam_epsilon=1e-12", "resume_from_checkpoint=step-000010"])
    assert validate(yaml.safe_load(dump(loaded))) == loaded
    copy = tmp_path / "other.yaml"
    copy.write_text(dump(loaded))
    assert load_recipe(str(copy)) == loaded


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trian.max_steps=5", "Unknown field 'trian'; did you mean 'train'?"),
        ("train.max_step=5", "Unknown field 'train.max_step'; did you mean 'train.max_steps'?"),
        ("learning_rate=3", "Unknown field 'learning_rate'; did you mean 'optimizer.learning_rate'?"),
        ("qqqq=1", "Unknown field 'qqqq'; fields are run_name, output_dir, "),
        ("train.zzzzz=1", "Unknown field 'train.zzzzz'; fields are max_steps, num_train_epochs, "),
        ("train.max_steps=0", "train.max_steps must be >= 1, got 0."),
        ("train.max_steps=many", "train.max_steps must be an integer, got 'many'."),
        ("train.max_steps=true", "train.max_steps must be an integer, got True."),
        ("train.max_steps=1.5", "train.max_steps must be an integer, got 1.5."),
        ("train=3", "train must be a mapping of fields, got 3."),
        ("model=[]", "model must be a mapping of fields, got []."),
        (
            "schedule.lr_scheduler_type=cosin",
            "schedule.lr_scheduler_type must be one of 'cosine_with_min_lr', 'warmup_stable_decay', "
            "'constant_with_warmup', 'linear', 'cosine', 'constant', 'polynomial', 'inverse_sqrt' or "
            "'cosine_with_restarts', got 'cosin'.",
        ),
        ("optimizer.adam_beta2=1", "optimizer.adam_beta2 must be < 1, got 1."),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate must be > 0, got -1."),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate must be a finite number, got nan."),
        ("optimizer.max_grad_norm=off", "optimizer.max_grad_norm must be a number or null, got False."),
        ("overwrite=1", "overwrite must be true or false, got 1."),
        ("run_name=../x", "run_name must be a folder name of letters, digits, '.', '_' and '-', got '../x'."),
        ("output_dir=''", "output_dir must be text of at least 1 character, got ''."),
        (
            "resume_from_checkpoint=later",
            "resume_from_checkpoint must be true, false or 'step-' and a number, got 'later'.",
        ),
        ("resume_from_checkpoint=3", "resume_from_checkpoint must be true, false or 'step-' and a number, got 3."),
        ("seed=-1", "seed must be >= 0, got -1."),
        ("data.include=*.py", "The value of override 'data.include=*.py' is not valid YAML"),
        ("data.include=[]", "data.include must be a list of at least 1, got []."),
        ("data.include=[3]", "data.include.0 must be text, got 3."),
        ("data.val_set_size=1.0", "data.val_set_size must be < 1, got 1.0."),
        ("tokenizer.vocab_size=256", "tokenizer.vocab_size must be >= 257, got 256."),
        ("checkpoint.save_steps=x", "checkpoint.save_steps must be an integer or null, got 'x'."),
        ("model.dtype=int8", "model.dtype must be one of 'float32', 'float64', "),
        ("model.name_or_path=/x", "Exactly one of model.name_or_path and model.config must be given, got both."),
        ("model.config=null", "Exactly one of model.name_or_path and model.config must be given, got neither."),
        (
            "model.config.model_type=3",
            "model.config.model_type must be a model type of transformers, e.g. 'llama', got 3.",
        ),
        (
            "schedule.warmup_steps=51",
            "schedule.warmup_steps + schedule.num_decay_steps must be <= train.max_steps, which is 50, got 51.",
        ),
        (
            "schedule.num_decay_steps=2",
            "schedule.num_decay_steps must be 0 unless schedule.lr_scheduler_type is 'warmup_stable_decay', got 2.",
        ),
        ("train.max_steps", "Override 'train.max_steps' is not of the form key=value, e.g. train.max_steps=100."),
        ("=3", "Override '=3' is not of the form key=value"),
        ("a..b=3", "Override 'a..b=3' is not of the form key=value"),
        ("run_name.x=3", "Override 'run_name.x=3' names a field inside run_name, which is 'small', not a mapping."),
        ("train.max_steps=[1", "The value of override 'train.max_steps=[1' is not valid YAML"),
    ],
)
def test_a_wrong_override_is_one_sentence(recipe: str, override: str, expected: str) -> None:
    assert error_of(recipe, override).startswith(expected)


KINDS = "cpo, distill, dpo, grpo, kto, orpo, pretrain, prm, reinforce_plus_plus, reward, rloo, sdft, sft"
ONE_SOURCE = "Exactly one of objective.task, objective.data_files and objective.datasets must be given, got"
ON_TASK = "task: {name: countdown}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective=3", "objective must be a mapping of fields, got 3."),
        (
            "objective={}",
            f"objective.kind is required: one of {KINDS}.",
        ),
        (
            "objective.kind=grp",
            f"objective.kind must be one of {KINDS}, got 'grp'; did you mean 'grpo'?",
        ),
        (
            "objective.kind=[grpo]",
            f"objective.kind must be one of {KINDS}, got ['grpo']",
        ),
        ("objective={kind: grpo}", f"{ONE_SOURCE} none."),
        (
            f"objective={{kind: grpo, {ON_TASK}, epsilon_hi: 3}}",
            "Unknown field 'objective.epsilon_hi'; did you mean 'objective.epsilon_high'?",
        ),
        (f"objective={{kind: dpo, {ON_TASK}, pair: 3}}", "Unknown field 'objective.pair'; did you mean "),
        (f"objective={{kind: grpo, {ON_TASK}, epsilon: 3}}", "objective.epsilon must be < 1, got 3."),
        (f"objective={{kind: grpo, {ON_TASK}, num_generations: 1}}", "objective.num_generations must be >= 2, got 1."),
        (
            f"objective={{kind: grpo, {ON_TASK}, importance_sampling_clip_max: x}}",
            "objective.importance_sampling_clip_max must be a number or null, got 'x'.",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, importance_sampling_level: 3}}",
            "objective.importance_sampling_level must be one of 'token' or 'sequence', got 3.",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, warmup: 3}}",
            "objective.warmup must be a mapping of fields or null, got 3.",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, warmup: {{max_steps: 0}}}}",
            "objective.warmup.max_steps must be >= 1, got 0.",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, warmup: {{max_step: 1}}}}",
            "Unknown field 'objective.warmup.max_step'; did you mean 'objective.warmup.max_steps'?",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, rollout: {{temperature: 0.7, structured_outputs: {{regex: a}}}}}}",
            "objective.rollout.temperature must be 1.0 with objective.rollout.structured_outputs, got 0.7",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, sync_ref_model: true}}",
            "objective.beta must be > 0 with objective.sync_ref_model, got 0",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, entropy_coef_min: 2}}",
            "objective.entropy_coef_min must be <= objective.entropy_coef_max, which is 1.0, got 2.0",
        ),
        (
            "objective={kind: dpo, data_files: a, use_weighting: true, loss_type: aot}",
            "objective.use_weighting must be false with objective.loss_type 'aot', got true",
        ),
        (
            f"objective={{kind: grpo, {ON_TASK}, rollout: {{max_completion_length: 512}}}}",
            "objective.rollout.max_completion_length must be < train.max_length, which is 512, got 512.",
        ),
        ("objective={kind: sft}", f"{ONE_SOURCE} none."),
        (
            f"objective={{kind: sft, data_files: x, {ON_TASK}}}",
            f"{ONE_SOURCE} task and data_files.",
        ),
        (
            "objective={kind: sft, data_files: x, warmup: {max_steps: 1}}",
            "objective.warmup.task must be given without objective.task, got null.",
        ),
        (f"objective={{kind: distill, {ON_TASK}}}", "objective.teacher is required."),
        (
            f"objective={{kind: distill, {ON_TASK}, teacher: {{max_steps: 3}}}}",
            "Exactly one of objective.teacher.name_or_path and objective.teacher.config must be given, got neither.",
        ),
        ("model.lora={r: 0}", "model.lora.r must be >= 1, got 0."),
        ("model.lora={target_modules: all}", "model.lora.target_modules must be a list or null, got 'all'."),
        (
            "model.lora={r: 4}",
            "model.lora must be null while model.name_or_path and objective.warmup are null: adapters need a trained "
            "model.",
        ),
    ],
)
def test_a_wrong_objective_is_one_sentence(recipe: str, override: str, expected: str) -> None:
    assert error_of(recipe, override).startswith(expected)


def test_accumulation_is_for_objectives_without_rollouts(recipe: str) -> None:
    message = error_of(recipe, f"objective={{kind: grpo, {ON_TASK}}}", "train.gradient_accumulation_steps=2")
    assert message.startswith("train.gradient_accumulation_steps must be 1 with objective.kind 'grpo'")
    assert message.endswith("got 2.")


def test_the_fields_of_every_kind_are_known(recipe: str) -> None:
    for kind in ("sft", "dpo", "grpo", "distill"):
        assert "objective.warmup.batch_tokens" in field_names(kind=kind)
    assert "objective.epsilon_high" in field_names(kind="grpo")
    assert "objective.epsilon_high" not in field_names(kind="sft")
    loaded = load_recipe(recipe, [f"objective={{kind: grpo, {ON_TASK}, warmup: {{max_steps: 3}}}}"])
    assert validate(yaml.safe_load(dump(loaded))) == loaded


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "model is required."),
        ("model: {}", "Exactly one of model.name_or_path and model.config must be given, got neither."),
        ("- a\n- b\n", "must hold a mapping of fields, got a list."),
        ("train: {max_steps: 3\nmodel:", "line 2 is not valid YAML"),
        (
            "train: {max_steps: 3}\ntrain: {max_steps: 4}\n",
            "line 2 is not valid YAML: the key 'train' is given twice.",
        ),
        ("train: !!python/object:os.system {}\n", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert expected in error_of(str(path))


def test_an_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert error_of(str(path)).endswith("cannot be read: it is not UTF-8.")
    assert "is a folder" in error_of(str(tmp_path))


def test_a_misspelt_key_is_named_before_what_follows_from_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("modle: {config: {model_type: llama}}\n")
    assert error_of(str(path)) == "Unknown field 'modle'; did you mean 'model'?"


def test_overwrite_and_resume_exclude_each_other(recipe: str) -> None:
    assert error_of(recipe, "overwrite=true", "resume_from_checkpoint=true").startswith(
        "overwrite must be false with resume_from_checkpoint True"
    )


def test_weights_of_16_bits_are_trained_by_adamw(recipe: str) -> None:
    assert error_of(recipe, "model.dtype=bfloat16", "optimizer.optim=muon") == (
        "optimizer.optim must be one of AdamW's with weights of fewer bits than 32, got 'muon'."
    )


def test_shipped_recipes_are_found_by_name_and_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # so that only the packaged file can be meant
    names = shipped()
    assert "pretrain" in names
    for name, path in names.items():
        assert find(name) == find(f"recipes/{name}.yaml") == path
        assert isinstance(load_recipe(name), Recipe)
    message = error_of("pretrian")
    assert "neither a file nor a shipped recipe" in message
    assert message.endswith("did you mean 'pretrain'?")
    assert "neither a file nor" in error_of("elsewhere/pretrain.yaml")


def test_every_field_name_resolves(recipe: str) -> None:
    values = load_recipe(recipe).model_dump()
    for name in field_names():
        inner = values
        for part in name.split("."):
            inner = inner[part] if inner is not None else {}  # null in place of a section
