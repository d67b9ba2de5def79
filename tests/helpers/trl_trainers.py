"""TRL's trainers on what a recipe's run was trained on: the same start, the same data in the same order."""

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from toolkit.quantised import dense_state
from toolkit.training.loop import Trainer
from toolkit.training.reward_functions import load_reward_functions


def write_start(trainer: Trainer, folder: Path) -> None:
    """The model before the first step as an ordinary checkpoint, quantised weights dense; adapters beside it."""
    model, adapters = trainer.hf_model, trainer.recipe.model.lora is not None
    state = {name: tensor.detach().clone() for name, tensor in dense_state(model).items()}
    if adapters:
        folder.mkdir()
        save_file(peft.get_peft_model_state_dict(model), str(folder / "adapters.safetensors"))
        state = {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if "lora_" not in name}
        plain = AutoModelForCausalLM.from_config(model.config)
        plain.load_state_dict(state)
        plain.save_pretrained(str(folder))
    else:
        model.save_pretrained(str(folder), state_dict=state)
    trainer.tokenizer.save_pretrained(str(folder))


def trained_losses(trainer: Any) -> list[float]:
    """Train with TRL's trainer; the loss of every micro-batch, unrounded."""
    found: list[float] = []
    training_step = trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = training_step(*args, **kwargs)
        found.append(float(loss))
        return loss

    trainer.training_step = recorded
    trainer.train()
    return found


def losses(name: str) -> list[float]:
    """The loss of every optimizer step of TRL's trainer, unrounded."""
    from tests.helpers.recipe_runs import recipe_of

    recipe, given = recipe_of(name), json.loads(Path(f"{name}-whole.json").read_text())
    objective: Any = recipe.objective
    kind = objective.kind
    found = trained_losses(_TRAINERS[kind](recipe, objective, given, AutoTokenizer.from_pretrained("start")))
    each = recipe.train.gradient_accumulation_steps
    return [sum(found[at : at + each]) for at in range(0, len(found), each)]


def _common(recipe: Any, batch: int) -> dict[str, Any]:
    """The recipe's settings as ``TrainingArguments``."""
    optimizer, schedule, train = recipe.optimizer, recipe.schedule, recipe.train
    return {
        "output_dir": "trl",
        "max_steps": train.max_steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "learning_rate": optimizer.learning_rate,
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "adam_epsilon": optimizer.adam_epsilon,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler_type": schedule.lr_scheduler_type,
        "warmup_steps": schedule.num_warmup_steps(train.max_steps),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def _lines(given: Any, objective: Any) -> Dataset:
    columns = (objective.datasets[0].columns or {}) if objective.datasets else {}
    names = {column: field for field, column in columns.items()}
    return Dataset.from_list([{names.get(key, key): value for key, value in line.items()} for line in given["order"]])


def _causal() -> Any:
    return AutoModelForCausalLM.from_pretrained("start", dtype=torch.float32)


def _sft(recipe: Any, objective: Any, given: Any, tokenizer: Any) -> Any:
    lines = _lines(given, objective)
    if "instruction" in lines.column_names:
        lines = lines.map(_alpaca, remove_columns=lines.column_names)
    streamed = objective.datasets[0].streaming
    lora = recipe.model.lora
    config = None
    if lora is not None:
        config = peft.LoraConfig(
            r=lora.r, lora_alpha=lora.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    arguments = SFTConfig(
        **_common(recipe, recipe.train.per_device_train_batch_size),
        max_length=recipe.train.max_length,
        assistant_only_loss="messages" in lines.column_names,
        completion_only_loss=True if "prompt" in lines.column_names else None,
    )
    trainer = SFTTrainer(
        model=_causal(),
        args=arguments,
        train_dataset=lines.to_iterable_dataset() if streamed else lines,
        processing_class=tokenizer,
        peft_config=config,
    )
    if config is not None:
        adapters = load_file("start/adapters.safetensors")
        named = {f"base_model.model.{name}": tensor for name, tensor in adapters.items()}
        assert not peft.set_peft_model_state_dict(trainer.model, named).unexpected_keys
    return trainer


def _alpaca(line: dict[str, Any]) -> dict[str, Any]:
    """As ``toolkit.training.formats`` reads Alpaca's columns."""
    return {
        "prompt": [{"role": "user", "content": f"{line['instruction']}\n\n{line['input']}"}],
        "completion": [{"role": "assistant", "content": line["output"]}],
    }


def _dpo(recipe: Any, objective: Any, given: Any, tokenizer: Any) -> Any:
    arguments = DPOConfig(**_common(recipe, objective.pairs), beta=objective.beta, max_length=recipe.train.max_length)
    return DPOTrainer(
        model=_causal(), ref_model=_causal(), args=arguments, train_dataset=_lines(given, objective),
        processing_class=tokenizer,
    )  # fmt: skip


def _kto(recipe: Any, objective: Any, given: Any, tokenizer: Any) -> Any:
    arguments = KTOConfig(
        **_common(recipe, objective.lines),
        beta=objective.beta,
        desirable_weight=objective.desirable_weight,
        undesirable_weight=objective.undesirable_weight,
        max_length=recipe.train.max_length,
    )
    return KTOTrainer(
        model=_causal(), ref_model=_causal(), args=arguments, train_dataset=_lines(given, objective),
        processing_class=tokenizer,
    )  # fmt: skip


def _orpo(recipe: Any, objective: Any, given: Any, tokenizer: Any) -> Any:
    arguments = ORPOConfig(**_common(recipe, objective.pairs), beta=objective.beta, max_length=recipe.train.max_length)
    return ORPOTrainer(
        model=_causal(), args=arguments, train_dataset=_lines(given, objective), processing_class=tokenizer
    )


def _reward(recipe: Any, objective: Any, given: Any, tokenizer: Any) -> Any:
    arguments = RewardConfig(
        **_common(recipe, objective.pairs),
        center_rewards_coefficient=objective.center_rewards_coefficient,
        max_length=recipe.train.max_length,
    )
    model = AutoModelForSequenceClassification.from_pretrained("start", dtype=torch.float32)
    return RewardTrainer(
        model=model, args=arguments, train_dataset=_lines(given, objective), processing_class=tokenizer
    )


def _of_groups(recipe: Any, objective: Any) -> dict[str, Any]:
    """What trainers of groups of completions share."""
    return {
        **_common(recipe, objective.prompts * objective.num_generations),
        "num_generations": objective.num_generations,
        "max_completion_length": objective.rollout.max_completion_length,
        "epsilon": objective.epsilon,
        "beta": objective.beta,
        "reward_weights": objective.reward_weights,
        "shuffle_dataset": False,
    }


def _grpo(recipe: Any, objective: Any, given: Any, tokenizer: Any) -> Any:
    """Its rollouts are those that the recipe's run has recorded, its rewards by the same functions."""
    steps = iter(given["completions"])

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        groups = next(steps)
        assert len(prompts) == sum(len(completions) for _, completions in groups)
        pairs = [(prompt, one) for prompt, completions in groups for one in completions]
        return {
            "prompt_ids": [prompt for prompt, _ in pairs],
            "completion_ids": [one for _, one in pairs],
            "logprobs": [[0.0] * len(one) for _, one in pairs],  # not read: importance sampling is off
        }

    arguments = GRPOConfig(
        **_of_groups(recipe, objective),
        loss_type=objective.loss_type,
        scale_rewards=objective.scale_rewards,
        epsilon_high=objective.epsilon_high,
        temperature=objective.rollout.temperature,
        **{
            name: getattr(objective, name)
            for name in (
                "use_bias_correction_kl", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy",
                "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target", "sync_ref_model",
                "ref_model_mixup_alpha", "ref_model_sync_steps",
            )
        },
    )  # fmt: skip
    return GRPOTrainer(
        model=_causal(),
        args=arguments,
        train_dataset=Dataset.from_list(given["prompts"]),
        processing_class=tokenizer,
        reward_funcs=load_reward_functions(objective.reward_funcs),
        rollout_func=rollout,
    )


def _rloo(recipe: Any, objective: Any, given: Any, tokenizer: Any) -> Any:
    """As ``_grpo``."""
    steps = iter(given["completions"])
    arguments = RLOOConfig(**_of_groups(recipe, objective), normalize_advantages=objective.normalize_advantages)
    trainer = RLOOTrainer(
        model="start", args=arguments, train_dataset=Dataset.from_list(given["prompts"]), processing_class=tokenizer,
        reward_funcs=load_reward_functions(objective.reward_funcs),
    )  # fmt: skip

    def generated(prompt_ids: list[list[int]], *_: Any) -> list[list[int]]:
        groups = next(steps)
        assert prompt_ids == [prompt for prompt, completions in groups for _ in completions]
        return [one for _, completions in groups for one in completions]

    trainer._generate_single_turn = generated
    return trainer


def _distill(recipe: Any, objective: Any, given: Any, tokenizer: Any) -> Any:
    """TRL's GKD. Where the student samples, its completions are those that the recipe's run has recorded."""
    arguments = GKDConfig(
        **_common(recipe, objective.prompts),
        lmbda=objective.lmbda,
        beta=objective.beta,
        temperature=objective.rollout.temperature,
        max_new_tokens=objective.rollout.max_completion_length,
        max_length=recipe.train.max_length,
    )
    teacher = AutoModelForCausalLM.from_pretrained(objective.teacher.name_or_path, dtype=torch.float32)
    trainer = GKDTrainer(
        model=_causal(), teacher_model=teacher, args=arguments, train_dataset=Dataset.from_list(given["prompts"]),
        processing_class=tokenizer,
    )  # fmt: skip
    # It would divide by the number of the data's tokens, where others are sampled, too.
    trainer.model_accepts_loss_kwargs = False
    steps, training_step = iter(given["targets"]), trainer.training_step
    current: list[Any] = []

    def step(*args: Any, **kwargs: Any) -> Any:
        on_policy, current[:] = next(steps)
        trainer.lmbda = 1.0 if on_policy else -1.0
        return training_step(*args, **kwargs)

    def sampled(*_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        longest = [max(len(part) for part in parts) for parts in zip(*current)]
        ids = torch.full((len(current), sum(longest)), tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (prompt, completion) in enumerate(current):
            begin, end = longest[0] - len(prompt), longest[0] + len(completion)
            ids[row, begin:end] = torch.tensor(prompt + completion)
            mask[row, begin:end] = 1
            labels[row, longest[0] : end] = torch.tensor(completion)
        return ids, mask, labels

    trainer.training_step = step
    trainer.generate_on_policy_outputs = sampled
    return trainer


def _sdft(recipe: Any, objective: Any, given: Any, tokenizer: Any) -> Any:
    """Completions are those that the recipe's run has recorded."""
    steps = iter(given["targets"])
    arguments = SDFTConfig(
        **_common(recipe, objective.prompts * objective.num_generations),
        num_generations=objective.num_generations,
        max_completion_length=objective.rollout.max_completion_length,
        shuffle_dataset=False,
        **{
            name: getattr(objective, name)
            for name in (
                "distillation_mode", "distillation_alpha", "distillation_topk", "distillation_add_tail",
                "num_loss_tokens_to_skip", "teacher_model_kind", "teacher_prompt_template", "generate_from_teacher",
            )
        },
    )  # fmt: skip
    trainer = SDFTTrainer(
        model=_causal(), args=arguments, train_dataset=Dataset.from_list(given["prompts"]), processing_class=tokenizer
    )

    def generated(prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        _, targets = next(steps)
        assert prompt_ids == [prompt for prompt, _ in targets]
        return prompt_ids, [completion for _, completion in targets]

    trainer._generate = generated
    return trainer


def _prm(recipe: Any, objective: Any, given: Any, tokenizer: Any) -> Any:
    """TRL has no trainer of it any more: transformers' own, on lines tokenised as that one did.

    Prompt and steps are tokenised one by one, the separator behind each step, whose last token has the label.
    """
    lines = []
    for line in given["order"]:
        ids = tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]
        labels = [-100] * len(ids)
        for text, label in zip(line["completions"], line["labels"]):
            step = tokenizer(text, add_special_tokens=False)["input_ids"]
            step += tokenizer(objective.step_separator, add_special_tokens=False)["input_ids"]
            ids, labels = ids + step, labels + [-100] * (len(step) - 1) + [int(label)]
        lines.append({"input_ids": ids, "labels": labels})
    model = AutoModelForTokenClassification.from_pretrained("start", dtype=torch.float32)
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**_common(recipe, objective.lines)),
        train_dataset=Dataset.from_list(lines),
        data_collator=transformers.DataCollatorForTokenClassification(tokenizer),
    )


_TRAINERS = {
    "sft": _sft, "dpo": _dpo, "kto": _kto, "orpo": _orpo, "reward": _reward, "grpo": _grpo, "rloo": _rloo,
    "distill": _distill, "sdft": _sdft, "prm": _prm,
}  # fmt: skip
