"""What is minimised, by the names of TRL's configurations: sizes of a step, data of it, the loss."""

from typing import Any

from toolkit.config.translation.base import Translation

TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
"""Reward functions that TRL's command knows without a module."""
NOT_HELD_OUT = 1e-9
"""Share of the lines that is held out where the other program holds out none; a recipe's must be above 0."""


def sizes(t: Translation, max_length: int) -> None:
    """``max_length`` and how much a step takes, from sequences per device and forwards per step."""
    batch, forwards = int(t.take("per_device_train_batch_size", 8)), int(t.take("gradient_accumulation_steps", 1))
    longest = int(t.take("max_length", max_length))
    t.put("train.max_length", longest)
    t.put("train.batch_tokens", batch * longest)
    if t.kind in ("sft", "pretrain"):
        t.put("train.gradient_accumulation_steps", forwards)
        t.unneeded("per_device_train_batch_size", f"train.batch_tokens is {batch} of {longest} tokens, always full")
        return
    counted = {"kto": "lines", "prm": "lines"}.get(t.kind, "pairs")
    t.put(f"objective.{counted}", batch * forwards)
    t.unneeded("per_device_train_batch_size", f"objective.{counted} is {batch} x {forwards}, over all processes")


def rollouts(t: Translation) -> None:
    """GRPO and its relatives, whose sequences are completions."""
    batch, forwards = int(t.take("per_device_train_batch_size", 8)), int(t.take("gradient_accumulation_steps", 1))
    several = int(t.take("num_generations", 2 if t.kind == "rloo" else 8))
    completion = int(t.take("max_completion_length", 512))
    prompt = int(t.take("max_prompt_length", 512))
    longest = int(t.take("vllm_max_model_length", prompt + completion))
    t.put("objective.num_generations", several)
    t.put("objective.prompts", max(1, batch * forwards // several))
    t.unneeded("per_device_train_batch_size", f"objective.prompts is {batch} x {forwards} / {several}")
    t.put("objective.rollout.max_completion_length", completion)
    t.put("train.max_length", longest)
    t.put("train.batch_tokens", max(2048, longest * batch // 2))
    if t.get("max_prompt_length") is None and t.get("vllm_max_model_length") is None:
        t.unneeded("max_completion_length", f"train.max_length is {longest}, which leaves {prompt} tokens for prompts")
    if t.kind in ("grpo", "reinforce_plus_plus"):
        t.put("objective.loss_type", t.take("loss_type", "dapo"), "loss_type")
    if t.kind == "grpo":
        scale = t.take("scale_rewards", "group")
        scale = {True: "group", False: "none", "True": "group", "False": "none"}.get(scale, scale)
        t.put("objective.scale_rewards", scale, "scale_rewards")
        if t.get("beta"):
            t.put("objective.use_bias_correction_kl", bool(t.take("use_bias_correction_kl", True)))
    for name in (
        "num_iterations", "epsilon", "epsilon_high", "beta", "importance_sampling_level", "mask_truncated_completions",
        "multi_objective_aggregation",
    ):  # fmt: skip
        t.move(name, f"objective.{name}")
    _generation(t)
    _tools(t)
    function = t.take("rollout_func")
    if isinstance(function, str):
        t.put("objective.rollout_func", _importable(function), "rollout_func")
    _sampling(t, "temperature")
    _rewards(t)


def _sampling(t: Translation, *kept: str) -> None:
    """Settings of sampling that a recipe does not have; ``kept`` are those that it has."""
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}[name]
        if name not in kept and t.take(name, neutral) != neutral:
            t.lose(name, "rollouts sample from the distribution that is trained")


def self_distillation(t: Translation) -> None:
    """TRL's ``SDFTConfig``."""
    batch, forwards = int(t.take("per_device_train_batch_size", 8)), int(t.take("gradient_accumulation_steps", 1))
    several = int(t.take("num_generations", 8))
    completion, prompt = int(t.take("max_completion_length", 256)), int(t.take("max_prompt_length", 512))
    t.put("objective.num_generations", several)
    t.put("objective.prompts", max(1, batch * forwards // several))
    t.unneeded("per_device_train_batch_size", f"objective.prompts is {batch} x {forwards} / {several}")
    t.put("objective.rollout.max_completion_length", completion)
    t.put("objective.rollout.temperature", float(t.take("temperature", 1.0)))
    t.put("train.max_length", prompt + completion)
    t.put("train.batch_tokens", max(2048, (prompt + completion) * batch // 2))
    kind = t.take("teacher_model_kind", "base")
    t.put("objective.teacher_model_kind", kind)
    rate = float(t.take("teacher_update_rate", 0.05))
    if kind == "ema":
        t.put("train.ema_decay", 1.0 - rate)
        if int(t.take("teacher_sync_steps", 1)) != 1:
            t.lose("teacher_sync_steps", "the teacher follows after every step")
    else:
        for name in ("teacher_update_rate", "teacher_sync_steps"):
            t.unneeded(name, f"the teacher is {kind}")
    for name in (
        "distillation_mode", "distillation_alpha", "distillation_topk", "distillation_add_tail",
        "num_loss_tokens_to_skip", "generate_from_teacher", "teacher_prompt_template",
    ):  # fmt: skip
        t.move(name, f"objective.{name}")
    t.unneeded("distillation_is_clip", "completions are of the weights that are trained, whose ratio is 1")
    if int(t.take("num_iterations", 1)) != 1:
        t.lose("num_iterations", "a batch of completions is trained on once")
    _generation(t)
    _sampling(t, "temperature")


def distillation(t: Translation) -> None:
    """TRL's ``GKDConfig``, or its ``DistillationConfig``, whose completions are all the student's."""
    batch, forwards = int(t.take("per_device_train_batch_size", 8)), int(t.take("gradient_accumulation_steps", 1))
    gkd = any(t.get(name) is not None for name in ("lmbda", "seq_kd", "max_new_tokens"))
    completion = int(t.take("max_new_tokens", t.take("max_completion_length", 128 if gkd else 512)))
    longest = int(t.take("max_length", 1024))
    t.put("objective.prompts", batch * forwards)
    t.unneeded("per_device_train_batch_size", f"objective.prompts is {batch} x {forwards}, over all processes")
    t.put("objective.teacher.name_or_path", t.take("teacher_model_name_or_path"))
    t.put("objective.beta", float(t.take("beta", 0.5 if gkd else 1.0)))
    t.put("objective.teacher_top_k", None)
    t.put("objective.rollout.temperature", float(t.take("temperature", 0.9 if gkd else 1.0)))
    t.put("objective.rollout.max_completion_length", min(completion, longest - 1))
    t.put("train.max_length", longest)
    t.put("train.batch_tokens", max(2048, longest * batch // 2))
    t.put("objective.lmbda", float(t.take("lmbda", 0.5 if gkd else 1.0)))
    if t.take("seq_kd", False) and float(t.get("lmbda", 0.5)) < 1.0:
        t.put("objective.seq_kd", True)
    elif not gkd and t.values["objective"]["rollout"]["temperature"] != 1.0:
        t.lose("temperature", "it is of sampling alone, the distributions are compared as they are")


def _tools(t: Translation) -> None:
    """Tools and environments; TRL counts the turns after the first."""
    calls = t.take("max_tool_calling_iterations")
    given = t.take("tools")
    if given:
        names = [given] if isinstance(given, str) else given
        t.put("objective.tools", [_importable(name) for name in names], "tools")
    factory = t.take("environment_factory")
    if isinstance(factory, str):
        t.put("objective.environment_factory", _importable(factory), "environment_factory")
    if calls is not None and (given or factory):
        t.put("objective.max_turns", int(calls) + 1, "max_tool_calling_iterations")


def _generation(t: Translation) -> None:
    """``generation_kwargs``, of which a recipe has the stop strings."""
    given = t.take("generation_kwargs") or {}
    stop = [given[name] for name in ("stop_strings", "stop") if isinstance(given, dict) and given.get(name)]
    if stop:
        t.put("objective.rollout.stop", [stop[0]] if isinstance(stop[0], str) else list(stop[0]), "generation_kwargs")
    others = [name for name in given if name not in ("stop_strings", "stop")]
    if others:
        t.lose(
            "generation_kwargs", f"rollouts sample from the distribution that is trained, without {', '.join(others)}"
        )


def _rewards(t: Translation) -> None:
    functions, model = t.take("reward_funcs"), t.take("reward_model_name_or_path")
    if t.has("objective.reward_funcs") and (functions or model):
        names = [functions] if isinstance(functions, str) else list(functions or ())
        names += [model] if model else []
        t.put("objective.reward_funcs", [_importable(name) for name in names])
        t.move("reward_weights", "objective.reward_weights")
        return
    t.put("objective.task", {"name": "rewards:Rewards"})
    t.lose("reward_funcs", "write a class derived from toolkit.training.tasks.Task and name it in objective.task")


def _importable(name: str) -> str:
    """``package.module.function`` as ``package.module:function``; a reward model stays as it is."""
    if name in TRL_REWARDS:
        return f"trl.rewards:{name}"
    if "/" in name:  # a reward model
        return name
    module, dot, function = name.rpartition(".")
    return f"{module}:{function}" if dot and ":" not in name else name


def losses(t: Translation) -> None:
    """The loss of offline objectives."""
    given = t.take("loss_type")
    if t.kind == "dpo" and isinstance(given, list):
        _several_losses(t, given)
    elif given not in (None, "nll", "chunked_nll"):
        t.put("objective.loss_type", given, "loss_type")
    if t.kind == "dpo":
        t.move("rpo_alpha", "objective.sft_weight")
        divergence = t.take("f_divergence_type")
        if divergence is not None:
            t.put("objective.f_divergence_type", str(divergence), "f_divergence_type")
    for name in (
        "beta", "label_smoothing", "discopop_tau", "f_alpha_divergence_coef", "ld_alpha", "cpo_alpha", "simpo_gamma",
        "desirable_weight", "undesirable_weight", "label_smoothing_factor", "step_separator", "train_on_last_step_only",
    ):  # fmt: skip
        if t.has(f"objective.{name}"):
            t.move(name, f"objective.{name}")
    if t.kind == "prm":
        t.put("objective.max_prompt_length", int(t.take("max_prompt_length", 512)))
        if t.take("max_completion_length") is not None:
            t.lose("max_completion_length", "train.max_length bounds a sequence, which is cut at its end")
    if t.kind == "cpo" and t.get("alpha") is not None:
        t.put("objective.alpha", float(t.take("alpha")), "alpha")


def _several_losses(t: Translation, given: list[Any]) -> None:
    """A list of losses of DPO with weights; ``sft`` is a separate field."""
    weights = dict(zip(given, t.take("loss_weights") or [1.0] * len(given)))
    if "sft" in weights:
        t.put("objective.sft_weight", float(weights.pop("sft")), "loss_type")
    if not weights:
        t.lose("loss_type", "a recipe of kind dpo has a loss of a pair; kind sft is the cross-entropy alone", given)
        return
    names = list(weights)
    t.put("objective.loss_type", names[0] if len(names) == 1 else names, "loss_type")
    if list(weights.values()) != [1.0] * len(names):
        t.put("objective.loss_weights", [float(weights[name]) for name in names], "loss_weights")


def held_out(t: Translation, datasets: list[dict[str, Any]] | None, share: float) -> None:
    """What is evaluated on: datasets, a share of the lines, or nothing."""
    if datasets:
        t.put("objective.eval_datasets", datasets)
    elif t.has("objective.evaluation.val_set_size"):
        t.put("objective.evaluation.val_set_size", share or NOT_HELD_OUT)
    t.put("evaluate.do_eval", bool(datasets or share))
