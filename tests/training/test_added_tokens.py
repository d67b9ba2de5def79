"""Tokens that a recipe adds: the model grows, the old rows stay, text with them is one token."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import objective_recipe
from toolkit.config import Recipe
from toolkit.errors import ToolkitError
from toolkit.loading import load_model
from toolkit.testing.models import random_model, tiny_tokenizer
from toolkit.training.loop import Trainer


@pytest.mark.sweep
def test_a_model_grows_by_the_tokens(tmp_path: Path) -> None:
    base = random_model("llama")
    base.save_pretrained(str(tmp_path / "base"))
    tokenizer = tiny_tokenizer(base.config.vocab_size)
    tokenizer.save_pretrained(str(tmp_path / "base"))
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(f'{{"prompt": "{at}", "completion": "<|a|> b<|c|>"}}\n' for at in range(9)))
    fields = {
        "model": {"name_or_path": str(tmp_path / "base"), "config": None},
        "tokenizer": {"added_tokens": ["<|a|>", "<|c|>"]},
    }
    recipe = objective_recipe(tmp_path, "sft", {"task": None, "data_files": str(lines)}, **fields)
    trainer = Trainer(recipe, quiet=True)
    grown, old = trainer.hf_model.get_input_embeddings().weight, base.get_input_embeddings().weight
    added = trainer.tokenizer.convert_tokens_to_ids(["<|a|>", "<|c|>"])
    assert torch.equal(grown[: len(tokenizer)], old[: len(tokenizer)])
    assert len(grown) >= len(trainer.tokenizer) == max(added) + 1
    example = trainer.objective.stream.next_batch()[0]
    assert [token for token in example.targets if token in added] == added
    before = grown[added[0]].detach().clone()
    trainer.fit()
    assert not torch.equal(trainer.hf_model.get_input_embeddings().weight[added[0]], before)


@pytest.mark.sweep
def test_adapters_train_the_embeddings_of_added_tokens(tmp_path: Path) -> None:
    base = random_model("llama")
    base.save_pretrained(str(tmp_path / "base"))
    tiny_tokenizer(base.config.vocab_size).save_pretrained(str(tmp_path / "base"))
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(f'{{"prompt": "{at}", "completion": "<|a|> b<|c|>"}}\n' for at in range(9)))

    def recipe_of(**lora: Any) -> Recipe:
        return objective_recipe(
            tmp_path, "sft", {"task": None, "data_files": str(lines)},
            model={"name_or_path": str(tmp_path / "base"), "config": None, "lora": {"r": 2, **lora}},
            tokenizer={"added_tokens": ["<|a|>", "<|c|>"]},
        )  # fmt: skip

    with pytest.raises(ToolkitError, match=r"model\.lora\.modules_to_save must name the embeddings and the head"):
        Trainer(recipe_of(modules_to_save=["embed_tokens"]), quiet=True)
    trainer = Trainer(recipe_of(modules_to_save=["embed_tokens", "lm_head"]), quiet=True)
    trainer.fit()
    ids = torch.tensor([trainer.tokenizer("<|a|> b<|c|>")["input_ids"]])
    assert ids.max() >= base.config.vocab_size
    merged, tokenizer = load_model(str(trainer.folder))
    assert len(tokenizer) == len(trainer.tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(
            merged(ids).logits + 0.0, trainer.hf_model.eval()(ids).logits + 0.0, atol=2e-5, rtol=1e-4
        )
