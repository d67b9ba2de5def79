"""``train.distributed``: two processes under each strategy against one, on the same examples; resumed, evaluated."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.processes import run_processes
from tests.helpers.strategies import CASES, REFUSED, STEPS, STRATEGIES, case
from tests.helpers.training_recipes import tiny_recipe, write_corpus
from toolkit.errors import ToolkitError
from toolkit.training.accelerator import make_accelerator
from toolkit.training.loop import train
from toolkit.training.metrics import read_metrics
from toolkit.training.strategies.fsdp2 import units_of
from toolkit.training.strategies.zero import read_settings

DORA = {"config": None, "name_or_path": "base", "lora": {"use_dora": True}}
TOLERANCE = {"bf16": 5e-3, "fp16": 5e-3}
"""In 16 bits the last bit of a float32 weight may move its rounding by a 256th of it; others have 1e-5."""


def lines_of(recipe: Any) -> list[dict[str, Any]]:
    return read_metrics(Path(recipe.output_dir) / recipe.run_name / "metrics.jsonl")


def compare(folder: Path, strategy: str, *names: str) -> None:
    """Train cases in this process, then in two; losses, metrics and held-out measures are the same."""
    write_corpus(folder / "text")
    expected = {name: train(case(name, folder, "ddp", 1), quiet=True) for name in names}
    run_processes("training/under_strategies.py", folder, strategy, *names, says="all held", seconds=1800)
    for name in names:
        recipes = [case(name, folder, *how) for how in (("ddp", 1), (strategy, 2))]
        found = json.loads((Path(recipes[1].output_dir) / recipes[1].run_name / "result.json").read_text())
        alone, together = map(lines_of, recipes)
        assert len(alone) == len(together) == recipes[0].train.max_steps
        for one, two in zip(alone, together):
            for key in ("loss", "grad_norm", "reward", "num_tokens"):
                if key in one and not (name in TOLERANCE and key == "grad_norm"):
                    assert two[key] == pytest.approx(one[key], abs=TOLERANCE.get(name, 1e-5)), (name, one["step"], key)
            assert two.get("mismatch_bits", 0) == 0
        # The baseline of KTO is over neighbours among a process's own lines.
        ignored = ("eval_runtime", "eval_kl")
        measured = [key for key in expected[name] if key.startswith("eval_") and key not in ignored]
        for key in measured:
            assert found[key] == pytest.approx(expected[name][key], rel=1e-5, abs=2e-5), (name, key)
        assert found.get("best_step") == expected[name].get("best_step")
        assert name in ("moe", "bf16", "fp16", "offload", "lora", "qlora") or measured


@pytest.mark.sweep
@pytest.mark.parametrize("strategy", ["fsdp2", "tp"])
def test_two_processes_train_as_one_does(tmp_path: Path, strategy: str) -> None:
    compare(tmp_path, strategy, "dense")
    recipe = case("dense", tmp_path, strategy, 2)
    losses = [line["loss"] for line in lines_of(recipe)]
    # One process continues in the middle of what two have trained.
    train(recipe.model_copy(update={"resume_from_checkpoint": f"step-{STEPS // 2}"}), quiet=True)
    again = [line["loss"] for line in lines_of(recipe)]
    assert again[: STEPS // 2] == losses[: STEPS // 2]
    assert again == pytest.approx(losses, abs=1e-5)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_objective_trains_as_in_one_process(tmp_path: Path, strategy: str) -> None:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    compare(tmp_path, strategy, *(name for name in CASES if name not in REFUSED.get(strategy, ())))


@pytest.mark.parametrize(
    ("strategy", "sections", "says"),
    [
        ("fsdp2", {"optimizer": {"optim": "adamw_8bit"}}, "optimizer.optim must be 'adamw_torch_fused' or 'sgd' with"),
        ("zero1", {"optimizer": {"optim": "muon"}}, "optimizer.optim must be 'adamw_torch_fused' or 'sgd' with"),
        ("fsdp2", {"train": {"mixed_precision": "fp16"}}, "train.mixed_precision must be 'no' or 'bf16' with"),
        ("zero2", {"train": {"expert_parallel": {}}}, "train.expert_parallel must be null with"),
        ("zero3", {"train": {"ema_decay": 0.9}}, "train.ema_decay must be null with"),
        ("fsdp2", {"model": {"quantise": "nf4"}}, "model.quantise must be null with train.distributed 'fsdp2'"),
        ("zero3", {"model": {**DORA, "quantise": "nf4"}}, "model.quantise must be null with train.distributed 'zero3'"),
        ("zero1", {"model": {"dtype": "float64"}}, "model.dtype must be 'float32' with train.distributed 'zero1'"),
        ({"strategy": "ddp", "cpu_offload": True}, {}, "train.distributed.cpu_offload must be false with"),
        ({"strategy": "fsdp2", "deepspeed": "a.json"}, {}, "it is for zero1, zero2 and zero3"),
        ({"strategy": "zero1", "deepspeed": "a", "cpu_offload": True}, {}, "says what is offloaded, got true"),
        ("fsdp", {}, "train.distributed.strategy must be"),
        ("tp", {"model": DORA}, "model.lora.use_dora must be false with"),
        ("tp", {"optimizer": {"optim": "muon"}}, "'tp', got 'muon': its update is of whole matrices"),
        ({"strategy": "tp", "cpu_offload": True}, {}, "train.distributed.cpu_offload must be false with"),
    ],
)  # fmt: skip
def test_what_a_strategy_does_not_take(tmp_path: Path, strategy: Any, sections: dict[str, Any], says: str) -> None:
    sections["train"] = {**sections.get("train", {}), "distributed": strategy}
    with pytest.raises(ToolkitError) as caught:
        tiny_recipe(tmp_path, **sections)
    assert says in str(caught.value)


def test_a_launcher_must_agree_with_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(strategy: str) -> str:
        with pytest.raises(ToolkitError) as caught:
            make_accelerator(tiny_recipe(tmp_path, train={"distributed": strategy}))
        return str(caught.value)

    settings = tmp_path / "ds.json"
    settings.write_text('{"zero_optimization": {"stage": 3}}')
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert refused("fsdp2") == "fsdp_config.fsdp_version of accelerate must be 2, got 1."
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert refused("ddp").startswith("train.distributed must be 'fsdp2', which accelerate is set up for, got 'ddp'")
    assert make_accelerator(tiny_recipe(tmp_path, train={"distributed": "fsdp2"})).num_processes == 1
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert "must be 'zero2'" in refused("zero3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(settings))
    assert "must be 'zero3'" in refused("zero2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "none.json"))
    assert refused("zero3") == "the ZeRO stage that accelerate is set up for must be 1, 2 or 3, got None."


def test_settings_of_the_user_s_own_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"

    def refused(text: str) -> str:
        file.write_text(text)
        with pytest.raises(ToolkitError) as caught:
            read_settings(str(file), 2)
        return str(caught.value)

    assert "must be a JSON file of DeepSpeed" in refused("{")
    assert "must be a JSON file of settings" in refused("[]")
    assert "must be 2 with train.distributed 'zero2', got 3" in refused('{"zero_optimization": {"stage": 3}}')
    own = '{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}'
    assert refused(own).startswith('gradient_clipping must be "auto" or absent in train.distributed.deepspeed')
    own = '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}'
    assert refused(own).endswith("the recipe has optimizer.")
    given = {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "bf16": {"enabled": "auto"}, "fp16": {"enabled": False, "loss_scale": 0}, "train_batch_size": "auto",
        "wall_clock_breakdown": False,
    }  # fmt: skip
    file.write_text(json.dumps(given))
    assert read_settings(str(file), 2) == {
        "zero_optimization": {"stage": 2, "overlap_comm": True}, "wall_clock_breakdown": False
    }  # fmt: skip


def test_units_are_decoder_layers() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **small, intermediate_size=16))
    assert units_of(model) == list(model.model.layers)[::-1]
    model._no_split_modules = None
    assert units_of(model) == list(model.model.layers)[::-1]
