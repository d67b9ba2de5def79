"""Rollouts by actors of Ray beside those of one engine: ``python ray_rollouts.py CASE``; the last line is JSON."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
import torch

import toolkit
from infer_patches.ray import RayEngine
from toolkit.errors import ToolkitError
from toolkit.patching import weight_version
from toolkit.testing.models import random_model, tiny_tokenizer

PROMPTS = [[7 + 3 * at, *range(5, 9 + at % 5)] for at in range(9)]
SAMPLED = toolkit.SamplingParams(n=3, max_tokens=12, temperature=1.0)
ENGINE: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 6, "seed": 5}


def facts(completions: list[Any]) -> list[Any]:
    """All of completions that must be equal bit for bit; JSON writes floats exactly."""
    return [
        [one.prompt_index, one.index, one.token_ids, one.logprobs, one.sampling_logprobs, one.weight_versions, one.text]
        for one in completions
    ]


def step(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


def error_of(call: Any) -> str:
    try:
        call()
    except ToolkitError as error:
        return str(error)
    return ""


def samples(family: str, **workers: Any) -> Any:
    """Before and after a step, then with an actor that is killed."""
    model, tokenizer = random_model(family, vocabulary=331), tiny_tokenizer()
    toolkit.patch(model)
    more = {"enable_return_routed_experts": True} if family == "mixtral" else {}
    found: list[list[Any]] = [[], []]
    with (
        RayEngine(model, tokenizer, num_workers=2, **workers, **ENGINE, **more) as actors,
        toolkit.Engine(model, tokenizer, **ENGINE, **more) as engine,
    ):
        for prompts, params in ((PROMPTS, SAMPLED), (["a model", "two"], toolkit.SamplingParams(seed=3))):
            both = [one.generate(prompts, params) for one in (actors, engine)]
            for ours, completions in zip(found, both):
                ours.append(facts(completions))
            if more:
                assert all(torch.equal(one.routed_experts, other.routed_experts) for one, other in zip(*both))
            step(model)
        victim = ray.get(actors._workers[1].pid.remote())
        finished = []
        for at, delta in enumerate(actors.stream(PROMPTS, SAMPLED)):
            if at == 0:
                os.kill(victim, signal.SIGKILL)
            finished.append(delta.finished)
        found[0].append(facts(sorted(finished, key=lambda one: (one.prompt_index, one.index))))
        found[1].append(facts(engine.generate(PROMPTS, SAMPLED)))
        stats, now = actors.stats(), weight_version(model)
    left = [str(path) for path in Path("weights").glob("*")]
    return {"ray": found[0], "engine": found[1], "stats": stats, "version": now, "left": left}


def failures() -> Any:
    """What is refused, and what ends a rollout."""
    model = random_model("llama")
    toolkit.patch(model)
    found = {}
    with RayEngine(model, num_workers=1, max_restarts=0, **ENGINE) as actors:
        found["prompt"] = error_of(lambda: actors.generate([list(range(5, 80))], SAMPLED))
        with toolkit.Engine(model, **ENGINE) as engine:
            found["prompt, engine"] = error_of(lambda: engine.generate([list(range(5, 80))], SAMPLED))
        os.kill(ray.get(actors._workers[0].pid.remote()), signal.SIGKILL)
        found["ended"] = error_of(lambda: actors.generate(PROMPTS, SAMPLED))
    found["closed"] = error_of(lambda: actors.generate(PROMPTS, SAMPLED))
    found["argument"] = error_of(lambda: RayEngine(model, num_workers=1, max_sequences=3))
    found["resources"] = error_of(lambda: RayEngine(model, num_workers=1, num_cpus=512, start_timeout=2))
    return found


def trl() -> Any:
    """GRPO by TRL: rewards by our engine in this process, and by actors in both ways."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from train_patches.trl import engine_rollout

    def trainer(**arguments: Any) -> Any:
        return GRPOTrainer(
            model=random_model("llama", vocabulary=331),
            args=GRPOConfig(
                output_dir="grpo", max_steps=3, per_device_train_batch_size=8, num_generations=4, learning_rate=1e-2,
                max_completion_length=8, top_k=0, logging_steps=1, report_to=[], use_cpu=True, bf16=False, seed=5,
            ),
            processing_class=tiny_tokenizer(),
            train_dataset=Dataset.from_list([{"prompt": text} for text in ("a model", "two rows", "of", "the engine")]),
            reward_funcs=lambda completion_ids, **_: [sum(t % 2 for t in ids) / len(ids) for ids in completion_ids],
            **arguments,
        )  # fmt: skip

    found: dict[str, Any] = {}
    own = trainer()
    with engine_rollout(own, max_model_len=64):
        own.train()
    by_actors = trainer()
    with engine_rollout(by_actors, engine=RayEngine, num_workers=2, max_model_len=64) as actors:
        by_actors.train()
    found["versions"] = actors.stats()["weight_version"]
    pairs = zip(own.model.parameters(), by_actors.model.parameters(), strict=True)
    found["same weights"] = all(torch.equal(one, other) for one, other in pairs)
    found["bits"] = [entry["mismatch/bits"] for entry in by_actors.state.log_history if "mismatch/bits" in entry]

    model: list[Any] = []  # the engine needs the trainer's model, and the trainer the function
    by_function = trainer(rollout_func=lambda prompts, trainer: model[0].rollout_func(prompts, trainer))
    toolkit.patch(by_function.model)
    with RayEngine(by_function.model, num_workers=2, max_model_len=64, seed=5) as actors:
        model.append(actors)
        by_function.train()
    rewards = [[entry["reward"] for entry in one.state.log_history if "reward" in entry] for one in (own, by_function)]
    found["rewards"] = rewards
    return found


def recipe() -> Any:
    """A run of ``toolkit train`` in this process, and with actors."""
    from tests.helpers.objective_recipes import LOWER, objective_recipe, weights
    from toolkit.training.loop import Trainer

    found = []
    for name, elsewhere in (("here", None), ("ray", {"name": "infer_patches.ray:RayEngine", "num_workers": 2})):
        rollout = {"max_completion_length": 8, "max_num_seqs": 16, "engine": elsewhere}
        objective = {"task": LOWER, "prompts": 4, "num_generations": 4, "rollout": rollout}
        trainer = Trainer(objective_recipe(Path(name), "grpo", objective), quiet=True)
        trainer.fit()
        found.append(weights(trainer))
    return {"same weights": all(torch.equal(one, found[1][name]) for name, one in found[0].items())}


def functions() -> Any:
    """``rollout_func`` by TRL's trainer and by a recipe, which resumes."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from infer_patches.ray import rollout_func
    from tests.helpers.objective_recipes import LOWER, objective_recipe, resumed, weights
    from toolkit.training.loop import Trainer
    from toolkit.training.metrics import read_metrics

    objective = {"task": LOWER, "prompts": 2, "num_generations": 4, "rollout_func": "infer_patches.ray:rollout_func"}
    recipe = objective_recipe(Path("recipe"), "grpo", objective)
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    lines = read_metrics(whole.folder / "metrics.jsonl")
    again = weights(resumed(recipe.model_copy(update={"run_name": "again"})))
    found: dict[str, Any] = {
        "mismatch": [line["mismatch_kl"] for line in lines],
        "resumed": all(torch.equal(one, again[name]) for name, one in weights(whole).items()),
    }
    trainer = GRPOTrainer(
        model=random_model("llama", vocabulary=331),
        args=GRPOConfig(
            output_dir="grpo", max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=8,
            top_k=0, logging_steps=1, report_to=[], use_cpu=True, bf16=False, seed=5,
        ),
        processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": text} for text in ("a model", "two rows", "of", "the engine")]),
        reward_funcs=lambda completion_ids, **_: [sum(t % 2 for t in ids) / len(ids) for ids in completion_ids],
        rollout_func=rollout_func,
    )  # fmt: skip
    toolkit.patch(trainer.model)
    trainer.train()
    found["steps"] = trainer.state.global_step
    return found


CASES = {
    "object store": lambda: samples("llama"),
    "folder": lambda: samples("llama", weight_folder="weights"),
    "experts": lambda: samples("mixtral"),
    "failures": failures,
    "trl": trl,
    "recipe": recipe,
    "functions": functions,
}

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]]()))
