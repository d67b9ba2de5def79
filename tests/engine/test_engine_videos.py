"""Videos as a processor hands them over: frames of each in one run of tokens, or in a run per frame."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import toolkit
from tests.helpers.picture_models import PictureModel, noise, picture_model
from toolkit import Engine, SamplingParams

VIDEO, FRAME_TOKENS, NEW = 8, 4, 8
SIDES = {"qwen2_5_vl": 14, "qwen3_vl": 16, "qwen3_5": 16}
SWEPT = ("qwen3_vl", "qwen3_5")
KINDS = [pytest.param(kind, marks=[pytest.mark.sweep] if kind in SWEPT else []) for kind in SIDES]


def _video(kind: str, name: str, frames: int) -> tuple[list[int], Tensor]:
    """Token ids with those of every frame, and patches."""
    runs = [[9, *[VIDEO] * FRAME_TOKENS, 10]] * frames  # Qwen3-VL writes every frame's time before it
    ids = [token for at, run in enumerate(runs) for token in (40 + at, *run)]
    if kind == "qwen2_5_vl":
        ids = [9, *[VIDEO] * FRAME_TOKENS * frames, 10]
    return ids, noise(name, frames * 16, 3 * 2 * SIDES[kind] ** 2)


def outputs_of(made: PictureModel, kind: str, parts: Sequence[int | tuple[str, int] | str]) -> dict[str, Tensor]:
    """Of tokens, images by name, and videos by name and number of frames."""
    ids: list[int] = []
    videos: list[Tensor] = []
    grids: list[list[int]] = []
    images: dict[str, list[Tensor]] = {}
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        elif isinstance(part, str):
            one = made.outputs([part])
            ids += one["input_ids"][0].tolist()
            for name in ("pixel_values", "image_grid_thw"):
                images.setdefault(name, []).append(one[name])
        else:
            own, patches = _video(kind, *part)
            ids += own
            videos.append(patches)
            grids.append([part[1], 4, 4])
    tokens = torch.tensor([ids])
    types = (tokens == 7).int() + 2 * (tokens == VIDEO).int()
    found = {"input_ids": tokens, made.token_types: types, **{name: torch.cat(all_) for name, all_ in images.items()}}
    found |= {"pixel_values_videos": torch.cat(videos), "video_grid_thw": torch.tensor(grids)}
    if kind == "qwen2_5_vl":
        found["second_per_grid_ts"] = torch.ones(len(videos))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_generate_and_bits_of_training(kind: str) -> None:
    made = picture_model(kind, seed=2)  # whose tokens hold no placeholder: stock forwards want pixels for one
    prompts = [
        outputs_of(made, kind, [21, 22, ("v", 2), 23, 24]),
        outputs_of(made, kind, [21, 22, ("v", 2), 23, 25, 26]),
        outputs_of(made, kind, [21, ("w", 3), 23, 9, "a", 10, 24, ("v", 2), 31]),
    ]
    patched: Any = copy.deepcopy(made.model)
    toolkit.patch(patched)
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    with Engine(patched, max_num_batched_tokens=16, block_size=4) as engine:
        found = engine.generate(prompts, params)
        assert [one.error for one in found] == [None] * len(prompts)
        assert engine.stats()["num_encoded"] == 3, "two videos and an image, once each"
    for one, outputs in zip(found, prompts):
        assert not {7, VIDEO} & set(one.token_ids)
        ids = outputs["input_ids"]
        stock = made.model.generate(
            **outputs, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert one.token_ids == stock[0, ids.shape[1] :].tolist()
    sequences = [one.prompt_token_ids + one.token_ids for one in found]
    trained = toolkit.token_logprobs(patched, sequences, last=[NEW] * len(found), images=prompts)
    for one, expected in zip(found, trained, strict=True):
        assert torch.equal(torch.tensor(one.logprobs), expected.detach())
    sum(one.sum() for one in trained).backward()
    plain = sum(
        torch.log_softmax(
            made.model(**_continued(made, outputs, one.token_ids), use_cache=False).logits[0, -NEW - 1 : -1].double(),
            -1,
        )
        .gather(1, torch.tensor(one.token_ids)[:, None])
        .sum()
        for one, outputs in zip(found, prompts)
    )
    plain.backward()
    for (name, mine), own in zip(patched.named_parameters(), made.model.parameters(), strict=True):
        if own.grad is not None:
            assert (mine.grad - own.grad).norm() <= 1e-4 * own.grad.norm().clamp_min(1e-6), name


def _continued(made: PictureModel, outputs: dict[str, Tensor], tokens: list[int]) -> dict[str, Tensor]:
    more = torch.tensor([tokens])
    return {
        **outputs,
        "input_ids": torch.cat([outputs["input_ids"], more], 1),
        made.token_types: torch.cat([outputs[made.token_types], torch.zeros_like(more, dtype=torch.int)], 1),
    }
