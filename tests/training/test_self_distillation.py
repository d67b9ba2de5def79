"""Self-distillation and generalised distillation: losses by dense forwards, hints, teachers, the data's completions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import LOWER, check_resumes, objective_recipe
from tests.training.test_objective_runs import TEACHER
from toolkit.errors import ToolkitError
from toolkit.training.loop import Trainer
from toolkit.training.metrics import read_metrics
from toolkit.training.objectives.distill import Distillation
from toolkit.training.objectives.sdft import SDFT

SDFT_FIELDS = {"task": LOWER, "prompts": 3, "num_generations": 2, "distillation_topk": 5}


def sdft(folder: Path, batch_tokens: int = 64, **fields: Any) -> Trainer:
    decay = {"ema_decay": 0.5} if fields.get("teacher_model_kind") == "ema" else {}
    recipe = objective_recipe(
        folder,
        "sdft",
        SDFT_FIELDS | fields,
        model={"dtype": "float64"},
        train={"batch_tokens": batch_tokens, **decay},
    )
    return Trainer(recipe, quiet=True)


def exact_loss(objective: SDFT, model: Any, teacher: Any, targets: Any) -> torch.Tensor:
    """By ordinary forwards of each completion alone, over the student's top-k tokens."""
    losses = []
    for one in targets:
        assert one.prompt != one.teacher_prompt
        count, skipped = len(one.completion), objective.section.num_loss_tokens_to_skip
        rows = []
        for net, prompt in ((model, one.prompt), (teacher, one.teacher_prompt)):
            ids = torch.tensor([[*prompt, *one.completion]])
            rows.append((net(ids).logits[0] + 0.0)[len(prompt) - 1 : -1])
        terms = []
        for student, hinted in list(zip(*rows, strict=True))[skipped:]:
            q, p = student.softmax(-1), hinted.softmax(-1).detach()
            best = q.topk(5).indices
            q, p = q[best] / q[best].sum(), p[best] / p[best].sum()
            m = 0.5 * (p + q)
            terms.append(0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum())
        losses.append(torch.stack(terms).mean() if count > skipped else rows[0].sum() * 0.0)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_the_loss_is_that_of_the_definition(kind: str, tmp_path: Path) -> None:
    trainer = sdft(tmp_path, teacher_model_kind=kind, num_loss_tokens_to_skip=1)
    objective: Any = trainer.objective
    trainer.train_step()
    objective.finish()
    targets = objective.weigh(objective.step_targets(1))
    micros = objective.micro_batches(targets)
    assert len(micros) > 1
    loss = 0.0
    for micro in micros:
        part = objective.loss(trainer.forward, micro)
        trainer.gradients.backward(part)
        loss += part.item()
    found = trainer.hf_model.lm_head.weight.grad.clone()
    trainer.hf_model.zero_grad()

    import copy

    model = trainer.hf_model
    teacher = objective._reference.model if kind == "base" else copy.deepcopy(model)
    if kind == "ema":
        assert trainer.averaged is not None
        with trainer.averaged.applied():
            teacher = copy.deepcopy(model)
        assert not torch.equal(teacher.lm_head.weight, model.lm_head.weight)
    exact = exact_loss(objective, model, teacher, targets)
    assert loss == pytest.approx(exact.item(), rel=1e-7)
    exact.backward()
    torch.testing.assert_close(found, model.lm_head.weight.grad, rtol=1e-5, atol=1e-9)


def test_equal_prompts_with_other_hints_have_teachers_of_their_own(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    rows = [{"prompt": "one", "privileged_context": f"hint {at}"} for at in range(30)]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = sdft(tmp_path, 512, task=None, data_files=str(lines), prompts=4, num_generations=1)
    objective: Any = trainer.objective
    targets = objective.weigh(objective.step_targets(0))
    same = targets[0].completion
    targets = [one._replace(completion=same, weight=targets[0].weight) for one in targets]
    assert len({tuple(one.teacher_prompt) for one in targets}) == 4
    (micro,) = objective.micro_batches(targets)
    assert len(micro.rows) == len(same)  # computed once by the student
    assert len(micro.weights) == len(micro.teacher_rows) == 4 * len(same)
    loss = objective.loss(trainer.forward, micro)
    exact = exact_loss(objective, trainer.hf_model, objective._reference.model, targets)
    assert float(loss) == pytest.approx(float(exact), rel=1e-7)


def test_the_teachers_prompt_has_the_hint(tmp_path: Path) -> None:
    template = "Hint: {privileged_context}\n{prompt}"
    objective: Any = sdft(tmp_path, teacher_prompt_template=template, generate_from_teacher=True).objective
    (problem,) = objective.stream.take(1)
    tokens = objective.context.tokenizer
    assert tokens.decode(objective.prompt_ids(problem)) == f"Hint: aaaa\n{problem.prompt}"
    targets = objective.step_targets(0)
    assert all("Hint" not in tokens.decode(one.prompt) for one in targets)
    assert all("Hint" in tokens.decode(one.teacher_prompt) for one in targets)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"distillation_mode": "sampled_token"}, r"distillation_alpha must be 1\.0 with objective\.distillation_mode"),
        ({"teacher_prompt_template": "{prompt}"}, "must have {prompt} and {privileged_context} and no other field"),
        ({"teacher_prompt_template": "{prompt}{hint}{privileged_context}"}, "and no other field"),
        ({"teacher_model_kind": "ema"}, r"train\.ema_decay must be given with objective\.teacher_model_kind 'ema'"),
    ],
)
def test_what_does_not_fit(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=said):
        objective_recipe(tmp_path, "sdft", SDFT_FIELDS | fields)


def test_a_line_without_a_hint_is_an_error(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"prompt": f"{at}"}) + "\n" for at in range(30)))
    with pytest.raises(ToolkitError, match="must have 'privileged_context' as a string or messages, got none"):
        sdft(tmp_path, task=None, data_files=str(lines))


@pytest.mark.sweep
def test_the_models_own_hints_are_learnt(tmp_path: Path) -> None:
    recipe = objective_recipe(
        tmp_path,
        "sdft",
        SDFT_FIELDS | {"prompts": 8, "distillation_mode": "full_logits"},
        train={"max_steps": 25, "batch_tokens": 512},
        optimizer={"learning_rate": 1e-2},
    )
    trainer = Trainer(recipe, quiet=True)
    objective: Any = trainer.objective
    before = exact_divergence(objective, trainer.hf_model)
    trainer.fit()
    assert exact_divergence(objective, trainer.hf_model) < 0.7 * before


def exact_divergence(objective: Any, model: Any) -> float:
    """KL(student | teacher) a token over fixed completions, by dense forwards."""
    total, count = 0.0, 0
    for number in range(8):
        (problem,) = objective.prompts.held_out(64)[0].take(number + 1)[-1:]
        completion = objective.prompts.encode("some text", problem)
        rows = []
        for net, prompt in (
            (model, objective.prompts.token_ids(problem)),
            (objective._reference.model, objective._teacher_prompt(problem)),
        ):  # fmt: skip
            with torch.no_grad():
                rows.append((net(torch.tensor([[*prompt, *completion]])).logits[0] + 0.0)[len(prompt) - 1 : -1])
        q, p = (one.softmax(-1) for one in rows)
        total, count = total + float((q * (q / p).log()).sum()), count + len(completion)
    return total / count


def metrics_of(folder: Path, name: str = "sdft") -> list[dict[str, Any]]:
    return read_metrics(folder / "runs" / name / "metrics.jsonl")


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["base", "ema"])
def test_resuming_is_exact(kind: str, tmp_path: Path) -> None:
    sections = {"train": {"ema_decay": 0.5}} if kind == "ema" else {}
    recipe = objective_recipe(tmp_path, "sdft", SDFT_FIELDS | {"teacher_model_kind": kind}, **sections)
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    check_resumes(whole, recipe)


GKD = {"task": LOWER, "prompts": 4, "teacher": TEACHER | {"max_steps": 2}, "teacher_top_k": None, "beta": 0.5}


def test_steps_of_the_data_learn_its_completions(tmp_path: Path) -> None:
    recipe = objective_recipe(tmp_path, "distill", GKD | {"lmbda": 0.0}, model={"dtype": "float64"})
    trainer = Trainer(recipe, quiet=True)
    objective = trainer.objective
    assert isinstance(objective, Distillation)
    objective.begin()
    targets = objective.weigh(objective.step_targets(0))
    tokens = objective.context.tokenizer
    assert {tokens.decode(one.completion) for one in targets} == {"aaaa<|endoftext|>"}
    loss = sum(float(objective.loss(trainer.forward, micro)) for micro in objective.micro_batches(targets))
    terms = []
    for one in targets:
        ids = torch.tensor([[*one.prompt, *one.completion]])
        rows = [
            (net(ids).logits[0] + 0.0)[len(one.prompt) - 1 : -1].softmax(-1)
            for net in (objective.teacher.model, trainer.hf_model)
        ]
        for p, q in zip(*rows, strict=True):
            m = 0.5 * (p + q)
            terms.append(0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum())
    assert loss == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)
    tokens_trained, metrics = objective.finish()
    assert tokens_trained == len(terms)
    assert set(metrics) == {"divergence", "on_policy"}


def test_a_share_of_the_steps_is_on_policy(tmp_path: Path) -> None:
    objective: Any = Trainer(objective_recipe(tmp_path, "distill", GKD | {"lmbda": 0.3}), quiet=True).objective
    share = sum(objective.on_policy(step) for step in range(2000)) / 2000
    assert share == pytest.approx(0.3, abs=0.04)
    again: Any = Trainer(
        objective_recipe(tmp_path, "distill", GKD | {"lmbda": 0.3}, run_name="again"), quiet=True
    ).objective
    assert [objective.on_policy(step) for step in range(50)] == [again.on_policy(step) for step in range(50)]


@pytest.mark.sweep
def test_the_teacher_samples_for_seq_kd(tmp_path: Path) -> None:
    recipe = objective_recipe(tmp_path, "distill", GKD | {"lmbda": 0.5, "seq_kd": True}, train={"max_steps": 6})
    trainer = Trainer(recipe, quiet=True)
    objective: Any = trainer.objective
    step = next(step for step in range(50) if not objective.on_policy(step))
    first = [one.completion for one in objective.step_targets(step)]
    engine = objective._teacher_rollout.engine
    assert engine.backend.model is objective.teacher.model
    problems, prompts = objective.prompts.stream().take(4), []
    prompts = [objective.prompts.token_ids(one) for one in problems]
    alone = objective._teacher_rollout.generate(prompts, objective.seeds(step, 4), 1)
    assert [one.token_ids for (one,) in alone] == first
    trainer.fit()
    lines = metrics_of(tmp_path, "distill")
    assert {line["on_policy"] for line in lines} == {0.0, 1.0}


def test_seq_kd_needs_steps_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=r"objective\.lmbda must be < 1 with objective\.seq_kd, got 1\.0"):
        objective_recipe(tmp_path, "distill", GKD | {"seq_kd": True})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "a"}, "must be a JSON object with 'prompt' and 'completion', or 'messages'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "must have a last message of role 'assistant'"),
    ],
)
def test_lines_must_have_a_completion(line: dict[str, Any], said: str, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(line) + "\n" for _ in range(30)))
    given = GKD | {"task": None, "data_files": str(lines), "lmbda": 0.5}
    given["teacher"] = {"name_or_path": "nowhere"}
    with pytest.raises(ToolkitError, match=said):
        Trainer(objective_recipe(tmp_path, "distill", given), quiet=True)
