"""SFT runs, adapters, preferences, distillation: what each promises, in a few steps."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.helpers.objective_recipes import LOWER, TASK, WARMUP, dense_logprobs, objective_recipe, resumed, weights
from toolkit.errors import ToolkitError
from toolkit.loading import load_model
from toolkit.ops import IGNORED
from toolkit.training.examples import LineStream, Packed
from toolkit.training.formats import check
from toolkit.training.jsonl import JsonlDataset
from toolkit.training.loop import Trainer, train
from toolkit.training.metrics import read_metrics
from toolkit.training.objectives.distill import Distillation
from toolkit.training.objectives.dpo import DPO
from toolkit.training.objectives.sft import SFT
from toolkit.training.preparing import Example

TEACHER = {
    "config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    },
    "max_steps": 10,
    "learning_rate": 1e-2,
    "batch_tokens": 256,
}
KINDS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sft", {}, {"train": {"gradient_accumulation_steps": 2}}),
    ("sft", {"warmup": WARMUP}, {"model": {"lora": {"r": 2, "lora_dropout": 0.1}}}),
    ("dpo", {"pairs": 6}, {}),
    ("distill", {"prompts": 4, "teacher": TEACHER, "warmup": WARMUP}, {}),
]


@pytest.mark.parametrize(("kind", "objective", "sections"), KINDS)
def test_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, kind: str, objective: dict[str, Any], sections: dict[str, Any]
) -> None:
    train_section = {"max_steps": 5, **sections.get("train", {})}
    common = {k: v for k, v in sections.items() if k != "train"} | {"checkpoint": {"save_steps": 2}}
    whole = Trainer(
        objective_recipe(tmp_path, kind, objective, run_name="whole", train=train_section, **common), quiet=True
    )
    whole.fit()
    recipe = objective_recipe(tmp_path, kind, objective, run_name="parts", train=train_section, **common)
    again = resumed(recipe)
    assert again.objective.state_dict() == whole.objective.state_dict()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name


def test_supervised_loss_is_the_mean_over_completion_tokens(tmp_path: Path) -> None:
    recipe = objective_recipe(tmp_path, "sft", {}, train={"gradient_accumulation_steps": 3}, model={"dtype": "float64"})
    trainer = Trainer(recipe, quiet=True)
    assert isinstance(trainer.objective, SFT)
    micros = next(trainer.objective.updates(0))
    loss = sum(trainer.objective.loss(trainer.forward, micro).item() for micro in micros)
    again = Trainer(recipe.model_copy(update={"run_name": "again"}), quiet=True).objective
    assert isinstance(again, SFT)
    total, count = 0.0, 0
    for _ in micros:
        for example in again.stream.next_batch():
            logits = trainer.hf_model(torch.tensor([example.inputs])).logits[0] + 0.0
            targets = torch.tensor(example.targets)
            total += F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
            count += example.counted
    assert loss == pytest.approx(total / count, rel=1e-9)
    assert trainer.objective.finish()[0] == count


def test_supervised_learns(tmp_path: Path) -> None:
    metrics = train(
        objective_recipe(
            tmp_path,
            "sft",
            {"task": LOWER},
            train={"max_steps": 40},
            optimizer={"learning_rate": 2e-2},
            evaluate={"do_eval": True},
            checkpoint={"save_steps": None},
        ),
        quiet=True,
    )
    losses = [line["loss"] for line in read_metrics(tmp_path / "runs" / "sft" / "metrics.jsonl")]
    assert losses[-1] < 0.2 * losses[0]
    assert metrics["eval_accuracy_greedy"] == 1.0 > metrics["before_training"]["eval_accuracy_sampled"]


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [{"prompt": f"{at} ", "completion": f"{at + 1}"} for at in range(30)]
    for at in range(30):
        turns = [
            ("system", "be brief"),
            ("user", f"n {at}"),
            ("assistant", f"{at}!"),
            ("user", "?"),
            ("assistant", "."),
        ]
        lines.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def test_a_file_of_conversations(chat: Path) -> None:
    recipe = objective_recipe(
        chat,
        "sft",
        {"task": None, "data_files": str(chat / "chat.jsonl"), "chat_template": TEMPLATE},
        train={"max_steps": 6, "max_length": 64},
        model={"config": {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}},
        evaluate={"do_eval": True},
    )
    metrics = train(recipe, quiet=True)
    assert metrics["eval_loss"] < metrics["before_training"]["eval_loss"]
    trainer = Trainer(recipe.model_copy(update={"run_name": "look"}), quiet=True)
    report = (chat / "runs" / "look" / "data_report.txt").read_text()
    assert "48 of 48 lines kept: 48 examples" in report
    eos = trainer.tokenizer.eos_token
    example = next(example for example in trainer.objective.stream.next_batch() if len(example.inputs) > 20)
    counted = [token for token in example.targets if token != IGNORED]
    assert trainer.tokenizer.decode(counted) == f"{trainer.tokenizer.decode(counted).split('!')[0]}!{eos}.{eos}"


def test_a_run_without_held_out_lines_writes_null(chat: Path) -> None:
    """JSON has no NaN: result.json, metrics.jsonl and the state of a checkpoint are read by other programs."""
    (chat / "one.jsonl").write_text((chat / "chat.jsonl").read_text().splitlines()[0] + "\n")
    recipe = objective_recipe(
        chat,
        "sft",
        {"task": None, "data_files": str(chat / "one.jsonl"), "chat_template": TEMPLATE},
        train={"max_steps": 2, "max_length": 32},
        evaluate={"do_eval": True},
    )
    assert math.isnan(train(recipe, quiet=True)["eval_loss"])

    def strict(path: str, lines: bool = False) -> Any:
        text = (chat / "runs" / "sft" / path).read_text()
        return [json.loads(one, parse_constant=pytest.fail) for one in (text.splitlines() if lines else [text])]

    (result,) = strict("result.json")
    assert result["eval_loss"] is None
    assert result["before_training"]["eval_loss"] is None
    assert len(strict("metrics.jsonl", lines=True)) == 2
    assert strict("checkpoints/step-000002/training/state.json")


def test_lines_are_split_shuffled_and_resumed(chat: Path) -> None:
    lines = JsonlDataset(str(chat / "chat.jsonl"), 0.2, lambda line: check(line, SFT.formats))
    assert len(lines.train) + len(lines.held_out) == 60
    assert lines.held_out
    assert not any(line in lines.train for line in lines.held_out)
    stream = LineStream(lines.train, 0)
    whole = stream.take(3 * len(lines.train))
    epochs = [whole[at : at + len(lines.train)] for at in range(0, len(whole), len(lines.train))]
    assert all(sorted(map(str, epoch)) == sorted(map(str, lines.train)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    for at in (0, 1, len(lines.train), len(lines.train) + 3):
        other = LineStream(lines.train, 0)
        other.take(at)
        resumed = LineStream(lines.train, 0)
        resumed.load_state_dict(other.state_dict())
        assert resumed.take(20) == whole[at : at + 20]


def test_a_packing_is_resumed_where_an_example_waits(chat: Path) -> None:
    def examples(line: dict[str, int]) -> list[Example]:
        """None, one or several of a line."""
        return [Example([line["n"], at], [at, 1]) for at in range(line["n"] % 4)]

    def packed() -> Packed:
        lines = [{"n": at} for at in range(50)]
        return Packed(LineStream(lines, 0), examples, 16)

    whole = packed()
    states, batches = [], []
    for _ in range(20):
        states.append(json.loads(json.dumps(whole.state_dict())))
        batches.append(whole.next_batch())
        assert sum(len(example.inputs) for example in batches[-1]) <= 16
    assert any("example" in state for state in states)
    for at in range(20):
        resumed = packed()
        resumed.load_state_dict(states[at])
        assert [resumed.next_batch() for _ in range(20 - at)] == batches[at:]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "line 1, must be a JSON object (Expecting property name"),
        ('{"prompt": "a", "completion": "b"}\n[]', "line 2, must be a JSON object, got an array."),
        ('{"prompt": "a", "completion": 3}', "line 1, must be a JSON object with 'messages', or 'prompt' and "),
        ("", "objective.data_files must have a line to train on, got "),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ToolkitError) as caught:
        JsonlDataset(str(tmp_path / "data.jsonl"), 0.1, lambda line: check(line, SFT.formats))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_prompts_too_long_are_one_sentence(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    recipe = objective_recipe(tmp_path, "sft", {"task": None, "data_files": str(data)})
    with pytest.raises(ToolkitError, match=r"objective.data_files must be a json lines file, got '.*' \(No such file"):
        Trainer(recipe, quiet=True)
    data.write_text(json.dumps({"prompt": "x" * 100, "completion": "y"}) + "\n")
    with pytest.raises(ToolkitError, match=r"completion begins within train\.max_length, which is 32, got none in 1"):
        Trainer(recipe, quiet=True)
    data.write_text(json.dumps({"prompt": "x" * 100, "chosen": "y", "rejected": "z"}) + "\n")
    recipe = objective_recipe(tmp_path, "dpo", {"task": None, "data_files": str(data), "pairs": 1})
    with pytest.raises(ToolkitError, match=r"completion begins within train\.max_length, which is 32, got none in 1"):
        Trainer(recipe, quiet=True)


def test_adapters_are_all_that_is_trained_and_open_in_peft(tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    recipe = objective_recipe(
        tmp_path,
        "sft",
        {"warmup": WARMUP},
        model={"lora": {"r": 4, "lora_alpha": 8.0}},
        optimizer={"learning_rate": 5e-2},
    )
    trainer = Trainer(recipe, quiet=True)
    before = weights(trainer)
    trainer.fit()
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    folder = tmp_path / "runs" / "sft" / "checkpoints" / "step-000004"
    assert (folder / "adapter_config.json").is_file()
    assert not (folder / "model.safetensors").exists()
    assert all("lora_" in name for name in load_file(str(folder / "adapter_model.safetensors")))
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        trainer.hf_model.eval()
        ours = trainer.hf_model(ids).logits + 0.0
        torch.testing.assert_close(ours, stock(ids).logits, rtol=1e-4, atol=1e-5)
        merged, tokenizer = load_model(tmp_path / "runs" / "sft")
        torch.testing.assert_close(ours, merged(ids).logits, rtol=1e-4, atol=1e-5)
    assert len(tokenizer) == 257
    assert all(parameter.requires_grad for parameter in merged.parameters())  # it trains like any checkpoint
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(
        ToolkitError, match="names the base model 'elsewhere': base_model_name_or_path must be a folder"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    "lora", [{}, {"target_modules": ["q_proj", "embed_tokens"]}, {"trainable_token_indices": [7, 9]}]
)
def test_adapters_roll_out_with_bitwise_identical_logprobs(tmp_path: Path, lora: dict) -> None:
    recipe = objective_recipe(
        tmp_path,
        "grpo",
        {"task": LOWER, "prompts": 4, "num_generations": 4, "warmup": {**WARMUP, "task": TASK}, "beta": 0.01},
        model={"lora": {"r": 4, **lora}},
        optimizer={"learning_rate": 5e-2},
    )
    train(recipe, quiet=True)
    lines = read_metrics(tmp_path / "runs" / "grpo" / "metrics.jsonl")
    assert [line["mismatch_bits"] for line in lines] == [0] * 4
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    load_model(tmp_path / "runs" / "grpo")
    assert lines[-1]["kl"] > 1e-6  # the adapters have moved, and the engine with them


@pytest.mark.parametrize(
    ("targets", "expected"),
    [(["nothing"], "model.lora.target_modules must name layers of the model, got ['nothing']: Target modules")],
)
def test_wrong_targets_are_one_sentence(tmp_path: Path, targets: list[str], expected: str) -> None:
    recipe = objective_recipe(tmp_path, "sft", {"warmup": WARMUP}, model={"lora": {"target_modules": targets}})
    with pytest.raises(ToolkitError) as caught:
        Trainer(recipe, quiet=True)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_preference_loss_is_that_of_the_definition(tmp_path: Path) -> None:
    recipe = objective_recipe(
        tmp_path,
        "dpo",
        {"pairs": 5, "beta": 0.5, "sft_weight": 0.25},
        model={"dtype": "float64"},
        train={"batch_tokens": 64},
    )
    trainer = Trainer(recipe, quiet=True)
    assert isinstance(trainer.objective, DPO)
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.hf_model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=chance, dtype=torch.float64)
    micros = next(trainer.objective.updates(0))
    assert len(micros) > 1
    loss = sum(trainer.objective.loss(trainer.forward, micro) for micro in micros)
    exact = []
    for pair in (pair for micro in micros for pair in micro):
        sums = {}
        for side, tokens in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            for who, model in (("policy", trainer.hf_model), ("reference", trainer.objective.reference.model)):
                sums[side, who] = dense_logprobs(model, pair.prompt + tokens)[-len(tokens) :].sum()
        ratio = {side: sums[side, "policy"] - sums[side, "reference"].detach() for side in ("chosen", "rejected")}
        supervised = -sums["chosen", "policy"] / len(pair.chosen)
        exact.append(-F.logsigmoid(0.5 * (ratio["chosen"] - ratio["rejected"])) + 0.25 * supervised)
    torch.testing.assert_close(loss, torch.stack(exact).mean(), rtol=1e-6, atol=1e-7)
    assert trainer.objective.finish()[1]["rewards/accuracies"] in {0.0, 0.2, 0.4, 0.6, 0.8, 1.0}


def test_preferences_are_learnt(tmp_path: Path) -> None:
    metrics = train(
        objective_recipe(
            tmp_path,
            "dpo",
            {"task": LOWER, "pairs": 16},
            train={"max_steps": 15, "batch_tokens": 512},
            optimizer={"learning_rate": 1e-2},
            evaluate={"do_eval": True},
            checkpoint={"save_steps": None},
        ),
        quiet=True,
    )
    before = metrics["before_training"]
    assert (before["eval_rewards/accuracies"], before["eval_rewards/margins"]) == (0.5, 0.0)
    assert metrics["eval_rewards/accuracies"] == 1.0
    assert metrics["eval_rewards/margins"] > 0.1


def test_a_resumed_run_drops_the_plot_of_the_earlier_one(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"train": {"max_steps": 2}, "log": {"plot": True}}
    recipe = objective_recipe(tmp_path, "dpo", {"task": LOWER, "pairs": 4}, **sections)
    train(recipe, quiet=True)
    plot = tmp_path / "runs" / "dpo" / "plots" / "rewards_accuracies.png"
    assert plot.is_file()
    longer = objective_recipe(tmp_path, "dpo", {"task": LOWER, "pairs": 4}, **sections | {"train": {"max_steps": 4}})
    longer = longer.model_copy(update={"resume_from_checkpoint": True})
    Trainer(longer, quiet=True)
    assert not plot.exists()
    train(longer, quiet=True)
    assert plot.is_file()


@pytest.mark.parametrize("beta", [1.0, 0.0, 0.5])
def test_distillation_loss_is_that_of_the_definition(tmp_path: Path, beta: float) -> None:
    """The teacher's top-k tokens and the rest as one outcome, by dense softmax."""
    objective = {
        "prompts": 3,
        "num_generations": 2,
        "teacher": TEACHER | {"max_steps": 1},
        "teacher_top_k": 5,
        "beta": beta,
    }
    recipe = objective_recipe(tmp_path, "distill", objective, model={"dtype": "float64"}, train={"batch_tokens": 48})
    trainer = Trainer(recipe, quiet=True)
    assert isinstance(trainer.objective, Distillation)
    micros = next(trainer.objective.updates(0))
    assert len(micros) > 1
    loss = sum(trainer.objective.loss(trainer.forward, micro) for micro in micros)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for micro in micros:
        logits = trainer.hf_model.lm_head.weight.new_tensor(0.0) + trainer.ragged(micro.batch, micro.rows)
        student = logits.softmax(-1)
        teacher = trainer.objective.teacher.logits(micro.batch, micro.rows).softmax(-1)
        for p_all, q_all, times in zip(teacher, student, micro.counts):
            best = p_all.topk(5).indices
            p, q = (torch.cat([x[best], (1 - x[best].sum())[None]]) for x in (p_all, q_all))
            m = 0.5 * (p + q)
            outcomes = {
                0.0: (p * (p / q).log()).sum(),
                1.0: (q * (q / p).log()).sum(),
                0.5: 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum(),
            }
            total = total + times * outcomes[beta]
            count += int(times)
    torch.testing.assert_close(loss, total / count, rtol=1e-5, atol=1e-8)
    trainer.train_step()
    trainer.objective.finish()


def test_distillation_learns_from_a_teacher_on_disk(tmp_path: Path) -> None:
    teacher = objective_recipe(
        tmp_path, "sft", {"task": LOWER}, run_name="teacher", train={"max_steps": 40}, optimizer={"learning_rate": 2e-2}
    )
    train(teacher, quiet=True)
    metrics = train(
        objective_recipe(
            tmp_path,
            "distill",
            {"task": LOWER, "prompts": 8, "teacher": {"name_or_path": str(tmp_path / "runs" / "teacher")}},
            train={"max_steps": 40, "batch_tokens": 512},
            optimizer={"learning_rate": 2e-2},
            evaluate={"do_eval": True},
            checkpoint={"save_steps": None},
        ),
        quiet=True,
    )
    lines = read_metrics(tmp_path / "runs" / "distill" / "metrics.jsonl")
    assert lines[-1]["divergence"] < 0.5 * lines[0]["divergence"]
    assert lines[-1]["weight_version"] > lines[0]["weight_version"]
    assert metrics["eval_samples"] == 16


def test_a_teacher_of_another_vocabulary_is_one_sentence(tmp_path: Path) -> None:
    config = TEACHER["config"] | {"vocab_size": 300}  # type: ignore[operator]
    objective = {"prompts": 2, "teacher": TEACHER | {"config": config, "max_steps": 1}}
    with pytest.raises(ToolkitError, match="must have the student's vocabulary size, which is 257, got 300"):
        Trainer(objective_recipe(tmp_path, "distill", objective), quiet=True)


@pytest.mark.sweep
def test_a_teacher_needs_no_rewards(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(f'{{"prompt": "{at} and"}}\n' for at in range(30)))
    train(objective_recipe(tmp_path, "sft", {}, run_name="teaches", train={"max_steps": 3}), quiet=True)
    teacher = {"name_or_path": str(tmp_path / "runs" / "teaches")}
    given = {"task": None, "data_files": str(lines), "prompts": 4, "teacher": teacher}
    recipe = objective_recipe(tmp_path, "distill", given, train={"max_steps": 6}, optimizer={"learning_rate": 3e-2})
    train(recipe, quiet=True)
    metrics = read_metrics(tmp_path / "runs" / "distill" / "metrics.jsonl")
    assert metrics[-1]["divergence"] < metrics[0]["divergence"]
    assert [line["reward"] for line in metrics] == [None] * 6
