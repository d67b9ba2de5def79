"""Image-text models in the engine: tokens of ``generate``, log-probabilities of the training forward."""

import copy
import random
from typing import Any

import pytest
import torch

import toolkit
from tests.helpers.picture_models import KINDS, PictureModel, picture_model
from toolkit import Engine, SamplingParams
from toolkit.errors import ToolkitError

FAST = ("qwen3_vl", "gemma3")
PROMPTS: list[list[int | str]] = [
    [21, 22, 9, "a", 10, 23, "bb", 24, 25, 26],
    [21, 22, 9, "a", 10, 23, "bb", 24, 27],
    [31, "bb", 10, 9, "a", 32, 33],
    ["a", 34, 35],
    [36, 37, 38, 39],
]
NEW = 8


@pytest.fixture(scope="module", params=[pytest.param(k, marks=[] if k in FAST else [pytest.mark.sweep]) for k in KINDS])
def pictures(request: pytest.FixtureRequest) -> tuple[PictureModel, Any]:
    """A stock model, and a patched one of the same weights."""
    made = picture_model(request.param)
    patched = copy.deepcopy(made.model)
    toolkit.patch(patched)
    return made, patched


def _prompt(made: PictureModel, parts: list[int | str]) -> Any:
    """As the engine takes it: what a processor returned, or token ids."""
    outputs = made.outputs(parts)
    return outputs if any(isinstance(part, str) for part in parts) else outputs["input_ids"][0].tolist()


def _generated(made: PictureModel, parts: list[int | str]) -> list[int]:
    outputs = made.outputs(parts)
    if not any(isinstance(part, str) for part in parts):
        types = {made.token_types: torch.zeros_like(outputs["input_ids"])} if made.token_types else {}
        outputs = {"input_ids": outputs["input_ids"], **types}
    ids = outputs["input_ids"]
    out = made.model.generate(
        **outputs, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def test_greedy_tokens_are_those_of_generate(pictures: tuple[PictureModel, Any]) -> None:
    made, patched = pictures
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    with Engine(patched, max_num_seqs=4) as engine:
        found = engine.generate([_prompt(made, parts) for parts in PROMPTS], params)
        assert [one.error for one in found] == [None] * len(PROMPTS)
        assert engine.stats()["num_encoded"] == 2, "each picture is encoded once"
    assert [one.token_ids for one in found] == [_generated(made, parts) for parts in PROMPTS]


@pytest.mark.parametrize("seed", range(2))
def test_sampled_tokens_have_the_bits_of_training(pictures: tuple[PictureModel, Any], seed: int) -> None:
    made, patched = pictures
    source = random.Random(seed)
    order = source.sample(PROMPTS * 2, 2 * len(PROMPTS))
    params = [SamplingParams(max_tokens=source.randrange(2, 12), seed=at, ignore_eos=True) for at in range(len(order))]
    with Engine(
        patched,
        max_num_seqs=3,
        max_num_batched_tokens=source.choice([24, 64]),
        block_size=source.choice([1, 4]),
        encoder_cache_size=source.choice([0, 1000]),
    ) as engine:
        found = engine.generate([_prompt(made, parts) for parts in order], params)
        engine.check_integrity()
        assert engine.stats()["prefix_cache_hits"] > 0
    assert [one.error for one in found] == [None] * len(order)
    images = [made.outputs(parts) if any(isinstance(part, str) for part in parts) else None for parts in order]
    sequences = [one.prompt_token_ids + one.token_ids for one in found]
    with torch.no_grad():
        trained = toolkit.token_logprobs(
            patched, sequences, share=bool(seed), last=[len(one.token_ids) for one in found], images=images
        )
    for one, expected in zip(found, trained, strict=True):
        assert torch.equal(torch.tensor(one.logprobs), expected), one.prompt_index


def test_a_written_tower_is_seen(pictures: tuple[PictureModel, Any]) -> None:
    made, patched = pictures
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    name, tower = next((n, p) for n, p in patched.named_parameters() if any(k in n for k in ("vis", "image", "tower")))
    before = tower.detach().clone()
    with Engine(patched) as engine:
        prompt = _prompt(made, PROMPTS[0])
        first = engine.generate(prompt, params)[0]
        with torch.no_grad():
            tower.add_(0.3)
        second, encoded = engine.generate(prompt, params)[0], engine.stats()["num_encoded"]
        with torch.no_grad():
            tower.copy_(before)
        third = engine.generate(prompt, params)[0]
    assert encoded == 4, name
    assert first.logprobs == third.logprobs
    assert first.logprobs != second.logprobs


def test_a_text_model_takes_no_pictures() -> None:
    from toolkit.testing.models import random_model

    with Engine(random_model("llama")) as engine, pytest.raises(ToolkitError, match="takes no pictures"):
        engine.generate({"input_ids": torch.tensor([[1, 2]]), "pixel_values": torch.zeros(1, 3, 4, 4)})
