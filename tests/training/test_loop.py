"""The loop: it learns, resumes bit for bit, accumulates and scores rightly; each error is one sentence."""

import gzip
import json
import lzma
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.processes import run_processes
from tests.helpers.training_recipes import tiny_recipe, write_corpus
from toolkit.config import Recipe, dump
from toolkit.errors import ToolkitError
from toolkit.state.batch import RaggedBatch
from toolkit.training.evaluate import compressed_bits_per_byte, windows
from toolkit.training.loop import Trainer, train
from toolkit.training.metrics import read_metrics
from toolkit.training.objectives.pretrain import Pretrain
from toolkit.training.schedule import learning_rate_factor


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "text")
    return tmp_path


class Interrupted(Exception):
    pass


def noisy(recipe: Recipe) -> Trainer:
    """A trainer whose forwards use torch's generator: dropout on the embeddings."""
    trainer = Trainer(recipe, quiet=True)
    embeddings = trainer.hf_model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: torch.dropout(output, 0.2, True))
    return trainer


def train_until(recipe: Recipe, step: int) -> None:
    """Train, and fall over when ``step`` steps are done, before that step could be saved."""
    trainer = noisy(recipe)
    original = trainer.train_step

    def train_step() -> tuple[float, float]:
        result = original()
        if trainer.step == step:
            raise Interrupted
        return result

    trainer.train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        trainer.fit()


def pretraining(trainer: Trainer) -> Pretrain:
    assert isinstance(trainer.objective, Pretrain)
    return trainer.objective


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.hf_model.state_dict().items()}


def moments(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors."""
    states = trainer.optimizer.optimizer.state_dict()["state"].items()
    return {f"{at}/{name}": value for at, state in states for name, value in state.items()}


def run(recipe: Recipe) -> Trainer:
    trainer = noisy(recipe)
    trainer.fit()
    return trainer


def changed(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update=values)


MOE_CONFIG = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "head_dim": 8,
}


@pytest.mark.parametrize(("accumulate", "config"), [(1, {"tie_word_embeddings": True}), (2, {}), (1, MOE_CONFIG)])
def test_resumed_equals_uninterrupted_bit_for_bit(corpus: Path, accumulate: int, config: dict[str, Any]) -> None:
    sections = {
        "train": {"max_steps": 8, "gradient_accumulation_steps": accumulate},
        "model": {"config": (tiny_recipe(corpus).model.config or {}) | config},
    }
    whole = run(tiny_recipe(corpus, run_name="whole", **sections))
    generator = torch.get_rng_state()
    recipe = tiny_recipe(corpus, run_name="parts", **sections)
    for stop in (5, 6, 8):  # 5 resumes from 4; 6 from 4 again; 8 from 6
        train_until(changed(recipe, resume_from_checkpoint=True), stop)
        random.seed(stop)  # what another process would start from
        np.random.seed(stop)
        torch.manual_seed(stop)
    parts = run(changed(recipe, resume_from_checkpoint=True))
    assert parts.step == whole.step == 8
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name
    for index, entry in whole.optimizer.state_dict()["state"].items():
        for key, tensor in entry.items():
            assert torch.equal(tensor, parts.optimizer.state_dict()["state"][index][key])
    assert parts.objective.state_dict() == whole.objective.state_dict()
    assert torch.equal(torch.get_rng_state(), generator)
    lines = [read_metrics(trainer.folder / "metrics.jsonl") for trainer in (whole, parts)]
    for one, other in zip(*lines, strict=True):
        for key in ("step", "loss", "learning_rate", "grad_norm", "num_tokens", "epoch"):
            assert one[key] == other[key]
    assert [line["step"] for line in lines[0]] == list(range(1, 9))


def test_resume_from_a_named_step_drops_what_is_later(corpus: Path) -> None:
    recipe = tiny_recipe(corpus, checkpoint={"save_steps": 2, "save_total_limit": 9})
    whole = weights(run(recipe))
    folder = Path(recipe.output_dir) / "tiny"
    again = noisy(changed(recipe, resume_from_checkpoint="step-4"))
    assert again.step == 4
    assert sorted(path.name for path in (folder / "checkpoints").glob("step*")) == [
        "step-000002",
        "step-000004",
    ]
    assert (folder / "checkpoints" / "latest").read_text() == "step-000004\n"
    again.fit()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(again).items())


def test_it_learns_and_leaves_a_whole_run_behind(corpus: Path) -> None:
    recipe = tiny_recipe(
        corpus,
        train={"max_steps": 60},
        checkpoint={"save_steps": 25, "save_total_limit": 2},
        log={"report_to": "tensorboard", "plot": True},
        evaluate={"do_eval": True},
    )
    metrics = train(recipe, quiet=True)
    folder = Path(recipe.output_dir) / "tiny"
    lines = read_metrics(folder / "metrics.jsonl")
    assert len(lines) == 60
    assert abs(lines[0]["loss"] - math.log(270)) < 0.2
    assert metrics["loss"] < lines[0]["loss"] - 1.5
    assert lines[0]["learning_rate"] == pytest.approx(0.005)
    assert sorted(path.name for path in (folder / "checkpoints").glob("step*")) == [
        "step-000050",
        "step-000060",
    ]
    assert (folder / "recipe.yaml").read_text() == dump(recipe)
    assert (folder / "plots" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list((folder / "tensorboard").iterdir())
    assert json.loads((folder / "result.json").read_text()) == metrics
    assert 0 < metrics["eval_bits_per_byte"] < 8
    assert not list(folder.rglob(".*"))


def test_accumulation_equals_one_large_batch(corpus: Path) -> None:
    """Two forwards of 40 tokens and one of 80 over the same sequences give one gradient (fp64)."""
    recipe = tiny_recipe(corpus, train={"gradient_accumulation_steps": 2, "max_steps": 2}, model={"dtype": "float64"})
    trainer = Trainer(recipe, quiet=True)
    objective = pretraining(trainer)
    batches = [objective.streams[0].next_batch() for _ in range(2)]
    large = RaggedBatch.from_sequences([chunk for batch in batches for chunk in batch.inputs], share=False)
    targets = torch.tensor([token for batch in batches for chunk in batch.targets for token in chunk])
    logits = trainer.ragged(large)
    torch.nn.functional.cross_entropy(logits, targets).backward()
    expected = {name: p.grad.clone() for name, p in trainer.ragged.named_parameters() if p.grad is not None}
    trainer.ragged.zero_grad()
    objective.load_state_dict({"streams": [{"epoch": 0, "next": 0, "turn": 0, "open": []}]})
    got: dict[str, torch.Tensor] = {}

    def clip() -> torch.Tensor:
        got.update({name: p.grad.clone() for name, p in trainer.ragged.named_parameters() if p.grad is not None})
        return torch.zeros(())

    trainer.gradients._clip = clip  # type: ignore[method-assign]
    trainer.train_step()
    assert set(got) == set(expected)
    assert len(got) == len(list(trainer.ragged.parameters()))
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-14, msg=name)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_bits_per_byte_against_one_token_at_a_time(corpus: Path, overlap: float) -> None:
    """Score every held-out token by an ordinary forward over its context, one forward per token."""
    recipe = tiny_recipe(corpus, model={"dtype": "float64"}, evaluate={"do_eval": True, "overlap": overlap})
    trainer = Trainer(recipe, quiet=True)
    objective = pretraining(trainer)
    score = objective.score(objective.held_out_texts())
    texts = [Path(file.path).read_bytes() for file in objective.held_out_files]
    length, keep = recipe.train.max_length, int(recipe.train.max_length * overlap)
    bits, tokens = 0.0, 0
    trainer.hf_model.eval()
    with torch.no_grad():
        for text in texts:
            row = [trainer.tokenizer.eos_token_id, *trainer.tokenizer(text.decode())["input_ids"]]
            start = 0
            for position in range(1, len(row)):
                if position - start > length:  # the window is full; the next one starts ``keep`` inputs back
                    start = position - 1 - keep
                logits = trainer.hf_model(torch.tensor([row[start:position]])).logits[0, -1]
                bits -= logits.log_softmax(-1)[row[position]].item() / math.log(2)
                tokens += 1
    assert tokens == score.tokens
    assert score.bytes == sum(map(len, texts))
    assert score.bits == pytest.approx(bits, rel=1e-9)
    assert trainer.ragged.training


def test_windows_cover_every_token_once() -> None:
    for count, length, overlap in [(0, 4, 1), (1, 4, 3), (4, 4, 0), (5, 4, 0), (50, 7, 3), (50, 7, 6)]:
        ids = list(range(100, 100 + count))
        cut = list(windows(ids, 0, length, overlap))
        assert [token for window in cut for token in window.targets] == ids
        for window in cut:
            assert len(window.inputs) <= length
            assert window.inputs[-1] + 1 == window.targets[-1] or window.inputs == [0]


def test_compressors_are_those_of_the_standard_library() -> None:
    text = b"def f(x):\n    return x\n" * 50
    metrics = compressed_bits_per_byte(text)
    assert metrics["gzip -9"] == len(gzip.compress(text, 9)) * 8 / len(text)
    assert metrics["xz -9"] == len(lzma.compress(text, preset=9)) * 8 / len(text)


def test_learning_rate_schedules() -> None:
    base = tiny_recipe(Path("/x"))

    def factors(kind: str, decay: int, floor: float) -> list[float]:
        schedule = base.schedule.model_copy(
            update={
                "lr_scheduler_type": kind,
                "warmup_steps": 4,
                "num_decay_steps": decay,
                "min_lr_ratio": floor,
            }
        )
        return [learning_rate_factor(step, 20, schedule) for step in range(20)]

    for kind, decay in (("cosine_with_min_lr", 0), ("warmup_stable_decay", 5), ("constant_with_warmup", 0)):
        assert factors(kind, decay, 0.1)[:4] == [0.25, 0.5, 0.75, 1.0]
    cosine = factors("cosine_with_min_lr", 0, 0.1)
    assert cosine[-1] == pytest.approx(0.1)
    assert cosine[4:] == sorted(cosine[4:], reverse=True)
    assert cosine[4] == 1.0
    wsd = factors("warmup_stable_decay", 5, 0.0)
    assert wsd[4:15] == [1.0] * 11
    assert wsd[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert set(factors("constant_with_warmup", 0, 0.1)[4:]) == {1.0}


def sentence(recipe: Recipe) -> str:
    with pytest.raises(ToolkitError) as caught:
        Trainer(recipe, quiet=True)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            {"model_type": "lama"},
            "model.config.model_type must be a causal language model of transformers, got 'lama'",
        ),
        (
            {"hiden_size": 8},
            "Unknown field 'model.config.hiden_size' for model type 'llama'; did you mean 'hidden_size'?",
        ),
        (
            {"hidden_size": "wide"},
            "model.config is refused by transformers: Field 'hidden_size' expected int",
        ),
        (
            {"hidden_size": 15},
            "model.config is refused by transformers: The hidden size (15) is not a multiple",
        ),
        ({"vocab_size": 100}, "model.config.vocab_size must be >= the tokenizer's, which is 270, got 100."),
        (
            {"max_position_embeddings": 8},
            "train.max_length must be <= the model's max_position_embeddings, which is 8, got 16.",
        ),
    ],
)
def test_a_wrong_model_is_one_sentence(corpus: Path, model: dict[str, Any], expected: str) -> None:
    config = tiny_recipe(corpus).model.config
    assert config is not None
    assert sentence(tiny_recipe(corpus, model={"config": config | model})).startswith(expected)
    assert not (corpus / "runs").exists()


def test_a_refused_recipe_leaves_the_earlier_run_alone(corpus: Path) -> None:
    recipe = tiny_recipe(corpus)
    train(recipe, quiet=True)
    before = sorted(path.name for path in (corpus / "runs" / "tiny").rglob("*"))
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    message = sentence(tiny_recipe(corpus, overwrite=True, model={"config": gpt2 | {"n_head": 3}}))
    assert message.startswith("model.config makes no model: ")
    assert sorted(path.name for path in (corpus / "runs" / "tiny").rglob("*")) == before


def test_a_wrong_checkpoint_to_start_from_is_one_sentence(corpus: Path) -> None:
    train(tiny_recipe(corpus, run_name="base"), quiet=True)
    good = corpus / "runs" / "base" / "checkpoints" / "step-000008"
    for file, content, expected in [
        ("model.safetensors", b"\0" * 100, "is not a whole safetensors file"),
        ("config.json", b"{", "The tokenizer in "),
    ]:
        original = (good / file).read_bytes()
        (good / file).write_bytes(content)
        assert expected in sentence(tiny_recipe(corpus, model={"config": None, "name_or_path": str(good)}))
        (good / file).write_bytes(original)
    weights_file = good / "model.safetensors"
    whole = load_file(str(weights_file))
    save_file({k: v for k, v in whole.items() if "o_proj" not in k}, str(weights_file), {"format": "pt"})
    lacking = sentence(tiny_recipe(corpus, model={"config": None, "name_or_path": str(good)}))
    assert "lack 'model.layers.0.self_attn.o_proj.weight' and 1 more." in lacking  # never trained from random values
    save_file(whole, str(weights_file), {"format": "pt"})
    missing = sentence(tiny_recipe(corpus, model={"config": None, "name_or_path": str(corpus)}))
    assert missing.startswith("model.name_or_path")
    started = Trainer(tiny_recipe(corpus, model={"config": None, "name_or_path": str(good)}), quiet=True)
    for name, tensor in load_file(str(good / "model.safetensors")).items():
        assert torch.equal(tensor, started.hf_model.state_dict()[name])


def test_what_cannot_be_resumed_is_one_sentence(corpus: Path) -> None:
    recipe = tiny_recipe(corpus)
    train(recipe, quiet=True)
    assert "already holds checkpoints up to step 8; resume with --resume" in sentence(recipe)
    resumed = changed(recipe, resume_from_checkpoint=True)
    other = changed(resumed, optimizer=recipe.optimizer.model_copy(update={"learning_rate": 0.5}))
    assert sentence(other).startswith("optimizer.learning_rate must be 0.01 to resume from ")
    assert "there are step-000004, step-000006, step-000008" in sentence(
        changed(recipe, resume_from_checkpoint="step-5")
    )
    shorter = changed(resumed, train=recipe.train.model_copy(update={"max_steps": 7}))
    assert sentence(shorter).startswith("train.max_steps must be >= 8, the step of ")
    (corpus / "text" / "new.py").write_text("x = 1\n")
    assert "has other files than when" in sentence(resumed)
    assert len(list((corpus / "runs" / "tiny" / "checkpoints").glob("step*"))) == 3  # errors removed nothing
    fresh = Trainer(changed(recipe, overwrite=True), quiet=True)
    assert fresh.step == 0
    assert not list((corpus / "runs" / "tiny" / "checkpoints").iterdir())


def test_a_step_that_is_not_finite_is_skipped(corpus: Path) -> None:
    recipe = tiny_recipe(
        corpus, run_name="skips", optimizer={"max_skipped_steps": 2}, train={"ema_decay": 0.5, "max_steps": 4},
        checkpoint={"save_steps": 2},
    )  # fmt: skip
    trainer = Trainer(recipe, quiet=True)
    trainer.train_step()
    before, kept = weights(trainer), trainer.hf_model.get_parameter("model.norm.weight")[3].item()
    poisoned = trainer.hf_model.get_parameter("model.norm.weight").data
    optimizer = {name: tensor.clone() for name, tensor in moments(trainer).items()}
    schedule, average = trainer.scheduler.state_dict(), trainer.averaged._averages["model.norm.weight"].clone()
    poisoned[3] = math.nan
    loss, norm = trainer.train_step()
    assert math.isnan(loss)
    assert math.isnan(norm)
    assert trainer.step == 2
    assert trainer.gradients.metrics() == {"skipped_steps": 1}
    poisoned[3] = kept
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    assert all(torch.equal(tensor, optimizer[name]) for name, tensor in moments(trainer).items())
    assert trainer.scheduler.state_dict() == schedule
    assert torch.equal(trainer.averaged._averages["model.norm.weight"], average)
    trainer.save()
    assert math.isfinite(trainer.train_step()[0])  # the next batch is another
    again = Trainer(changed(recipe, resume_from_checkpoint=True), quiet=True)
    assert again.gradients.metrics() == {"skipped_steps": 1}
    again.fit()
    lines = read_metrics(corpus / "runs" / "skips" / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [1, 1]  # the steps after the resumed checkpoint
    poisoned[3] = math.nan
    trainer.train_step()
    trainer.train_step()
    with pytest.raises(ToolkitError, match=r"The gradients of 3 steps up to 6 are not finite \(loss nan, norm nan\)"):
        trainer.train_step()


def test_a_loss_that_is_not_finite_skips_the_step_too(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny_recipe(corpus, run_name="infinite"), quiet=True)
    before, loss = weights(trainer), trainer.objective.loss
    monkeypatch.setattr(trainer.objective, "loss", lambda *given: loss(*given) + math.inf)  # its gradient is finite
    mean, norm = trainer.train_step()
    assert math.isnan(mean)
    assert math.isfinite(norm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_a_gradient_that_is_not_finite_stops_the_run(corpus: Path) -> None:
    trainer = Trainer(tiny_recipe(corpus, optimizer={"max_skipped_steps": 0}), quiet=True)
    trainer.train_step()
    before = weights(trainer)
    with torch.no_grad():
        trainer.hf_model.get_parameter("model.norm.weight")[3] = math.nan
    with pytest.raises(ToolkitError, match=r"The gradient of step 2 is not finite"):
        trainer.train_step()
    others = {name: tensor for name, tensor in weights(trainer).items() if not tensor.isnan().any()}
    assert len(others) == len(before) - 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in others.items())


def test_two_processes_train_as_one(corpus: Path) -> None:
    run_processes("training/two_processes.py", corpus, says="bitwise identical")
    with pytest.raises(ToolkitError, match=r"data.streams must be 2 to resume with 1 processes what 2 have written"):
        Trainer(tiny_recipe(corpus, run_name="two", train={"max_steps": 4}, resume_from_checkpoint=True), quiet=True)
    two = {"train": {"max_steps": 4}, "data": {"streams": 2}, "resume_from_checkpoint": True}
    assert Trainer(tiny_recipe(corpus, run_name="two", **two), quiet=True).step == 4
