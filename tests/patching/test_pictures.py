"""Images in patched models: log-probabilities and gradients of the model's own forward, computed once per image."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import toolkit
from tests.helpers.picture_models import IMAGE, KINDS, PictureModel, picture_model
from toolkit.errors import ToolkitError
from toolkit.patching.multimodal import check, encode, expand, span_layers
from toolkit.patching.multimodal.entry import entry_of, find_entry
from toolkit.testing.models import random_model

FAST = ("qwen3_vl", "gemma3", "llava")
Parts = list[int | str]
# One prompt with two completions, the same images in another order, one at the very start, and none at all.
BATCH: list[Parts] = [
    [21, 22, 9, "a", 10, 23, "bb", 24, 25, 26],
    [21, 22, 9, "a", 10, 23, "bb", 24, 27],
    [31, "bb", 10, 9, "a", 32, 33],
    ["a", 34, 35],
    [36, 37, 38, 39],
]


@cache
def models(kind: str) -> tuple[PictureModel, Any]:
    """A stock model, and a patched one of the same weights."""
    made = picture_model(kind)
    patched = copy.deepcopy(made.model)
    toolkit.patch(patched)
    return made, patched


@pytest.fixture(params=[pytest.param(k, marks=[] if k in FAST else [pytest.mark.sweep]) for k in KINDS])
def pictures(request: pytest.FixtureRequest) -> tuple[PictureModel, Any]:
    return models(request.param)


def own_logprobs(made: PictureModel, parts: Parts) -> Tensor:
    outputs = made.outputs(parts)
    if IMAGE not in outputs["input_ids"]:
        types = {made.token_types: torch.zeros_like(outputs["input_ids"])} if made.token_types else {}
        outputs = {"input_ids": outputs["input_ids"], **types}
    logits = made.model(**outputs, use_cache=False).logits[0].float()
    return logits[:-1].log_softmax(-1).gather(1, outputs["input_ids"][0, 1:, None])[:, 0]


def loss(values: list[Tensor]) -> Tensor:
    return sum((one * torch.linspace(-1, 2, len(one))).sum() for one in values)  # type: ignore[return-value]


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def check_gradients(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    scale = max(float(value.norm()) for value in other.values())
    for name, value in other.items():
        # Those that cancel to nothing (a bias before a softmax) are compared on the scale of the others.
        bound = tolerance * max(float(value.norm()), 1e-3 * scale)
        given = one.get(name, torch.zeros_like(value))
        assert float((given - value).norm()) <= bound, name


def ids_of(made: PictureModel, parts: Parts) -> list[int]:
    return made.outputs(parts)["input_ids"][0].tolist()  # type: ignore[no-any-return]


def test_a_batch_is_the_models_own_forward_of_each_sequence(pictures: tuple[PictureModel, Any]) -> None:
    made, patched = pictures
    own = [own_logprobs(made, parts) for parts in BATCH]
    loss(own).backward()
    expected = gradients(made.model)
    found: dict[bool, list[Tensor]] = {}
    for share in (True, False):
        images = [made.outputs(parts) if "a" in parts else None for parts in BATCH]
        values = toolkit.token_logprobs(patched, [ids_of(made, parts) for parts in BATCH], share, images=images)
        found[share] = [one.detach() for one in values]
        loss(values).backward()
        check_gradients(gradients(patched), expected, 2e-5)
        for one, other in zip(values, own, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    for one, other in zip(found[True], found[False], strict=True):
        assert torch.equal(one, other)


def test_the_tower_runs_once_for_each_distinct_image(pictures: tuple[PictureModel, Any]) -> None:
    made, patched = pictures
    outputs = made.outputs([21, 9, "a", 10, 22, "bb", 23])
    prompt = outputs["input_ids"][0].tolist()
    sequences = [[*prompt, 24 + at, 25] for at in range(8)]
    towers = [
        one
        for name, one in patched.named_modules()
        if name.split(".")[-1] in ("visual", "vision_tower", "vision_model")
    ]
    counts = {"forward": 0, "backward": 0}

    def count(which: str) -> Any:
        def add(*_: Any) -> None:
            counts[which] += 1

        return add

    toolkit.token_logprobs(patched, sequences[:1], images=[outputs])  # its proof runs the tower more often
    handles = [towers[0].register_forward_hook(count("forward"))]
    leaf = next(p for p in towers[0].parameters() if p.requires_grad)
    handles.append(leaf.register_hook(count("backward")))
    values = toolkit.token_logprobs(patched, sequences, images=[outputs] * 8)
    loss(values).backward()
    for handle in handles:
        handle.remove()
    gradients(patched)
    # A parameter's hook runs once per backward, when the gradients of all its uses have been summed.
    assert counts == {"forward": 2, "backward": 1}


def test_features_are_the_same_with_and_without_gradients(pictures: tuple[PictureModel, Any]) -> None:
    made, patched = pictures
    item = next(iter(expand(patched, made.outputs([21, "a", 22])).items.values()))
    given = encode(patched, item)
    with torch.no_grad():
        again = encode(patched, item)
    assert torch.equal(given.rows, again.rows)
    assert given.rows.requires_grad
    assert not again.rows.requires_grad


def test_positions_continue_after_a_prompt_as_the_model_counts_them() -> None:
    made, patched = models("qwen3_vl")
    outputs = made.outputs([21, "bb", 22, "a", 23])
    prompt = outputs["input_ids"][0].tolist()
    short, long = expand(patched, outputs), expand(patched, outputs, [*prompt, 24, 25])
    own, delta = patched.model.get_rope_index(**{k: v for k, v in outputs.items() if k != "pixel_values"})
    assert short.positions is not None
    assert torch.equal(short.positions, own[:, 0])
    assert short.delta == long.delta == int(delta)
    assert long.positions is not None
    assert long.positions[:, len(prompt) :].tolist() == [[len(prompt) + short.delta, len(prompt) + 1 + short.delta]] * 3
    assert patched.model.rope_deltas is None  # the proof leaves nothing for a decode to find


def test_layers_that_see_ahead_are_found() -> None:
    made, patched = models("gemma3")
    # Images side by side see each other, as in the model's own mask.
    parts: Parts = [21, "a", "b", 22, 23]
    outputs = made.outputs(parts)
    assert all(span.bidirectional for span in expand(patched, outputs).spans)
    assert span_layers(patched) == {0, 1}
    with torch.no_grad():
        found = toolkit.token_logprobs(patched, [outputs["input_ids"][0]], images=[outputs])[0]
        torch.testing.assert_close(found, own_logprobs(made, parts), rtol=0, atol=2e-5)


def test_a_placeholder_without_an_image_is_its_embedding() -> None:
    made, patched = models("llava")
    outputs = made.outputs([21, "a", 22])
    sequence = [*outputs["input_ids"][0].tolist(), IMAGE, 23]  # as sampled
    with torch.no_grad():
        embeddings = made.model.get_input_embeddings()(torch.tensor([sequence]))
        embeddings[0, 1:5] = made.model.get_image_features(outputs["pixel_values"]).pooler_output[0]
        logits = made.model(inputs_embeds=embeddings, use_cache=False).logits[0]
        expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(sequence)[1:, None])[:, 0]
    found = toolkit.token_logprobs(patched, [sequence], images=[outputs])[0]
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=2e-5)


def test_what_cannot_be_proven_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    made, patched = models("qwen3_vl")
    entry = entry_of(patched)
    assert entry is not None
    outputs = made.outputs([21, "a", 22])
    sequence = outputs["input_ids"][0].tolist()
    monkeypatch.setattr(entry, "verdicts", {})
    # As if the model counted otherwise in its forward than by its method.
    monkeypatch.setattr(check, "positions_of", lambda *_: (torch.zeros(3, len(sequence), dtype=torch.int64), 0))
    for _ in range(2):
        with pytest.raises(
            ToolkitError, match="must be proven for a ragged batch, got: the model's own forward has other"
        ):
            toolkit.token_logprobs(patched, [sequence], images=[outputs])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: {**out, "input_ids": out["input_ids"].expand(2, -1)}, r"must have shape \[1, tokens\], got \[2"),
        (lambda out: {**out, "attention_mask": torch.zeros_like(out["input_ids"])}, "must be all ones, got padding"),
        (lambda out: {**out, "input_ids": out["input_ids"] + 1}, "must begin with the processor's input_ids"),
    ],
)
def test_outputs_that_do_not_fit_are_named(change: Any, message: str) -> None:
    made, patched = models("llava")
    outputs = made.outputs([21, "a", 22])
    with pytest.raises(ToolkitError, match=message):
        toolkit.token_logprobs(patched, [outputs["input_ids"][0].tolist()], images=[change(outputs)])


def test_a_text_model_takes_no_images() -> None:
    model = random_model("llama")
    toolkit.patch(model)
    outputs = {"input_ids": torch.tensor([[5, 6]]), "pixel_values": torch.zeros(1, 3, 8, 8)}
    with pytest.raises(ToolkitError, match="images must be None for LlamaForCausalLM"):
        toolkit.token_logprobs(model, [[5, 6]], images=[outputs])


def test_a_patch_is_taken_back() -> None:
    _, patched = models("llava")
    other = copy.deepcopy(patched)
    found = find_entry(other)
    assert found is not None
    assert entry_of(other) is not None
    toolkit.unpatch(other)
    assert not found[1]._forward_pre_hooks
    assert entry_of(patched) is not None
