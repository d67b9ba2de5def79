"""NEFTune: how large the noise is, where there is none, and that a run with it resumes."""

import math
from pathlib import Path

import pytest
import torch

from tests.helpers.objective_recipes import check_resumes, objective_recipe, weights
from toolkit.patching import patch, ragged_forward
from toolkit.state.batch import RaggedBatch
from toolkit.testing.models import random_model
from toolkit.training.loop import Trainer
from toolkit.training.noise import add_embedding_noise


def test_noise_is_within_its_bound_for_each_sequence() -> None:
    model = random_model("llama").train()
    patch(model)
    batch = RaggedBatch.from_sequences([[1, 2, 3, 4], [5] * 25], share=False)
    seen: list[torch.Tensor] = []
    add_embedding_noise(model, 3.0)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    ragged_forward(model, batch)
    plain = model.get_input_embeddings().weight[batch.tokens].detach()
    size = plain.shape[-1]
    noise = (seen.pop()[0] - plain).abs()
    for rows, length in ((noise[:4], 4), (noise[4:], 25)):
        bound = 3.0 / math.sqrt(length * size)
        assert 0.9 * bound < float(rows.max()) <= bound * (1 + 1e-5)
    with torch.no_grad():
        ragged_forward(model, batch)
    ragged_forward(model.eval(), batch)
    assert all(torch.equal(one[0], plain) for one in seen)


@pytest.mark.sweep
def test_resuming_repeats_the_noise(tmp_path: Path) -> None:
    recipe = objective_recipe(tmp_path, "sft", {"neftune_noise_alpha": 5.0})
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    quiet = Trainer(objective_recipe(tmp_path, "sft", {}, run_name="quiet"), quiet=True)
    quiet.fit()
    check_resumes(whole, recipe)
    assert any(not torch.equal(tensor, weights(quiet)[name]) for name, tensor in weights(whole).items())
