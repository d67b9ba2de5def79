"""Data is looked at before the first step: counted, shown with its mask, cut, dropped or named, and resumed past."""

import json
from collections import Counter
from contextlib import closing
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.helpers.objective_recipes import TASK, objective_recipe
from tests.helpers.tokenizers import CHATML, make_tokenizer
from toolkit.config import Recipe
from toolkit.errors import ToolkitError
from toolkit.loading import load_model
from toolkit.testing.models import random_model
from toolkit.training import data_report
from toolkit.training.corpus import digest
from toolkit.training.loop import Trainer, train
from toolkit.training.metrics import read_metrics
from toolkit.training.objectives.kto import Judged
from toolkit.training.objectives.pairs import Pair
from toolkit.training.objectives.sft import SFT
from toolkit.training.prepared import PreparedLines
from toolkit.training.preparing import Outcome
from toolkit.training.progress import counted, showing
from toolkit.training.tasks import Problem, Task


def chat(question: str, reply: str = "yes") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that stops at ``</s>`` and ``<|im_start|>``; its turns end with ``<|im_end|>``."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(chat_template=CHATML, around="<s> $A </s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=128, eos_token_id=2, bos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig(eos_token_id=[2, 3], pad_token_id=0, do_sample=True, top_p=0.9)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_of(
    folder: Path,
    model: Path,
    kind: str,
    lines: list[Any],
    objective: dict[str, Any] | None = None,
    **sections: Any,
) -> Recipe:
    data = folder / "data.jsonl"
    data.write_text("".join(line + "\n" if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    sections["model"] = {"config": None, "name_or_path": str(model), "lora": sections.pop("lora", None)}
    evaluation = {"max_eval_samples": 4, "val_set_size": 1e-9}
    return objective_recipe(
        folder,
        kind,
        {"task": None, "data_files": str(data), "evaluation": evaluation, **(objective or {})},
        train={"max_steps": 2, "max_length": 48, "batch_tokens": 96, **sections.pop("train", {})},
        **sections,
    )


def report_of(trainer: Trainer) -> str:
    return (trainer.folder / "data_report.txt").read_text()


def test_what_is_kept_cut_dropped_and_masked_is_counted_and_one_example_shown(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("is it?"), chat("is it?", "no " * 60), chat("x " * 100), "{", *(chat(f"q{at}") for at in range(6))]
    recipe = recipe_of(tmp_path, checkpoint, "sft", rows, {"on_bad_lines": "skip"})
    trainer = Trainer(recipe)
    report = report_of(trainer)
    assert report.strip() in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    stock = [tokenizer.apply_chat_template(line["messages"], return_dict=False)[:49] for line in rows if line != "{"]
    tokens = sum(len(ids) - 1 for at, ids in enumerate(stock) if at != 2)
    assert f"8 of 10 lines kept: 8 examples, {tokens} tokens" in report
    assert "skipped: 1 lines (line 4, must be a JSON object (" in report
    assert "dropped: 1 lines (3): nothing that counts is within train.max_length 48" in report
    assert "cut: 1 examples at train.max_length 48" in report
    assert (
        "EOS tokens: </s> (2), <|im_start|> (3), <|im_end|> (4); added, because turns end with it: <|im_end|>" in report
    )
    assert "example (line 1; >>>what counts in the loss<<<):\n  | <|im_start|>user\n  | is it?<|im_end|>\n" in report
    assert "  | <|im_start|>assistant\n  | >>>yes<|im_end|>\n  | <<<\n" in report
    seen = [trainer.objective.stream.next_batch() for _ in range(20)]
    assert all(example.counted for batch in seen for example in batch)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_the_list_of_eos_tokens_is_kept_completed_and_stops_rollouts(
    tmp_path: Path, checkpoint: Path, lora: dict[str, Any] | None
) -> None:
    recipe = recipe_of(tmp_path, checkpoint, "sft", [chat("is it?")] * 4, lora=lora)
    trainer = Trainer(recipe, quiet=True)
    trainer.fit()
    assert trainer.objective.rollout.engine.eos == {2, 3, 4}
    trainer.objective.close()
    folder = trainer.folder / "checkpoints" / "step-000002"
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, 3, 4]
    assert (saved["do_sample"], saved["top_p"]) == (True, 0.9)
    model, tokenizer = load_model(folder)
    assert model.generation_config.eos_token_id == [2, 3, 4]
    assert tokenizer.chat_template == CHATML
    if lora is None:
        assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [2, 3, 4]


def test_a_chat_template_is_text_a_file_or_a_name(tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("!" + CHATML)
    for given in ("!" + CHATML, str(file)):
        recipe = recipe_of(tmp_path, checkpoint, "sft", [chat("a")], {"chat_template": given}, overwrite=True)
        trainer = Trainer(recipe, quiet=True)
        assert trainer.tokenizer.chat_template == "!" + CHATML
        assert "  | !<|im_start|>user" in report_of(trainer)
    with pytest.raises(ToolkitError, match=r"or a template of the tokenizer, got 'nowhere'"):
        Trainer(recipe_of(tmp_path, checkpoint, "sft", [chat("a")], {"chat_template": "nowhere"}), quiet=True)


def test_rollouts_of_a_task_stop_at_every_token_of_the_list(tmp_path: Path, checkpoint: Path) -> None:
    recipe = objective_recipe(
        tmp_path,
        "grpo",
        {"task": TASK, "prompts": 2, "num_generations": 2},
        model={"config": None, "name_or_path": str(checkpoint)},
    )
    trainer = Trainer(recipe, quiet=True)
    _, groups = trainer.objective.roll_out(0, 2)
    assert trainer.objective.rollout.engine.eos == {2, 3}
    for one in (one for group in groups for one in group):
        assert one.prompt_token_ids[0] == 1
        assert 2 not in one.prompt_token_ids  # the tokenizer would end the prompt
    trainer.objective.close()


def test_a_long_prompt_is_dropped_or_named_before_the_first_step(tmp_path: Path, checkpoint: Path) -> None:
    rows = [{"prompt": "two " * (90 if at == 7 else 1), "chosen": "a", "rejected": "b"} for at in range(12)]
    sections = {"train": {"max_steps": 8}, "checkpoint": {"save_steps": 2, "save_total_limit": 9}}
    recipe = recipe_of(tmp_path, checkpoint, "dpo", rows, {"pairs": 4}, **sections)
    train(recipe, quiet=True)  # some epochs, past the line
    assert "dropped: 1 lines (8)" in (tmp_path / "runs" / "dpo" / "data_report.txt").read_text()
    resumed = recipe.model_copy(update={"resume_from_checkpoint": "step-000002"})
    before = read_metrics(tmp_path / "runs" / "dpo" / "metrics.jsonl")
    train(resumed, quiet=True)
    after = read_metrics(tmp_path / "runs" / "dpo" / "metrics.jsonl")
    assert [line["loss"] for line in after] == [line["loss"] for line in before]
    for strategy in ("drop", "raise"):
        options = {"pairs": 4, "excess_length_strategy": strategy}
        recipe = recipe_of(tmp_path, checkpoint, "dpo", rows, options, run_name=strategy, **sections)
        if strategy == "drop":
            train(recipe, quiet=True)
            continue
        with pytest.raises(ToolkitError, match=r"line 8, must have <= 48 tokens \(train\.max_length\), got"):
            Trainer(recipe, quiet=True)


def test_a_line_that_the_template_does_not_take_is_named_or_skipped_and_resumed_past(
    tmp_path: Path, checkpoint: Path
) -> None:
    strict = "{% if messages[0].content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}" + CHATML
    rows = [chat("bad" if at in (2, 5) else f"q{at}") for at in range(9)]
    options = {"chat_template": strict}
    with pytest.raises(ToolkitError, match=r"lines 3, 6: The chat template must take .*: no bad words\. Mend"):
        Trainer(recipe_of(tmp_path, checkpoint, "sft", rows, options), quiet=True)
    sections = {"train": {"max_steps": 6}, "checkpoint": {"save_steps": 2, "save_total_limit": 9}}
    skip = recipe_of(tmp_path, checkpoint, "sft", rows, options | {"on_bad_lines": "skip"}, **sections)
    train(skip, quiet=True)
    before = read_metrics(tmp_path / "runs" / "sft" / "metrics.jsonl")
    train(skip.model_copy(update={"resume_from_checkpoint": "step-000004"}), quiet=True)
    assert [line["loss"] for line in read_metrics(tmp_path / "runs" / "sft" / "metrics.jsonl")] == [
        line["loss"] for line in before
    ]
    # Lines beyond those that were checked are named when they come, and the run resumes past them.
    late = recipe_of(tmp_path, checkpoint, "sft", rows, options | {"max_check_samples": 2}, run_name="late", **sections)
    with pytest.raises(ToolkitError, match=r"line [36]: The chat template must take"):
        train(late, quiet=True)
    resumed = recipe_of(
        tmp_path, checkpoint, "sft", rows, options | {"on_bad_lines": "skip"}, run_name="late", **sections
    )
    train(resumed.model_copy(update={"resume_from_checkpoint": True}), quiet=True)
    assert [line["loss"] for line in read_metrics(tmp_path / "runs" / "late" / "metrics.jsonl")] == [
        line["loss"] for line in before
    ]


def test_a_split_conversation_is_resumed_between_its_turns(tmp_path: Path, checkpoint: Path) -> None:
    forgetful = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'].split('|')[-1] }}"
    )
    rows = [
        {"messages": [turn for part in range(3) for turn in chat(f"q{at}", f"no|yes {part}")["messages"]]}
        for at in range(5)
    ]
    sections = {"train": {"max_steps": 6, "max_length": 96, "batch_tokens": 40}, "checkpoint": {"save_steps": 1}}
    recipe = recipe_of(tmp_path, checkpoint, "sft", rows, {"chat_template": forgetful}, **sections)
    train(recipe, quiet=True)
    before = read_metrics(tmp_path / "runs" / "sft" / "metrics.jsonl")
    assert "split: 5 conversations" in (tmp_path / "runs" / "sft" / "data_report.txt").read_text()
    trainer = Trainer(recipe.model_copy(update={"resume_from_checkpoint": "step-000005"}), quiet=True)
    trainer.fit()
    after = read_metrics(tmp_path / "runs" / "sft" / "metrics.jsonl")
    assert [line["loss"] for line in after] == [line["loss"] for line in before]
    trainer.objective.close()


def test_what_a_template_does_not_show_is_told(tmp_path: Path, checkpoint: Path) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {}}}
    line = {
        "messages": [
            {"role": "user", "content": "is it?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "yes"},
            {"role": "assistant", "content": "yes"},
        ]
    }
    report = report_of(Trainer(recipe_of(tmp_path, checkpoint, "sft", [line] * 3), quiet=True))
    assert "note: in 3 conversations the template shows nothing of a tool or of a call" in report
    assert "leaves out" not in report
    thoughts = chat("is it?", "yes")
    thoughts["messages"][1]["reasoning_content"] = "it is"
    recipe = recipe_of(tmp_path, checkpoint, "sft", [thoughts] * 3, overwrite=True)
    assert "note: in 3 conversations the template leaves out a part of what the assistant has written" in report_of(
        Trainer(recipe, quiet=True)
    )
    shown = "{{ m['content'] or '' }}{{ m.tool_calls or '' }}"
    options = {"chat_template": "{{ tools }}" + CHATML.replace("{{ m['content'] }}", shown)}
    rows = [line | {"tools": [call]}] * 3
    recipe = recipe_of(tmp_path, checkpoint, "sft", rows, options, overwrite=True, train={"max_length": 128})
    report = report_of(Trainer(recipe, quiet=True))
    assert "shows nothing" not in report
    assert report.count("'get_we") == 2


@pytest.mark.parametrize("calls", ["", "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"])
def test_a_call_that_a_template_leaves_out_is_told_although_it_lists_the_tool(
    tmp_path: Path, checkpoint: Path, calls: str
) -> None:
    function = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}
    messages = [
        {"role": "user", "content": "is it?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "get_weather", "arguments": {}}}]},
    ]
    lines = [{"messages": messages, "tools": tools} for tools in ([function], json.dumps([function]), [])]
    template = (
        "{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        + calls
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    options = {"chat_template": template}
    report = report_of(Trainer(recipe_of(tmp_path, checkpoint, "sft", lines, options), quiet=True))
    assert ("note: in 3 conversations the template shows nothing of a tool or of a call" in report) == (not calls)


def test_held_out_lines_are_checked_and_messages_need_a_template(tmp_path: Path, checkpoint: Path) -> None:
    strict = "{% if messages[0].content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}" + CHATML
    rows = [chat("bad", f"{at}") for at in range(20)]
    held_out = [at for at, row in enumerate(rows) if digest(json.dumps(row)) < int(0.5 * 2**64)]
    rows = [row if at in held_out else chat(f"q{at}") for at, row in enumerate(rows)]
    options = {"chat_template": strict, "evaluation": {"val_set_size": 0.5, "max_eval_samples": 99}}
    recipe = recipe_of(tmp_path, checkpoint, "sft", rows, options, evaluate={"do_eval": False})
    with pytest.raises(
        ToolkitError, match=rf"lines? {held_out[0] + 1}\b.*: The chat template must take .*: no bad words"
    ):
        Trainer(recipe, quiet=True)
    bare = tmp_path / "bare"
    LlamaForCausalLM.from_pretrained(checkpoint).save_pretrained(bare)
    make_tokenizer().save_pretrained(bare)
    with pytest.raises(
        ToolkitError, match=r"chat_template must be given for messages, .* the tokenizer has no template"
    ):
        Trainer(recipe_of(tmp_path, bare, "sft", [chat("a")]), quiet=True)


class Long(Task):
    """Every third prompt is long."""

    def make(self, seed: int, count: int) -> list[Problem]:
        return [
            Problem(("x" * 40 if at % 3 else "x") + f"{(seed + at) % 997}", "a", "b", str(at)) for at in range(count)
        ]

    def reward(self, prompt: str, completion: str) -> float:
        return float(len(completion) % 2)


def test_long_prompts_of_a_task_end_a_run_before_its_first_step_or_are_passed_over(tmp_path: Path) -> None:
    objective = {"task": {"name": "test_data_report:Long"}, "prompts": 4, "num_generations": 2}
    with pytest.raises(ToolkitError, match=r"a prompt must have <= 24 tokens .* of the first 64 problems; raise"):
        Trainer(objective_recipe(tmp_path, "grpo", objective), quiet=True)
    recipe = objective_recipe(
        tmp_path,
        "grpo",
        objective | {"filter_overlong_prompts": True},
        train={"max_steps": 2},
        evaluate={"do_eval": True},
    )
    assert train(recipe, quiet=True)["eval_samples"] == 16
    lines = read_metrics(tmp_path / "runs" / "grpo" / "metrics.jsonl")
    assert sum(line["prompts_dropped"] for line in lines) > 0


def test_a_slow_tokenizer_trains_and_rolls_out(tmp_path: Path) -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert not tokenizer.is_fast
    folder = tmp_path / "slow"
    tokenizer.save_pretrained(folder)
    random_model("llama", vocabulary=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    recipe = recipe_of(tmp_path, folder, "sft", [chat("is é?", "yes")] * 3, {"evaluation": {"val_set_size": 1e-9}})
    trainer = Trainer(recipe, quiet=True)
    (example, *_) = trainer.objective.stream.next_batch()
    assert tokenizer.decode([token for token in example.targets if token != -100]) == "yes<|im_end|>\n"
    trainer.fit()
    trainer.objective.close()
    objective = {"task": TASK, "prompts": 2, "num_generations": 2}
    model = {"config": None, "name_or_path": str(folder)}
    train(objective_recipe(tmp_path, "grpo", objective, model=model, train={"max_steps": 2}), quiet=True)
    assert read_metrics(tmp_path / "runs" / "grpo" / "metrics.jsonl")[0]["mismatch_bits"] == 0


@pytest.mark.sweep
def test_lines_are_tokenised_once(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start reads them and trains the same; another template, or another length, is another file."""
    lines = [chat(f"is it {at}?", f"yes {at}") for at in range(12)]
    made: list[str] = []
    original = SFT.prepare

    def counted(self: SFT, source: Any) -> Any:
        made.append(str(source.value))
        return original(self, source)

    monkeypatch.setattr(SFT, "prepare", counted)
    folder = tmp_path / "prepared"
    recipe = recipe_of(tmp_path, checkpoint, "sft", lines, {"dataset_prepared_path": str(folder)}, run_name="first")
    train(recipe, quiet=True)
    first, report = len(made), (tmp_path / "runs" / "first" / "data_report.txt").read_text()
    assert "tokenised: 12 lines; 0 more read from" in report
    train(recipe.model_copy(update={"run_name": "second"}), quiet=True)
    assert len(made) == first
    assert "tokenised: 0 lines; 12 more read from" in (tmp_path / "runs" / "second" / "data_report.txt").read_text()
    metrics = [read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("first", "second")]
    losses = [[line["loss"] for line in steps] for steps in metrics]
    assert losses[0] == losses[1]
    plain = recipe_of(tmp_path, checkpoint, "sft", lines, run_name="plain")
    train(plain, quiet=True)
    assert [line["loss"] for line in read_metrics(tmp_path / "runs" / "plain" / "metrics.jsonl")] == losses[0]
    for other in ({"chat_template": "{# another #}" + CHATML}, {"assistant_only_loss": False}):
        made.clear()
        again = {"dataset_prepared_path": str(folder), **other}
        Trainer(recipe_of(tmp_path, checkpoint, "sft", lines, again, run_name="other"), quiet=True)
        assert len(made) == 12
    assert len(list(folder.glob("*.sqlite"))) == 3
    (folder / "file").write_text("")
    unusable = {"dataset_prepared_path": str(folder / "file")}
    with pytest.raises(ToolkitError, match=r"objective\.dataset_prepared_path must be a folder to write to, got "):
        Trainer(recipe_of(tmp_path, checkpoint, "sft", lines, unusable, run_name="none"), quiet=True)


@pytest.mark.parametrize(("kind", "number"), [("dpo", 5), ("kto", 4)])
def test_pairs_are_kept_as_they_are(tmp_path: Path, kind: str, number: int) -> None:
    made = Pair([1, 2], [3], [4, 5], margin=0.5) if kind == "dpo" else Judged([1], [2, 3], True)
    outcome = Outcome([made], Counter(examples=1, cut=0), Counter({None: 2, 7: 1}))
    cls = type(made)
    with closing(PreparedLines(str(tmp_path), kind, cls)) as lines:
        assert lines.outcome(f"line {number}", lambda: outcome) is outcome
    with closing(PreparedLines(str(tmp_path), kind, cls)) as lines:
        again = lines.outcome(f"line {number}", lambda: pytest.fail("it is there"))
    assert (again.counts, again.turn_ends) == (outcome.counts, outcome.turn_ends)
    assert [list(astuple(one))[:3] for one in again.examples] == [list(astuple(made))[:3]]
    assert again.examples[0].tokens == made.tokens


def test_lengths_and_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_report._lengths(Counter({2: 18, 5: 1, 90: 1})) == "2 to 90 tokens, mean 6.5, median 2, 95 % <= 5"
    tokenizer = make_tokenizer(chat_template=CHATML)
    ids = tokenizer("is it?")["input_ids"]
    mask = [False] * (len(ids) - 1) + [True]
    plain = data_report.marked(tokenizer, ids, mask)
    coloured = data_report.marked(tokenizer, ids, mask, ("\x1b[1m", "\x1b[0m"))
    assert coloured == plain.replace(">>>", "\x1b[1m").replace("<<<", "\x1b[0m")
    assert "\x1b" in coloured
    long = data_report.marked(tokenizer, ids * 900, mask * 900)
    assert "characters) ..." in long
    assert long.count(">>>") == long.count("<<<")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert data_report.marks() == ("\x1b[1;32m", "\x1b[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    assert data_report.marks() == (">>>", "<<<")


def test_a_long_step_is_shown_in_lines() -> None:
    said: list[str] = []
    with showing(0.0, said.append):
        assert list(counted(range(3), 3, "data: lines checked")) == [0, 1, 2]
    assert [text.rpartition(",")[0] for text in said] == [f"data: lines checked: {at} of 3" for at in (1, 2, 3)]
    with showing(1e9, said.append):
        assert list(counted(range(3), None, "x")) == [0, 1, 2]
    assert list(counted(range(3), None, "shown by nobody")) == [0, 1, 2]
    assert len(said) == 3


def test_indexing_and_measures_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"{at} ", "chosen": "a", "rejected": "b"} for at in range(30)]
    lines.write_text("".join(json.dumps(one) + "\n" for one in pairs))
    given = {"task": None, "data_files": str(lines), "pairs": 4, "evaluation": {"val_set_size": 0.4}}
    trainer = Trainer(objective_recipe(tmp_path, "dpo", given, log={"progress_seconds": 1e-6}))
    said = capsys.readouterr().out
    assert f"data: lines of {lines} indexed: 30, 0 s" in said
    assert "data: lines checked: 1 of " in said
    trainer.evaluate()
    assert "held out: forwards: 1 of " in capsys.readouterr().out
