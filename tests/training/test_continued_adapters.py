"""Adapters that continue PEFT's, and those that begin with factors of the weights: PEFT is the oracle."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.objective_recipes import check_resumes, moved_by_training, objective_recipe
from toolkit.config import Recipe
from toolkit.errors import ToolkitError
from toolkit.loading import load_model
from toolkit.loading.run import latest
from toolkit.testing.models import random_model, tiny_tokenizer
from toolkit.training.adapters import _factors
from toolkit.training.loop import Trainer

IDS = torch.tensor([[5, 6, 7, 8, 9]])
LINES = "".join(f'{{"prompt": "{at}", "completion": " b{at}"}}\n' for at in range(20))
PAIRS = "".join(f'{{"prompt": "{at}", "chosen": " b{at}", "rejected": " c"}}\n' for at in range(20))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = random_model("llama")
    model.save_pretrained(str(tmp_path / "base"))
    tiny_tokenizer(model.config.vocab_size).save_pretrained(str(tmp_path / "base"))
    (tmp_path / "lines.jsonl").write_text(LINES)
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    return tmp_path / "base"


def recipe_of(base: Path, lora: dict[str, Any], kind: str = "sft", **sections: Any) -> Recipe:
    lines = "lines.jsonl" if kind == "sft" else "pairs.jsonl"
    model = {"name_or_path": str(base), "config": None, "lora": lora, **sections.pop("model", {})}
    objective = {"task": None, "data_files": str(base.parent / lines), **sections.pop("objective", {})}
    return objective_recipe(base.parent, kind, objective, model=model, **sections)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits + 0.0
    return found


def peft_model(base: Path, folder: Path | None = None, **fields: Any) -> Any:
    model = load_model(str(base))[0]
    if folder is not None:
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **fields))


DECOMPOSED: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa", "r": 3, "lora_alpha": 7.0},
    {"init_lora_weights": "olora", "r": 4, "lora_alpha": 1.5, "use_rslora": True},
    {"init_lora_weights": "pissa", "r": 2, "use_dora": True},
]


@pytest.mark.sweep
@pytest.mark.parametrize("fields", DECOMPOSED, ids=lambda fields: "-".join(map(str, fields.values())))
def test_decomposed_weights_begin_and_go_on_as_in_peft(base: Path, fields: dict[str, Any]) -> None:
    recipe = recipe_of(base, fields)
    trainer = Trainer(recipe, quiet=True)
    plain = load_model(str(base))[0]
    theirs = peft_model(base, **{**fields, "lora_alpha": fields.get("lora_alpha", 16.0)}).base_model.model
    changed = 0
    for name, tensor in theirs.named_parameters():
        ours = trainer.hf_model.get_parameter(name)
        if "base_layer" in name:
            assert not torch.equal(ours, plain.get_parameter(name.replace(".base_layer", "")))
            torch.testing.assert_close(ours, tensor, atol=1e-5, rtol=1e-4)
            changed += 1
    assert changed == 14
    torch.testing.assert_close(logits(trainer.hf_model), logits(plain), atol=2e-5, rtol=1e-4)
    trainer.fit()
    folder = latest(trainer.folder / "checkpoints")
    trained = logits(trainer.hf_model.eval())
    assert not torch.allclose(trained, logits(plain), atol=1e-3)
    # Beside the weights as they were, for PEFT as for a loader that merges.
    torch.testing.assert_close(logits(peft_model(base, folder)), trained, atol=2e-5, rtol=1e-4)
    merged = load_model(str(trainer.folder))[0]
    torch.testing.assert_close(logits(merged), trained, atol=2e-5, rtol=1e-4)
    check_resumes(trainer, recipe)


def test_a_randomised_decomposition_is_that_of_peft() -> None:
    weight = torch.randn(24, 17, generator=torch.Generator().manual_seed(1))
    linear = torch.nn.Linear(17, 24, bias=False)
    linear.weight.data = weight.clone()
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0"])
    layer = peft.get_peft_model(torch.nn.Sequential(linear), config).base_model.model[0]
    torch.manual_seed(5)
    layer.pissa_init("default", "pissa_niter_8")
    torch.manual_seed(5)
    first, second = _factors(weight, 3, 7 / 3, "pissa_niter_8")
    torch.testing.assert_close(first, layer.lora_A["default"].weight.data, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second, layer.lora_B["default"].weight.data, atol=1e-5, rtol=1e-4)


@pytest.mark.sweep
def test_decomposed_weights_of_16_bits(base: Path) -> None:
    fields = {"init_lora_weights": "pissa", "r": 2, "lora_alpha": 3.0}
    recipe = recipe_of(base, fields, train={"mixed_precision": "bf16"})
    trainer = Trainer(recipe, quiet=True)
    exact, rounded = (logits(load_model(str(base), dtype)[0]) for dtype in ("float32", "bfloat16"))
    assert (logits(trainer.hf_model) - exact).abs().max() < 2 * (rounded - exact).abs().max()
    trainer.fit()
    check_resumes(trainer, recipe)


def adapters_of_peft(base: Path, **fields: Any) -> Path:
    """A folder as PEFT writes it, of adapters that do something."""
    torch.manual_seed(3)
    model = peft_model(base, init_lora_weights=False, **fields)
    model.save_pretrained(str(base.parent / "theirs"))
    return base.parent / "theirs"


CONTINUED: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 7.0},
    {"r": 2, "use_dora": True, "use_rslora": True},
    {"r": 2, "modules_to_save": ["embed_tokens", "lm_head"]},
    {"r": 2, "trainable_token_indices": [3, 9]},
]


@pytest.mark.sweep
@pytest.mark.parametrize("fields", CONTINUED, ids=lambda fields: "-".join(fields))
def test_adapters_continue(base: Path, fields: dict[str, Any]) -> None:
    theirs = adapters_of_peft(base, **fields)
    recipe = recipe_of(base, {"adapter": str(theirs)})
    trainer = Trainer(recipe, quiet=True)
    assert trainer.hf_model.peft_config["default"].r == fields["r"]
    torch.testing.assert_close(logits(trainer.hf_model), logits(peft_model(base, theirs)), atol=2e-5, rtol=1e-4)
    moved = moved_by_training(trainer)
    assert any("lora_A" in name for name in moved)
    assert any("lora_B" in name for name in moved)
    assert any("modules_to_save" in name for name in moved) == ("modules_to_save" in fields)
    assert not any("base_layer" in name for name in moved)
    folder = latest(trainer.folder / "checkpoints")
    trained = logits(trainer.hf_model.eval())
    torch.testing.assert_close(logits(peft_model(base, folder)), trained, atol=2e-5, rtol=1e-4)
    (theirs / "adapter_model.safetensors").unlink()  # a run resumes from its own
    with pytest.raises(ToolkitError, match=r"model\.lora\.adapter must be a folder with adapter_model\.safetensors"):
        Trainer(recipe.model_copy(update={"run_name": "other"}), quiet=True)


@pytest.mark.sweep
def test_a_run_of_continued_adapters_resumes(base: Path) -> None:
    recipe = recipe_of(base, {"adapter": str(adapters_of_peft(base, r=3))})
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    check_resumes(whole, recipe)


@pytest.mark.sweep
def test_a_reference_has_the_adapters_that_continue(base: Path) -> None:
    trainer = Trainer(recipe_of(base, {"adapter": str(adapters_of_peft(base, r=3))}, "dpo"), quiet=True)
    (micro, *_) = next(iter(trainer.objective.updates(0)))
    loss = trainer.objective.loss(trainer.forward, micro).item()
    weight = sum(pair.weight for pair in micro)
    assert loss == pytest.approx(0.6931471805599453 * weight, rel=1e-5)  # log 2: no margin yet
    assert not any(one.requires_grad for one in trainer.objective.reference.model.parameters())


@pytest.mark.sweep
def test_adapters_beside_merged_ones_name_them(base: Path) -> None:
    """New adapters on a folder of adapters: what opens them merges both."""
    theirs = adapters_of_peft(base, r=3)
    recipe = recipe_of(theirs, {"r": 2})
    trainer = Trainer(recipe, quiet=True)
    trainer.fit()
    merged = load_model(str(trainer.folder))[0]
    torch.testing.assert_close(logits(merged), logits(trainer.hf_model.eval()), atol=2e-5, rtol=1e-4)


def test_wrong_adapters_are_one_sentence(base: Path) -> None:
    theirs = adapters_of_peft(base, r=3)
    for lora, sentence in (
        ({"adapter": str(base)}, r"model\.lora\.adapter must be a folder of adapters, got .* has no adapter_config"),
        ({"adapter": "nowhere"}, r"model\.lora\.adapter must be a folder of adapters, got 'nowhere', which does not"),
        ({"init_lora_weights": "pissa", "r": 4000}, r"model\.lora\.r must be <= \d+, the rank of .* got 4000"),
    ):
        with pytest.raises(ToolkitError, match=sentence):
            Trainer(recipe_of(base, lora), quiet=True)
    for lora, sentence in (
        ({"adapter": str(theirs), "r": 4}, r"model\.lora\.r must be left out with model\.lora\.adapter"),
        ({"init_lora_weights": "pisa"}, r"model\.lora\.init_lora_weights must be"),
    ):
        with pytest.raises(ToolkitError, match=sentence):
            recipe_of(base, lora)
    with pytest.raises(ToolkitError, match=r"model\.quantise must be null with model\.lora\.init_lora_weights 'pissa'"):
        recipe_of(base, {"init_lora_weights": "pissa"}, model={"quantise": "nf4"})
    other = random_model("qwen3")
    other.save_pretrained(str(base.parent / "other"))
    tiny_tokenizer(other.config.vocab_size).save_pretrained(str(base.parent / "other"))
    with pytest.raises(ToolkitError, match=r"model\.lora\.adapter must be adapters of the model, got "):
        Trainer(recipe_of(base.parent / "other", {"adapter": str(theirs)}), quiet=True)
    assert load_file(str(theirs / "adapter_model.safetensors"))
