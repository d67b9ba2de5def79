"""Settings of TRL and Axolotl as recipes: values by hand, nothing dropped silently, all of it valid."""

from typing import Any

import pytest

from toolkit.config import validate
from toolkit.config.translation import Translation, translate
from toolkit.errors import ToolkitError

TRL = {"model_name_or_path": "org/name", "dataset_name": "data/lines.jsonl", "output_dir": "out/first"}
AXOLOTL = {"base_model": "org/name", "datasets": [{"path": "org/lines", "type": "alpaca"}], "output_dir": "./out/first"}


def made(settings: dict[str, Any], kind: str | None = None) -> tuple[dict[str, Any], Translation]:
    """The resolved recipe as plain values, and the translation; every key is in either the recipe or the notes."""
    found = translate(settings, kind)
    assert not list(found.left())
    return validate(found.values).model_dump(), found


def lost(found: Translation) -> set[str]:
    return {note.key for note in found.notes if note.lost}


def test_sft_of_trl_with_its_defaults():
    recipe, found = made({**TRL, "bf16": True, "max_length": 256, "gradient_accumulation_steps": 2, "packing": True})
    assert (recipe["run_name"], recipe["output_dir"], recipe["seed"]) == ("first", "out", 42)
    objective, train, optimizer = recipe["objective"], recipe["train"], recipe["optimizer"]
    assert objective["kind"] == "sft"
    assert [(one["path"], one["split"]) for one in objective["datasets"]] == [("data/lines.jsonl", "train")]
    assert not objective["assistant_only_loss"]
    assert (train["batch_tokens"], train["max_length"], train["gradient_accumulation_steps"]) == (2048, 256, 2)
    assert (train["num_train_epochs"], train["mixed_precision"]) == (3.0, "bf16")
    assert (optimizer["learning_rate"], optimizer["weight_decay"], optimizer["adam_beta2"]) == (2e-5, 0.0, 0.999)
    assert recipe["schedule"]["lr_scheduler_type"] == "linear"
    assert recipe["model"]["lora"] is None
    assert not recipe["evaluate"]["do_eval"]
    assert lost(found) == set()
    assert {note.key for note in found.notes} == {"packing"}


def test_rewards_stops_and_tools_of_trl():
    recipe, found = made(
        {
            **TRL, "reward_funcs": ["judges.is_right"], "reward_model_name_or_path": "org/judge-1.5b",
            "reward_weights": [1.0, 0.5], "multi_objective_aggregation": "normalize_then_sum", "num_generations": 4,
            "generation_kwargs": {"stop_strings": "</a>", "top_k": 5}, "tools": ["games.add"], "max_steps": 5,
            "environment_factory": "games.Counter", "max_tool_calling_iterations": 2,
        }
    )  # fmt: skip
    objective = recipe["objective"]
    assert objective["reward_funcs"] == ["judges:is_right", "org/judge-1.5b"]
    assert objective["multi_objective_aggregation"] == "normalize_then_sum"
    assert (objective["rollout"]["stop"], objective["max_turns"]) == (["</a>"], 3)
    assert (objective["tools"], objective["environment_factory"]) == (["games:add"], "games:Counter")
    assert lost(found) == {"generation_kwargs"}


def test_preferences_of_trl():
    recipe, found = made(
        {
            **TRL, "beta": 0.2, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "eval_strategy": "steps",
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "use_peft": True, "lora_r": 4,
            "lora_target_modules": "all-linear", "warmup_steps": 0.1, "max_steps": 50, "max_grad_norm": 0,
            "lr_scheduler_type": "constant", "precompute_ref_log_probs": True, "f_divergence_type": "js_divergence",
        }
    )  # fmt: skip
    objective = recipe["objective"]
    assert (objective["kind"], objective["pairs"], objective["beta"], objective["sft_weight"]) == ("dpo", 12, 0.2, 0.5)
    assert (objective["loss_type"], objective["eval_datasets"][0]["split"]) == ("sigmoid", "test")
    assert recipe["model"]["lora"] | {"r": 4, "lora_alpha": 32.0, "target_modules": None} == recipe["model"]["lora"]
    assert recipe["schedule"]["lr_scheduler_type"] == "constant_with_warmup"
    assert (recipe["schedule"]["warmup_ratio"], recipe["train"]["max_steps"]) == (0.1, 50)
    assert recipe["optimizer"] | {"learning_rate": 1e-6, "max_grad_norm": None} == recipe["optimizer"]
    assert objective["f_divergence_type"] == "js_divergence"
    assert not lost(found)
    assert made({**TRL, "loss_type": "simpo", "simpo_gamma": 1.5, "cpo_alpha": 0.0})[0]["objective"]["kind"] == "cpo"
    assert made({**TRL, "desirable_weight": 1.2})[0]["objective"]["desirable_weight"] == 1.2
    assert made({**TRL, "beta": 0.3}, "orpo")[0]["objective"]["beta"] == 0.3


def test_grpo_of_trl():
    recipe, found = made(
        {
            **TRL, "reward_funcs": ["package.rewards.short"], "num_generations": 4, "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2, "max_completion_length": 64, "use_vllm": True, "vllm_mode": "colocate",
            "scale_rewards": False, "epsilon_high": 0.28, "temperature": 0.7, "max_steps": 5,
        }
    )  # fmt: skip
    objective = recipe["objective"]
    assert (objective["kind"], objective["prompts"], objective["num_generations"]) == ("grpo", 4, 4)
    assert (objective["scale_rewards"], objective["loss_type"], objective["epsilon_high"]) == ("none", "dapo", 0.28)
    assert objective["rollout"]["max_completion_length"] == 64
    assert recipe["train"]["max_length"] == 576
    assert objective["rollout"]["temperature"] == 0.7
    assert not objective["use_bias_correction_kl"]
    diverged = made({**TRL, "reward_funcs": ["a.b"], "beta": 0.1})[0]["objective"]
    assert diverged["use_bias_correction_kl"] is True
    assert "temperature" not in lost(found)
    assert not {"use_vllm", "vllm_mode"} & lost(found)


def test_qlora_of_axolotl():
    recipe, found = made(
        {
            **AXOLOTL, "adapter": "qlora", "load_in_4bit": True, "lora_r": 32, "lora_target_linear": True,
            "val_set_size": 0.05, "sequence_len": 2048, "sample_packing": True, "micro_batch_size": 2, "num_epochs": 2,
            "optimizer": "paged_adamw_8bit", "learning_rate": 2e-4, "bf16": "auto", "flash_attention": True,
            "wandb_project": "mine", "deepspeed": "zero2.json", "evals_per_epoch": 4, "chat_template": "chatml",
            "datasets": [
                {"path": "org/lines", "type": "alpaca", "split": "train[:10%]"},
                {"path": "json", "data_files": "chats.jsonl", "type": "chat_template", "field_messages": "turns",
                 "message_property_mappings": {"role": "who", "content": "said"}, "roles_to_train": ["assistant"]},
            ],
        }
    )  # fmt: skip
    objective = recipe["objective"]
    assert [(one["path"], one["split"]) for one in objective["datasets"]] == [
        ("org/lines", "train[:10%]"), ("chats.jsonl", "train")
    ]  # fmt: skip
    assert objective["datasets"][1]["columns"] == {"messages": "turns"}
    assert (objective["evaluation"]["val_set_size"], recipe["evaluate"]["do_eval"]) == (0.05, True)
    assert recipe["model"]["quantise"]["format"] == "nf4"
    assert recipe["model"]["lora"] | {"r": 32, "lora_alpha": 16.0} == recipe["model"]["lora"]
    assert recipe["train"] | {"batch_tokens": 4096, "num_train_epochs": 2.0} == recipe["train"]
    assert (recipe["optimizer"]["optim"], recipe["schedule"]["lr_scheduler_type"]) == ("adamw_8bit", "cosine")
    assert {"deepspeed", "evals_per_epoch", "chat_template", "datasets.message_property_mappings"} <= lost(found)
    assert not {"sample_packing", "flash_attention", "wandb_project", "lora_target_linear"} & lost(found)


def test_preferences_and_rollouts_of_axolotl():
    recipe, _ = made({**AXOLOTL, "rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.0, "micro_batch_size": 3})
    objective = recipe["objective"]
    assert (objective["kind"], objective["loss_type"], objective["cpo_alpha"]) == ("cpo", "simpo", 0.0)
    assert (objective["beta"], objective["simpo_gamma"], objective["pairs"]) == (2.0, 1.0, 3)
    assert made({**AXOLOTL, "rl": "ipo"})[0]["objective"]["loss_type"] == "ipo"
    trl = {"num_generations": 2, "max_completion_length": 16, "use_vllm": True, "reward_funcs": ["a.b"]}
    recipe, _ = made({**AXOLOTL, "rl": "grpo", "trl": trl, "micro_batch_size": 4, "max_steps": 3})
    assert (recipe["objective"]["prompts"], recipe["objective"]["rollout"]["max_completion_length"]) == (2, 16)


def test_a_key_that_a_recipe_s_field_has_is_that_field_where_it_fits():
    recipe, found = made(
        {**TRL, "router_aux_loss_coef": 0.01, "indexer_loss_coef": -1.0, "z_loss": 1e-4, "save_steps": 7}
    )
    assert recipe["train"]["moe"]["router_aux_loss_coef"] == 0.01
    assert recipe["objective"]["z_loss"] == 1e-4
    assert recipe["checkpoint"]["save_steps"] == 7
    assert lost(found) == {"indexer_loss_coef"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rate": 1.0}, "model_name_or_path (TRL) or base_model (Axolotl)"),
        ({**AXOLOTL, "rl": "ppo"}, "rl must be one of"),
    ],
)
def test_settings_of_neither(settings, said):
    with pytest.raises(ToolkitError) as raised:
        translate(settings)
    assert said in str(raised.value)


def distributed(settings):
    recipe, found = made({"max_steps": 1, **settings})
    return recipe["train"]["distributed"], lost(found)


def test_processes_of_trl_and_axolotl(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3, "overlap_comm": true}, "bf16": {"enabled": "auto"}}')
    plain = {"strategy": "ddp", "cpu_offload": False, "deepspeed": None}
    assert distributed(TRL) == (plain, set())
    for settings in (TRL, AXOLOTL):
        with_file = plain | {"strategy": "zero3", "deepspeed": str(file)}
        assert distributed({**settings, "deepspeed": str(file)}) == (with_file, set())
        by_name = {**settings, "deepspeed": "deepspeed_configs/zero2.json"}
        assert distributed(by_name) == (plain | {"strategy": "zero2"}, {"deepspeed"})
        assert distributed({**settings, "deepspeed": "mine.json"}) == (plain, {"deepspeed"})
    offloaded = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert distributed({**TRL, "deepspeed": offloaded})[0] == plain | {"strategy": "zero2", "cpu_offload": True}
    assert distributed({**TRL, "deepspeed": {"zero_optimization": {"stage": 0}}}) == (plain, {"deepspeed"})
    assert distributed({**TRL, "fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}}) == (
        plain | {"strategy": "fsdp2"}, set()
    )  # fmt: skip
    config = {"offload_params": True, "activation_checkpointing": True, "transformer_layer_cls_to_wrap": "LlamaLayer"}
    recipe, found = made({**AXOLOTL, "max_steps": 1, "fsdp_version": 2, "fsdp_config": config})
    assert recipe["train"]["distributed"] == plain | {"strategy": "fsdp2", "cpu_offload": True}
    assert recipe["train"]["gradient_checkpointing"]
    assert not lost(found)
    for given, strategy in (("zero1", "zero1"), ("fsdp1", "fsdp2"), ("multi_gpu", "ddp"), ("single_gpu", "ddp")):
        assert distributed({**TRL, "accelerate_config": given, "num_processes": 2}) == (
            plain | {"strategy": strategy}, set()
        )  # fmt: skip
    assert distributed({**TRL, "accelerate_config": "mine.yaml"}) == (plain, {"accelerate_config"})


def test_processes_that_a_recipe_does_not_go_with():
    qlora = {"adapter": "qlora", "load_in_4bit": True, "fsdp_version": 2, "fsdp_config": {"offload_params": True}}
    recipe, found = made({**AXOLOTL, **qlora, "max_steps": 1})
    sharing = recipe["train"]["distributed"]
    assert (sharing["strategy"], sharing["cpu_offload"]) == ("fsdp2", True)
    assert not lost(found)
    split = {"adapter": "qlora", "load_in_4bit": True, "tensor_parallel_size": 2, "max_steps": 1}
    (text,) = [note.text for note in made({**AXOLOTL, **split})[1].notes if note.lost]
    assert "model.quantise must be null with train.distributed 'tp'" in text


def test_tensor_parallel_of_axolotl():
    recipe, found = made({**AXOLOTL, "tensor_parallel_size": 2, "max_steps": 1})
    assert recipe["train"]["distributed"]["strategy"] == "tp"
    assert not [note for note in found.notes if note.key == "tensor_parallel_size"]
    recipe, _ = made({**AXOLOTL, "tensor_parallel_size": 1, "max_steps": 1})
    assert recipe["train"]["distributed"]["strategy"] == "ddp"
    dora = {"adapter": "lora", "peft_use_dora": True, "tensor_parallel_size": 2, "max_steps": 1}
    recipe, found = made({**AXOLOTL, **dora})
    assert recipe["train"]["distributed"]["strategy"] == "ddp"
    (text,) = [note.text for note in found.notes if note.lost and note.key == "tensor_parallel_size"]
    assert "model.lora.use_dora must be false with train.distributed 'tp'" in text


def test_other_trainers_of_trl():
    recipe, found = made({**TRL, "center_rewards_coefficient": 0.01, "eval_strategy": "steps", "eval_steps": 5})
    assert (recipe["objective"]["kind"], recipe["optimizer"]["learning_rate"]) == ("reward", 1e-4)
    assert recipe["evaluate"]["eval_steps"] == 5
    recipe, found = made(
        {
            **TRL,
            "reward_funcs": ["accuracy_reward", "a.b.c"],
            "normalize_advantages": True,
            "reward_clip_range": [-1, 1],
        }
    )
    objective = recipe["objective"]
    assert (objective["kind"], objective["num_generations"], objective["normalize_advantages"]) == ("rloo", 2, True)
    assert objective["reward_funcs"] == ["trl.rewards:accuracy_reward", "a.b:c"]
    assert not lost(found)
    recipe, found = made({**TRL, "teacher_model_name_or_path": "t", "lmbda": 0.7, "max_new_tokens": 32, "beta": 0.4})
    objective = recipe["objective"]
    teacher, rollout = objective["teacher"]["name_or_path"], objective["rollout"]
    assert (objective["kind"], teacher, objective["beta"]) == ("distill", "t", 0.4)
    assert (rollout["temperature"], rollout["max_completion_length"]) == (0.9, 32)
    assert (objective["lmbda"], objective["teacher_top_k"]) == (0.7, None)
    assert not lost(found)


def test_distillation_of_trl():
    given = {**TRL, "teacher_model_name_or_path": "t"}
    objective = made({**given, "seq_kd": True})[0]["objective"]
    assert (objective["lmbda"], objective["beta"], objective["seq_kd"]) == (0.5, 0.5, True)
    recipe, found = made({**given, "max_completion_length": 48})  # TRL's DistillationConfig
    objective = recipe["objective"]
    assert (objective["lmbda"], objective["beta"], objective["rollout"]["temperature"]) == (1.0, 1.0, 1.0)
    assert objective["rollout"]["max_completion_length"] == 48
    assert not lost(found)
    recipe, found = made(
        {
            **TRL, "distillation_mode": "full_logits", "distillation_alpha": 0.2, "teacher_model_kind": "ema",
            "teacher_update_rate": 0.1, "num_generations": 4, "max_prompt_length": 100, "max_completion_length": 28,
            "temperature": 0.8, "teacher_prompt_template": "{privileged_context} {prompt}",
        }
    )  # fmt: skip
    objective = recipe["objective"]
    assert (objective["kind"], objective["distillation_alpha"], objective["num_generations"]) == ("sdft", 0.2, 4)
    assert (recipe["train"]["ema_decay"], recipe["train"]["max_length"]) == (0.9, 128)
    assert objective["rollout"]["temperature"] == 0.8
    assert not lost(found)
    assert "top_k" in lost(made({**TRL, "teacher_model_kind": "base", "top_k": 5})[1])


def test_process_reward_models_of_trl():
    given = {"step_separator": "|", "train_on_last_step_only": True, "per_device_train_batch_size": 4}
    recipe, found = made({**TRL, **given, "gradient_accumulation_steps": 3})
    objective = recipe["objective"]
    assert (objective["kind"], objective["lines"], objective["step_separator"]) == ("prm", 12, "|")
    assert (objective["train_on_last_step_only"], objective["max_prompt_length"]) == (True, 512)
    assert recipe["optimizer"]["learning_rate"] == 1e-5
    assert not lost(found)


def test_losses_and_rollouts_of_trl():
    several = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.1}
    recipe, found = made({**TRL, **several, "f_divergence_type": "reverse_kl", "ld_alpha": 0.5})
    objective = recipe["objective"]
    assert (objective["loss_type"], objective["loss_weights"]) == (["sigmoid", "bco_pair"], [0.8, 0.2])
    assert (objective["sft_weight"], objective["ld_alpha"]) == (1.0, 0.5)
    assert not lost(found)
    synced = {"sync_ref_model": True, "ref_model_sync_steps": 64, "use_weighting": True}
    recipe, found = made({**TRL, "beta": 0.1, "f_divergence_type": "js_divergence", **synced})
    assert recipe["objective"]["f_divergence_type"] == "js_divergence"
    assert recipe["objective"].items() >= synced.items()
    assert not lost(found)
    assert lost(made({**TRL, "beta": 0.1, "use_peft": True, "sync_ref_model": True})[1]) == {"sync_ref_model"}
    assert lost(made({**TRL, "beta": 0.1, "loss_type": ["sft"]})[1]) == {"loss_type"}
    assert lost(made({**TRL, "beta": 0.1, "loss_type": "no_such"})[1]) == {"loss_type"}
    recipe, found = made(
        {
            **TRL, "reward_funcs": "a.b", "rollout_func": "mine.generate", "loss_type": "sapo",
            "sapo_temperature_neg": 1.2, "off_policy_mask_threshold": 0.4, "entropy_coef": 0.01, "top_p": 0.9,
        }
    )  # fmt: skip
    objective = recipe["objective"]
    assert (objective["rollout_func"], objective["loss_type"]) == ("mine:generate", "sapo")
    assert (objective["sapo_temperature_neg"], objective["off_policy_mask_threshold"]) == (1.2, 0.4)
    assert objective["entropy_coef"] == 0.01
    assert lost(found) == {"top_p"}
    assert made({**TRL, "cpo_alpha": 0.5, "alpha": 0.1})[0]["objective"]["alpha"] == 0.1


def test_measures_and_the_best_checkpoint():
    given = {"load_best_model_at_end": True, "metric_for_best_model": "eval_margin", "greater_is_better": False}
    recipe, found = made({**TRL, **given, "eval_strategy": "steps", "logging_steps": 4, "neftune_noise_alpha": 5.0})
    wanted = {**given, "eval_steps": 4, "do_eval": True}
    assert {name: recipe["evaluate"][name] for name in wanted} == wanted
    assert recipe["objective"]["neftune_noise_alpha"] == 5.0
    assert not lost(found)
    recipe, found = made({**TRL, "eval_strategy": "epoch", "load_best_model_at_end": True})
    assert {"eval_strategy", "load_best_model_at_end"} <= lost(found)
    assert recipe["evaluate"]["eval_steps"] is None
    assert made({**TRL, "eval_strategy": "no", "eval_steps": 3})[0]["evaluate"]["eval_steps"] is None


def test_loggers_tokens_streams_and_adapters_of_axolotl():
    recipe, found = made(
        {
            "base_model": "m", "pretraining_dataset": [{"path": "text.jsonl", "name": None}], "max_steps": 9,
            "wandb_project": "mine", "use_tensorboard": True, "tokens": ["<|a|>"], "mlflow_tracking_uri": "x",
            "special_tokens": {"pad_token": "p", "additional_special_tokens": ["<|b|>"], "eos_token": "e"},
        }
    )  # fmt: skip
    assert (recipe["log"]["project"], recipe["log"]["report_to"]) == ("mine", ["wandb", "tensorboard"])
    assert recipe["tokenizer"]["added_tokens"] == ["<|a|>", "<|b|>"]
    (dataset,) = recipe["objective"]["datasets"]
    assert (dataset["path"], dataset["streaming"]) == ("text.jsonl", True)
    assert recipe["objective"]["excess_length_strategy"] == "split"
    assert lost(found) == {"mlflow_tracking_uri", "special_tokens"}
    recipe, found = made({**AXOLOTL, "lora_model_dir": "theirs", "adapter": "lora", "load_in_4bit": False})
    assert recipe["model"]["lora"]["adapter"] == "theirs"
    assert not {"lora_r", "lora_alpha"} & lost(found)
    recipe, found = made(
        {**AXOLOTL, "adapter": "lora", "load_in_4bit": False, "peft_init_lora_weights": "pissa_niter_16"}
    )
    assert recipe["model"]["lora"]["init_lora_weights"] == "pissa_niter_16"
    assert made({**AXOLOTL, "reward_model": True})[0]["objective"]["kind"] == "reward"


def test_reward_functions_have_a_module():
    with pytest.raises(ToolkitError, match=r"objective\.reward_funcs\.0 must be module:function, got 'plain'"):
        made({**TRL, "reward_funcs": ["plain"]})
