"""TRL's trainers on a patched model: SFT and DPO as without the patch, GRPO with the engine as its rollout."""

import copy
import re

import pytest
import torch

import toolkit
from tests.helpers.rope import longrope, sequences, stock, stock_logprobs
from toolkit.errors import ToolkitError
from toolkit.patching import report_of
from toolkit.testing.models import random_model, tiny_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from train_patches.trl import engine_rollout  # noqa: E402

PROMPTS = ["a model", "an optimizer step moves", "the engine", "rows of one batch"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def common(folder, **settings):
    return {
        "output_dir": str(folder), "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "bf16": False, "seed": 5, "disable_tqdm": True,
        "gradient_checkpointing": False, "lr_scheduler_type": "constant",
    } | settings  # fmt: skip


def rewards(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def grpo(tokenizer, folder, model=None, peft_config=None, **settings):
    settings = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 10, "temperature": 1.0,
        "beta": 0.0, "shuffle_dataset": False, "top_k": 0,
    } | settings  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=random_model("llama") if model is None else model,
        args=trl.GRPOConfig(**common(folder, **settings)),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in PROMPTS]),
        reward_funcs=rewards,
        peft_config=peft_config,
    )
    trainer.current_gradient_accumulation_steps = 1  # what ``train`` sets, for a loss outside of it
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_sft_and_dpo_lose_what_the_unpatched_model_loses(kind, tokenizer, tmp_path):
    results = []
    for patched in (False, True):
        model = random_model("llama")
        if patched:
            toolkit.patch(model)
        if kind == "sft":
            rows = [{"prompt": text, "completion": f" is {text} again"} for text in PROMPTS]
            arguments = trl.SFTConfig(
                **common(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, packing=False)
            )
            trainer_class, more = trl.SFTTrainer, {}
        else:
            rows = [{"prompt": text, "chosen": f" is {text}", "rejected": " or not"} for text in PROMPTS]
            arguments = trl.DPOConfig(**common(tmp_path, per_device_train_batch_size=2, max_steps=2))
            trainer_class, more = trl.DPOTrainer, {"ref_model": random_model("llama")}
        trainer = trainer_class(
            model=model, args=arguments, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(rows),
            eval_dataset=datasets.Dataset.from_list(rows), **more,
        )  # fmt: skip
        trainer.train()
        results.append(([*logged(trainer, "loss"), trainer.evaluate()["eval_loss"]], model.lm_head.weight.detach()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-4)


def test_greedy_tokens_are_those_of_trls_own_generation(tokenizer, tmp_path):
    trainer = grpo(tokenizer, tmp_path, generation_kwargs={"do_sample": False, "min_new_tokens": 3})
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS for _ in range(2)]
    expected, _ = trainer._generate_single_turn(prompts, None, {}, 2)
    # A token that these completions do come to, so that some end early, and not before the third token.
    trainer.eos_token_ids = [expected[0][4]]
    trainer.generation_config.eos_token_id = trainer.eos_token_ids
    trainer.generation_kwargs["eos_token_id"] = trainer.eos_token_ids
    expected, _ = trainer._generate_single_turn(prompts, None, {}, 2)
    with engine_rollout(trainer, max_model_len=64):
        completions, logprobs = trainer._generate_single_turn(prompts, None, {}, 2)
    assert completions == expected
    assert len({len(one) for one in completions}) > 1
    assert [len(one) for one in logprobs] == [len(one) for one in completions]


def test_completions_match_the_regular_expression_of_the_arguments(tokenizer, tmp_path):
    trainer = grpo(tokenizer, tmp_path, vllm_structured_outputs_regex="[ab]{3,6}")
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS for _ in range(2)]
    with engine_rollout(trainer, max_model_len=64):
        completions, _ = trainer._generate_single_turn(prompts, None, {}, 2)
        trainer.train()
    for one in completions:
        assert re.fullmatch("[ab]{3,6}", tokenizer.decode(one, skip_special_tokens=True))
    assert logged(trainer, "mismatch/kl") == [0.0] * len(logged(trainer, "mismatch/kl"))


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_rollout_and_training_agree_in_every_bit_while_the_weights_move(adapted, tokenizer, tmp_path):
    config = None
    if adapted:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = grpo(tokenizer, tmp_path, peft_config=config, num_iterations=2, max_steps=4)
    rollouts = []
    with engine_rollout(trainer, max_model_len=64) as engine:
        generate = trainer._generate_single_turn
        trainer._generate_single_turn = lambda *args: (
            rollouts.append((generate(*args), engine.stats())) or rollouts[-1][0]
        )
        trainer.train()
        engine.wake()
        completion = engine.generate([[3, 4, 5]], toolkit.SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    model = trainer.model if config is None else trainer.model.merge_and_unload()
    toolkit.unpatch(model)
    wanted = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert completion[0].token_ids == wanted[0, 3:].tolist()  # the weights of the end, and none else
    assert len(rollouts) == 2  # four updates, two per rollout
    assert rollouts[0][1]["weight_version"] != rollouts[1][1]["weight_version"]
    for name in ("mismatch/kl", "mismatch/bits"):
        assert logged(trainer, name) == [0.0, 0.0]  # of the first update of each rollout, and of those alone
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))


def test_loss_gradients_and_entropy_are_trls_own(tokenizer, tmp_path):
    """On one batch of completions of uneven lengths, some masked, at two temperatures."""
    for temperature in (1.0, 0.7):
        results = []
        generator = torch.Generator().manual_seed(1)
        mask = (torch.arange(10) < torch.tensor([[10], [4], [1], [10], [0], [7], [10], [9]])).long()
        prompts = torch.randint(3, 331, (2, 6), generator=generator).repeat_interleave(4, 0)
        inputs = {
            "prompt_ids": prompts,
            "prompt_mask": (torch.arange(6) >= torch.tensor([2, 0]).repeat_interleave(4)[:, None]).long(),
            "completion_ids": torch.randint(3, 331, (8, 10), generator=generator),
            "completion_mask": mask,
            "advantages": torch.randn(8, generator=generator),
            "old_per_token_logps": -5.0 - torch.rand(8, 10, generator=generator),
            "num_items_in_batch": mask.sum(),
        }
        for ours in (False, True):
            trainer = grpo(tokenizer, tmp_path, temperature=temperature)
            trainer.model.train()
            engine = engine_rollout(trainer, max_model_len=64) if ours else None
            loss = trainer.compute_loss(trainer.model, dict(inputs))
            loss.backward()
            gradients = [p.grad for p in trainer.model.parameters()]
            results.append((loss.detach(), trainer._metrics["train"]["entropy"][0], gradients))
            if engine is not None:
                engine.close()
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_trls_padded_forward_is_compared_all_the_same(tokenizer, tmp_path):
    """Its head adds in another order than the engine's: the metric says by how much."""
    trainer = grpo(tokenizer, tmp_path, max_steps=1, temperature=0.8)
    with engine_rollout(trainer, share=False, max_model_len=64):
        trainer.train()
    (divergence,), (bits,) = logged(trainer, "mismatch/kl"), logged(trainer, "mismatch/bits")
    assert 0.0 <= divergence < 1e-9
    assert 0.0 < bits <= 1.0


def other(kind, tokenizer, folder, **settings):
    """A trainer of TRL that generates, of another class than GRPO's."""
    common_settings = common(folder, per_device_train_batch_size=4, max_completion_length=6, top_k=0, max_steps=2)
    rows = datasets.Dataset.from_list([{"prompt": text} for text in PROMPTS])
    arguments = {"processing_class": tokenizer, "train_dataset": rows, "model": random_model("llama")}
    if kind == "rloo":
        config = trl.RLOOConfig(**common_settings | {"num_generations": 4, "beta": 0.0} | settings)
        return trl.RLOOTrainer(args=config, reward_funcs=rewards, **arguments)
    teacher = random_model("llama")
    with torch.no_grad():
        teacher.lm_head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return trl.DistillationTrainer(
        args=trl.DistillationConfig(**common_settings | settings), teacher_model=teacher, **arguments
    )


@pytest.mark.parametrize("kind", ["rloo", "distillation"])
def test_other_trainers_that_generate_take_the_engine(kind, tokenizer, tmp_path):
    """Greedily, so that the engine's tokens, and then the losses, are those of TRL's own generation."""
    losses = []
    for ours in (False, True):
        trainer = other(kind, tokenizer, tmp_path, generation_kwargs={"do_sample": False})
        if ours:
            with engine_rollout(trainer, max_model_len=64) as engine:
                trainer.train()
                assert engine.stats()["generation_tokens"] > 0
        else:
            trainer.train()
        losses.append((logged(trainer, "loss"), logged(trainer, "grad_norm"), logged(trainer, "entropy")))
    for ours, theirs in zip(losses[1], losses[0]):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_rloo_compares_with_the_engine_in_every_bit(tokenizer, tmp_path):
    trainer = other("rloo", tokenizer, tmp_path, max_steps=3)
    with engine_rollout(trainer, max_model_len=64):
        trainer.train()
    for name in ("mismatch/kl", "mismatch/bits"):
        assert logged(trainer, name) == [0.0, 0.0, 0.0]
    assert any(norm > 0 for norm in logged(trainer, "grad_norm"))


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_batch_that_is_masked_as_truncated_has_no_loss_and_counts_as_a_step(kind, tokenizer, tmp_path):
    settings = {"mask_truncated_completions": True, "max_steps": 2, "max_completion_length": 4}
    trainer = grpo(tokenizer, tmp_path, **settings) if kind == "grpo" else other(kind, tokenizer, tmp_path, **settings)
    trainer.eos_token_ids = []  # so that none ends early
    before = trainer.model.lm_head.weight.detach().clone()
    with engine_rollout(trainer, max_model_len=64):
        trainer.train()
    assert trainer.state.global_step == 2
    assert logged(trainer, "loss") == pytest.approx([0.0, 0.0], abs=1e-6)  # RLOO's is the mean advantage
    assert logged(trainer, "grad_norm") == [0.0, 0.0]
    assert torch.equal(trainer.model.lm_head.weight, before)


def test_rewards_that_are_infinite_are_refused_and_none_is_left_out(tokenizer, tmp_path):
    trainer = grpo(tokenizer, tmp_path)
    trainer.reward_funcs = [lambda completion_ids, **_: [0.0] * (len(completion_ids) - 1) + [-float("inf")]]
    trainer.reward_func_names = ["logged"]
    with (
        engine_rollout(trainer, max_model_len=64),
        pytest.raises(ToolkitError, match=r"rewards of 'logged' must be finite, or None .*, got -inf for completion 7"),
    ):
        trainer.train()
    trainer = grpo(tokenizer, tmp_path)
    trainer.reward_funcs = [lambda completion_ids, **_: [None, 1.0, 0.0, 0.5] * (len(completion_ids) // 4)]
    with engine_rollout(trainer, max_model_len=64):
        trainer.train()
    assert logged(trainer, "reward") == pytest.approx([0.5] * 3)
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))


def test_a_trainer_that_is_not_known_is_refused_by_name(tokenizer, tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": text, "completion": text} for text in PROMPTS])
    trainer = trl.SFTTrainer(
        model=random_model("llama"), args=trl.SFTConfig(**common(tmp_path)), processing_class=tokenizer,
        train_dataset=rows,
    )  # fmt: skip
    with pytest.raises(ToolkitError, match=r"must be one of TRL's GRPOTrainer, RLOOTrainer, Dist.*got SFTTrainer"):
        engine_rollout(trainer)
    assert report_of(trainer.model) is None


@pytest.mark.parametrize(
    ("settings", "change", "sentence"),
    [
        ({}, {"use_vllm": True}, r"use_vllm must be False, got True"),
        ({}, {"rollout_func": len}, r"rollout_func must be None, got .*len"),
        (
            {"generation_kwargs": {"num_beams": 2}},
            {},
            r"generation_kwargs must be a dict with keys of bos_token.*, got \{'num_beams': 2\}",
        ),
        ({"temperature": 0.5, "top_p": 0.9}, {}, r"temperature must be 1\.0 together with top_p, got 0\.5"),
    ],
    ids=["vllm", "rollout_func", "generation_kwargs", "temperature"],
)
def test_what_the_engine_cannot_do_is_refused_by_name(settings, change, sentence, tokenizer, tmp_path):
    trainer = grpo(tokenizer, tmp_path, **settings)
    for name, value in change.items():
        setattr(trainer, name, value)
        setattr(trainer.args, name, value)
    with pytest.raises(ToolkitError, match=sentence):
        engine_rollout(trainer)
    assert report_of(trainer.model) is None
    assert "_generate_single_turn" not in trainer.__dict__


def test_rows_are_trained_with_the_rotary_tables_of_their_rollout(tokenizer, tmp_path):
    """Some requests declare more tokens than the border; completions of those may end before it."""
    model = random_model("llama", rope_parameters=longrope(8, border=22))
    trainer = grpo(tokenizer, tmp_path, model=model)
    oracle = stock(random_model("llama", rope_parameters=longrope(8, border=22)))
    trainer.ref_model, trainer.beta = copy.deepcopy(oracle), 0.1  # TRL loads its own from a folder
    trainer.eos_token_ids = list(range(0, 331, 5))
    trainer.generation_config.eos_token_id = trainer.eos_token_ids
    seen = []
    with engine_rollout(trainer, max_model_len=64) as engine:
        generate = engine.generate
        engine.generate = lambda *args: seen.append(generate(*args)) or seen[-1]
        trainer.train()
        ids, prompts = torch.tensor(sequences(30, 30)), torch.tensor([[1] * 18, [0] * 14 + [1] * 4])
        mask = torch.cat([prompts, torch.ones(2, 12, dtype=torch.int64)], 1)  # they declare 28 and 14 tokens
        reference = trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, mask, 12)[0]
    for row, got in enumerate(reference):
        exact = stock_logprobs(oracle, ids[row][mask[row].bool()].tolist())[-12:]
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
    completions = [one for group in seen for one in group]
    assert {one.rotary_length for one in completions} == {1, 23}
    assert any(one.rotary_length == 23 and len(one.prompt_token_ids) + len(one.token_ids) <= 22 for one in completions)
    assert set(logged(trainer, "mismatch/bits")) == {0.0}
    with pytest.raises(ToolkitError, match="needs share=True"):
        engine_rollout(trainer, share=False)
