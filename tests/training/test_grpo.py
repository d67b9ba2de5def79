"""GRPO and its relatives: losses against hand-written torch, bitwise identical log-probabilities, several processes."""

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.objective_recipes import LOWER, TASK, WARMUP, dense_logprobs, objective_recipe, resumed, weights
from tests.helpers.processes import run_processes
from tests.helpers.rope import longrope
from toolkit.errors import ToolkitError
from toolkit.training.loop import Trainer, train
from toolkit.training.losses import group_advantages, importance_weight, policy_loss, sequence_mean
from toolkit.training.metrics import read_metrics
from toolkit.training.objectives.grpo import GRPO
from toolkit.training.samples import MicroBatch, Sample, pack

SMALL = {"task": LOWER, "prompts": 3, "num_generations": 4}


def setup(folder: Path, objective: dict[str, Any], **sections: Any) -> tuple[Trainer, GRPO]:
    trainer = Trainer(objective_recipe(folder, "grpo", SMALL | objective, **sections), quiet=True)
    assert isinstance(trainer.objective, GRPO)
    return trainer, trainer.objective


def by_hand(model: Any, samples: list[Sample], objective: dict[str, Any], longest: int) -> torch.Tensor:
    """The loss of groups of four, from the definitions, one sample after the other."""
    low, high = objective.get("epsilon", 0.2), objective.get("epsilon_high", 0.2)
    terms, tokens = [], []
    for sample in samples:
        count = len(sample.tokens)
        logprob = dense_logprobs(model, sample.sequence)[-count:]
        behaviour = torch.tensor(sample.behaviour, dtype=logprob.dtype)
        scale = torch.ones(count, dtype=logprob.dtype)
        if objective.get("importance_sampling_clip_max") is not None:
            assert sample.train is not None
            scale = torch.exp(sample.train - behaviour).clamp(max=objective["importance_sampling_clip_max"])
            behaviour = sample.train
        if objective.get("importance_sampling_level") == "sequence":
            ratio = torch.exp((logprob - behaviour).mean()).expand(count)
        else:
            ratio = torch.exp(logprob - behaviour)
        surrogate = torch.minimum(ratio * sample.advantage, ratio.clamp(1 - low, 1 + high) * sample.advantage)
        term = -surrogate * scale
        if objective.get("beta"):
            assert sample.reference is not None
            d = sample.reference - logprob
            term = term + objective["beta"] * (d.exp() - 1 - d)
        terms.append(term)
        tokens.append(count)
    loss_type = objective.get("loss_type", "grpo")
    if loss_type == "dapo":
        return torch.cat(terms).sum() / sum(tokens)
    if loss_type == "dr_grpo":
        return torch.cat(terms).sum() / (len(terms) * longest)
    return torch.stack([term.mean() for term in terms]).mean()


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"scale_rewards": "none", "loss_type": "dr_grpo"},
        {"loss_type": "dapo", "epsilon_high": 0.28},
        {"importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
        {"importance_sampling_clip_max": 1.01},
        {"beta": 0.3},
        {
            "beta": 0.3,
            "importance_sampling_level": "sequence",
            "importance_sampling_clip_max": 0.99,
            "loss_type": "dapo",
        },
    ],
)
def test_losses_and_gradients_are_those_of_the_definitions(tmp_path: Path, objective: dict[str, Any]) -> None:
    trainer, policy = setup(tmp_path, objective | {"num_iterations": 2}, model={"dtype": "float64"})
    updates = policy.updates(0)
    chance = torch.Generator().manual_seed(0)
    for update in range(2):
        micros = next(updates)
        loss = torch.zeros((), dtype=torch.float64)
        for micro in micros:
            assert micro.first == (update == 0)
            part = policy.loss(trainer.forward, micro)
            part.backward()
            loss += part.detach()
        ours = {name: p.grad.clone() for name, p in trainer.hf_model.named_parameters() if p.grad is not None}
        trainer.hf_model.zero_grad()
        samples = [sample for micro in micros for sample in micro.samples]
        assert len(samples) == 12
        exact = by_hand(trainer.hf_model, samples, objective, 8)
        exact.backward()
        torch.testing.assert_close(loss, exact.detach(), rtol=1e-6, atol=1e-7)
        for name, parameter in trainer.hf_model.named_parameters():
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)
        trainer.hf_model.zero_grad()
        with torch.no_grad():  # far enough for some ratios to be clipped
            for parameter in trainer.hf_model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=chance, dtype=torch.float64)
    tokens, metrics = policy.finish()
    assert tokens == 2 * sum(len(sample.tokens) for sample in samples)
    if "importance_sampling_clip_max" not in objective:
        assert 0.0 < metrics["clip_ratio/region_mean"] < 1.0
    assert ("kl" in metrics) == ("beta" in objective)


def test_advantages() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    centred = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards, scaled=False), centred)
    deviations = (centred.square().sum(1, keepdim=True) / 3).sqrt()
    torch.testing.assert_close(group_advantages(rewards), centred / (deviations + 1e-4))
    assert not group_advantages(torch.full((1, 7), 0.1)).any()  # the mean of seven 0.1 is not quite 0.1


def test_advantages_of_groups_with_missing_rewards() -> None:
    """Those of the others alone, computed by numpy; a group of one, or of none, has none."""
    nan = float("nan")
    rewards = torch.tensor([[0.0, nan, 1.0, 3.0], [nan, nan, 2.0, nan], [nan] * 4, [0.0, 1.0, 1.0, 0.0]])
    for scaled in (False, True):
        got = group_advantages(rewards.double(), scaled=scaled)
        others = np.array([0.0, 1.0, 3.0])
        expected = (others - others.mean()) / (others.std(ddof=1) + 1e-4 if scaled else 1.0)
        assert got[0].tolist() == pytest.approx([expected[0], 0.0, *expected[1:]], rel=1e-12)
        assert not got[1:3].any()
        assert torch.equal(got[3], group_advantages(rewards[3:].double(), scaled=scaled)[0])
        assert group_advantages(torch.tensor([[5.0]]), scaled=scaled).tolist() == [[0.0]]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_completion_without_a_reward_has_no_part_in_its_group(tmp_path: Path, missing: float | None) -> None:
    _, policy = setup(tmp_path, {"prompts": 2})
    said: list[str] = []
    object.__setattr__(policy.context, "log", said.append)
    rewards = iter([missing, 0.0, 1.0, 2.0] + [missing] * 4)
    policy.prompts.task.reward = lambda prompt, completion: next(rewards)  # type: ignore[method-assign]
    samples = [sample for micro in next(policy.updates(0)) for sample in micro.samples]
    assert [sample.advantage for sample in samples] == pytest.approx([-1.0, 0.0, 1.0], abs=1e-3)
    assert sum(sample.weight * len(sample.tokens) for sample in samples) == pytest.approx(1.0)
    metrics = policy.finish()[1]
    assert (metrics["reward"], metrics["unscored_fraction"], metrics["groups_dropped"]) == (1.0, 5 / 8, 1)
    assert metrics["reward_std"] == pytest.approx(1.0)
    assert ["note: 5 of 8 completions of a step have no reward" in line for line in said] == [True]


def test_a_run_of_which_no_completion_has_a_reward_changes_nothing(tmp_path: Path) -> None:
    trainer, policy = setup(tmp_path, {})
    policy.prompts.task.reward = lambda prompt, completion: None  # type: ignore[method-assign]
    before = weights(trainer)
    assert trainer.train_step() == (0.0, 0.0)
    metrics = policy.finish()[1]
    assert math.isnan(metrics["reward"])
    assert metrics["unscored_fraction"] == 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_truncated_completions_can_be_masked(tmp_path: Path, loss_type: str) -> None:
    """As in TRL: they count in the group's mean and in the number of samples, their tokens nowhere."""
    _, policy = setup(tmp_path, {"prompts": 2, "mask_truncated_completions": True, "loss_type": loss_type})
    generate = policy.rollout.generate

    def cut(*args: Any) -> Any:
        groups = generate(*args)
        for index, one in enumerate(one for group in groups for one in group):
            one.finish_reason = "length" if index % 2 else "stop"
        return groups

    policy.rollout.generate = cut  # type: ignore[method-assign]
    rewards = iter([0.0, 1.0, 2.0, 3.0] * 2)
    policy.prompts.task.reward = lambda prompt, completion: next(rewards)  # type: ignore[method-assign]
    samples = [sample for micro in next(policy.updates(0)) for sample in micro.samples]
    advantages = group_advantages(torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64))[0].tolist()
    assert [sample.advantage for sample in samples] == [advantages[0], advantages[2]] * 2
    tokens = sum(len(sample.tokens) for sample in samples)
    for sample in samples:
        length = len(sample.tokens)
        assert sample.weight == {"grpo": 1 / (8 * length), "dapo": 1 / tokens, "dr_grpo": 1 / (8 * 8)}[loss_type]


def test_a_step_whose_completions_are_all_masked_has_no_loss(tmp_path: Path) -> None:
    settings = {"mask_truncated_completions": True, "rollout": {"max_completion_length": 1, "max_num_seqs": 16}}
    trainer, policy = setup(tmp_path, settings | {"beta": 0.1, "loss_type": "dapo"})
    rewards = iter([0.0, 1.0] * 6)
    policy.prompts.task.reward = lambda prompt, completion: next(rewards)  # type: ignore[method-assign]
    before = weights(trainer)
    assert trainer.train_step() == (0.0, 0.0)
    assert trainer.step == 1
    assert policy.finish()[1]["truncated_fraction"] == 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_completions_have_the_form_of_the_recipe(tmp_path: Path) -> None:
    """Their log-probabilities are the model's own, whose ratio to the training forward's is one in every bit."""
    rollout = {"max_completion_length": 8, "max_num_seqs": 16, "structured_outputs": {"regex": "[a-f]{2}( [a-f]+)?"}}
    trainer, policy = setup(tmp_path, {"rollout": rollout})
    found: list[Any] = []
    generate = policy.rollout.generate

    def kept(*args: Any, **given: Any) -> Any:
        found.append(generate(*args, **given))
        return found[-1]

    policy.rollout.generate = kept  # type: ignore[method-assign]
    policy.prompts.task.reward = lambda prompt, completion: completion.count("a")  # type: ignore[method-assign]
    trainer.train_step()
    ones = [one for groups in found for group in groups for one in group]
    assert len(ones) >= 12
    for one in ones:
        whole = one.finish_reason == "stop"
        assert re.fullmatch("[a-f]{2}( [a-f]+)?" if whole else "[a-f]{0,2}( [a-f]*)?", one.text), one.text
        assert one.logprobs != one.sampling_logprobs
    with pytest.raises(ToolkitError, match=r"structured_outputs must have one of json, regex.*got none"):
        setup(tmp_path / "other", {"rollout": rollout | {"structured_outputs": {}}})


def test_truncated_importance_and_sequence_means() -> None:
    train = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    weight = importance_weight(train, torch.tensor([-1.0, -1.0, -2.0]), 2.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 0.36787944, 2.0]))
    assert not weight.requires_grad
    values = torch.arange(5.0)
    torch.testing.assert_close(sequence_mean(values, [2, 3]), torch.tensor([0.5, 0.5, 3.0, 3.0, 3.0]))
    ratio = policy_loss(values, torch.zeros(5), torch.ones(5), epsilon_high=100.0, lengths=[2, 3]).loss
    torch.testing.assert_close(ratio, -torch.exp(sequence_mean(values, [2, 3])))


def test_the_loss_does_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    losses = []
    for name, budget in (("small", 24), ("large", 4096)):
        trainer, policy = setup(tmp_path, {}, run_name=name, train={"batch_tokens": budget})
        micros = next(policy.updates(0))
        losses.append(sum(policy.loss(trainer.forward, micro).item() for micro in micros))
        assert len(micros) == 1 if budget == 4096 else len(micros) > 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_group_without_variance_counts_in_the_mean_and_is_not_computed(tmp_path: Path) -> None:
    trainer, policy = setup(tmp_path, {"prompts": 2})
    rewards = iter([1.0] * 4 + [0.0, 1.0, 1.0, 0.0])
    policy.prompts.task.reward = lambda prompt, completion: next(rewards)  # type: ignore[method-assign]
    micros = next(policy.updates(0))
    samples = [sample for micro in micros for sample in micro.samples]
    assert len(samples) == 4
    assert sum(sample.weight * len(sample.tokens) for sample in samples) == pytest.approx(0.5)
    sum(policy.loss(trainer.forward, micro) for micro in micros)
    assert policy.finish()[1]["groups"] == 2


def test_micro_batches_keep_groups_together_and_within_the_budget() -> None:
    def group(prompt: int, *lengths: int) -> list[Sample]:
        return [Sample([0] * prompt, [0] * length, [0.0] * length) for length in lengths]

    def cost(micro: MicroBatch) -> int:
        prompts = {id(sample.prompt): len(sample.prompt) for sample in micro.samples}
        return sum(prompts.values()) + sum(len(sample.tokens) for sample in micro.samples)

    groups = [group(5, 3, 3), group(5, 2, 4), group(4, 9, 9, 9, 9), group(30, 1)]
    for one in groups:
        shared = one[0].prompt
        for sample in one:
            sample.prompt = shared
    micros = pack(groups, 22)
    assert [len(micro.samples) for micro in micros] == [4, 2, 2, 1]
    assert [sample for micro in micros for sample in micro.samples] == [sample for one in groups for sample in one]
    assert all(cost(micro) <= 22 for micro in micros[:3])
    assert pack([], 22) == []


def test_it_learns_with_bitwise_identical_logprobs_in_every_step(tmp_path: Path) -> None:
    recipe = objective_recipe(
        tmp_path,
        "grpo",
        {"task": LOWER, "prompts": 8, "num_generations": 8},
        train={"max_steps": 12, "batch_tokens": 1024},
        optimizer={"learning_rate": 2e-2, "weight_decay": 0.0},
        schedule={"lr_scheduler_type": "constant_with_warmup"},
        evaluate={"do_eval": True},
        checkpoint={"save_steps": None},
        log={"plot": True},
    )
    metrics = train(recipe, quiet=True)
    lines = read_metrics(tmp_path / "runs" / "grpo" / "metrics.jsonl")
    assert [line["mismatch_bits"] for line in lines] == [0] * 12
    assert [line["mismatch_kl"] for line in lines] == [0.0] * 12
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.2
    versions = [line["weight_version"] for line in lines]
    assert versions == sorted(set(versions))  # every step moved it
    for name in (
        "entropy",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "rollout_tokens_per_second",
        "tokens_per_second",
    ):
        assert all(line[name] >= 0.0 for line in lines)
    assert lines[0]["training_tokens_per_second"] > 0
    assert 4.0 < lines[0]["entropy"] < 6.0  # random weights over 257 tokens: log 257 = 5.55
    assert metrics["eval_samples"] == metrics["before_training"]["eval_samples"] == 16
    assert (tmp_path / "runs" / "grpo" / "plots" / "reward.png").is_file()


def test_memory_is_what_the_recipe_gives_and_changes_no_bit(tmp_path: Path) -> None:
    steps, metrics, engines = [], [], []
    for name, memory in (("ample", None), ("scarce", 48)):  # three pages: most sequences are preempted on the way
        rollout = {"max_completion_length": 8, "max_num_seqs": 16, "memory_tokens": memory}
        trainer, policy = setup(tmp_path, {"rollout": rollout}, run_name=name)
        steps.append([trainer.train_step() for _ in range(2)])
        metrics.append(policy.finish()[1])
        engines.append(policy.rollout.engine.stats())
    assert steps[0] == steps[1]
    assert [engine["num_blocks"] for engine in engines] == [32, 3]
    assert engines[1]["num_preemptions"] > 0
    assert metrics[1]["mismatch_bits"] == 0


def test_a_fast_model_reports_its_mismatch(tmp_path: Path) -> None:
    trainer, policy = setup(tmp_path, {"importance_sampling_clip_max": 2.0}, model={"numerics": "fast"})
    trainer.train_step()
    _, metrics = policy.finish()
    assert 0.0 <= metrics["mismatch_kl"] < 1e-9


def test_dynamic_sampling_drops_groups_without_variance(tmp_path: Path) -> None:
    trainer, policy = setup(tmp_path, {"dynamic_sampling": True, "max_rounds": 3})
    rewards = iter([1.0] * 4 + [0.0, 1.0, 1.0, 0.0] + [0.0] * 4 + [1.0, 0.0] * 2 + [0.5] * 4 + [0.2, 0.3] * 2)
    policy.prompts.task.reward = lambda prompt, completion: next(rewards)  # type: ignore[method-assign]
    micros = next(policy.updates(0))
    kept = [sample.advantage for micro in micros for sample in micro.samples]
    assert len(kept) == 12
    assert all(kept)
    for micro in micros:
        policy.loss(trainer.forward, micro)
    _, metrics = policy.finish()
    assert (metrics["groups"], metrics["groups_dropped"], metrics["rounds"]) == (3, 3, 2.0)


def test_a_step_without_any_variance_changes_nothing(tmp_path: Path) -> None:
    trainer, policy = setup(tmp_path, {"dynamic_sampling": True, "max_rounds": 2})
    policy.prompts.task.reward = lambda prompt, completion: 1.0  # type: ignore[method-assign]
    before = weights(trainer)
    assert trainer.train_step() == (0.0, 0.0)
    tokens, metrics = policy.finish()
    assert (tokens, metrics["groups"], metrics["rounds"], metrics["accuracy"]) == (0, 0, 2.0, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


@pytest.mark.parametrize("objective", [{}, {"num_iterations": 2, "beta": 0.1, "warmup": WARMUP, "task": TASK}])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, objective: dict[str, Any]) -> None:
    sections: dict[str, Any] = {
        "train": {"max_steps": 5},
        "checkpoint": {"save_steps": 2},
        "evaluate": {"do_eval": True},
    }
    whole, _ = setup(tmp_path, objective, run_name="whole", **sections)
    whole.fit()
    recipe = objective_recipe(tmp_path, "grpo", SMALL | objective, run_name="parts", **sections)
    again = resumed(recipe)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name
    if "warmup" in objective:
        folder = tmp_path / "runs" / "parts" / "warmup"
        assert (folder / "checkpoints" / "step-000006").is_dir()
        with pytest.raises(ToolkitError, match="already holds checkpoints up to step 5"):
            Trainer(recipe, quiet=True)
        os.rename(folder, folder.with_name("gone"))
        with pytest.raises(ToolkitError, match="which is no longer there"):
            Trainer(recipe.model_copy(update={"resume_from_checkpoint": True}), quiet=True)


def test_a_prompt_too_long_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ToolkitError, match=r"a prompt must have <= 8 tokens with train.max_length 16 and objective.rollout.*got \d+"
    ):
        setup(tmp_path, {"task": {"name": "countdown", "numbers": 6, "largest": 99}}, train={"max_length": 16})


@pytest.mark.sweep
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Each rolls out its share; the step is that of one process, and both end with the same weights."""
    run_processes("training/two_rollouts.py", tmp_path, says="same weights")
    trainer, _ = setup(tmp_path, {"prompts": 4}, run_name="one", train={"max_steps": 2})
    trainer.fit()
    one, two = (read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("one", "two"))
    for key in ("reward", "num_tokens", "completions/mean_length", "entropy", "mismatch_bits"):
        assert one[0][key] == pytest.approx(two[0][key], rel=1e-9)
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-4)
    # One process continues where two have ended.
    trainer, _ = setup(tmp_path, {"prompts": 4}, run_name="two", train={"max_steps": 3}, resume_from_checkpoint=True)
    trainer.fit()
    assert [line["step"] for line in read_metrics(tmp_path / "runs" / "two" / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["grpo", "distill"])
def test_completions_are_trained_with_the_rotary_tables_that_they_were_sampled_by(tmp_path: Path, kind: str) -> None:
    """Prompts differ in length, so that some requests declare more tokens than the border, and some end before it."""
    llama = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    model = {"config": llama | {"rope_parameters": longrope(4, border=16)}}
    own = {"num_generations": 4, "prompts": 6, "task": {"name": "tests.helpers.objective_recipes:Uneven"}}
    if kind == "distill":
        own |= {
            "teacher": {"config": llama, "max_steps": 1, "learning_rate": 1e-3, "batch_tokens": 64},
            "warmup": WARMUP,
        }
    trainer = Trainer(objective_recipe(tmp_path, kind, own, model=model), quiet=True)
    objective: Any = trainer.objective
    seen: list[Any] = []
    generate = objective.rollout.generate

    def record(*args: Any) -> Any:
        groups = generate(*args)
        for at, one in enumerate(one for group in groups for one in group):
            if at % 3 == 0:  # as if it had ended early
                del one.token_ids[2:], one.logprobs[2:]
            seen.append(one)
        return groups

    objective.rollout.generate = record
    micros = next(objective.updates(0))
    assert {one.rotary_length for one in seen} == {1, 17}
    assert any(one.rotary_length == 17 and len(one.prompt_token_ids) + len(one.token_ids) <= 16 for one in seen)
    if kind == "grpo":
        for micro in micros:
            objective.loss(trainer.forward, micro)
        assert objective.finish()[1]["mismatch_bits"] == 0
        return
    rows = torch.cat([micro.batch.rotary_lengths[micro.batch.sample_rows] for micro in micros])
    counts = torch.tensor([len(one.prompt_token_ids) + len(one.token_ids) - 1 for one in seen])
    assert torch.equal(rows, torch.tensor([one.rotary_length for one in seen]).repeat_interleave(counts))
