"""SFT on conversations with images: what it trains on, which parameters it trains, what its checkpoints hold."""

import json

import pytest
import torch

from tests.helpers.image_models import data_url, picture, save_qwen2_vl
from tests.helpers.training_recipes import tiny_recipe
from toolkit.errors import ToolkitError
from toolkit.loading import find_source, load_model, load_processor
from toolkit.patching.multimodal.entry import entry_of
from toolkit.patching.multimodal.items import Processed
from toolkit.training.images import WithImages
from toolkit.training.loop import Trainer

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (20, 160, 40)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))
    picture(COLOURS["red"]).save(folder / "red.png")
    lines = []
    for name, colour in COLOURS.items():
        part = {"type": "image", "path": "red.png"} if name == "red" else {"type": "image_url", "image_url": {}}
        if name != "red":
            part["image_url"]["url"] = data_url(picture(colour))
        user = {"role": "user", "content": [part, {"type": "text", "text": "what is it?"}]}
        lines += [{"messages": [user, {"role": "assistant", "content": f"the {name} one"}]}] * 2
    lines += [{"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four"}]}] * 2
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def recipe(folder, output, **model):
    return tiny_recipe(
        output,
        model={"config": None, "name_or_path": str(folder), **model},
        objective={"kind": "sft", "data_files": str(folder / "data.jsonl"), "evaluation": {"val_set_size": 0.01}},
        train={"max_steps": 2, "batch_tokens": 64, "max_length": 48},
        optimizer={"learning_rate": 1e-3},
        tokenizer={},
    )


@torch.no_grad()
def stock_loss(folder, trainer, pack):
    """The mean loss of a pack by the unpatched model, one sequence at a time."""
    model, _ = load_model(folder)
    total, count = 0.0, 0
    for example in pack:
        ids = torch.tensor([example.inputs])
        inputs = {"input_ids": ids} if example.media is None else example.media
        logits = model(**inputs, use_cache=False).logits[0]
        targets = torch.tensor(example.targets)
        total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
        count += example.counted
    return total / count


def test_the_loss_is_the_unpatched_models_and_what_is_frozen_stays(folder, tmp_path, capsys):
    trainer = Trainer(recipe(folder, tmp_path, freeze_parameters=["model.visual"], trainable_parameters=["*.merger.*"]))
    assert "frozen: 2" in capsys.readouterr().out
    position = trainer.objective.state_dict()
    pack = trainer.objective.stream.next_batch()
    trainer.objective.load_state_dict(position)
    assert any(example.media is not None for example in pack)
    before = {name: value.clone() for name, value in trainer.hf_model.state_dict().items()}
    expected = stock_loss(folder, trainer, pack)
    loss, _ = trainer.train_step()
    assert loss == pytest.approx(expected, rel=1e-5)
    changed = {name for name, value in trainer.hf_model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("model.language_model.") for name in changed)
    assert any(".merger." in name for name in changed)
    assert not any(name.startswith("model.visual.") and ".merger." not in name for name in changed)
    trainer.save()
    checkpoint = tmp_path / "runs" / "tiny" / "checkpoints" / "step-000001"
    assert type(load_model(checkpoint)[0]).__name__ == "Qwen2VLForConditionalGeneration"
    assert load_processor(find_source(checkpoint)) is not None


@pytest.mark.parametrize("refused", [False, True])
def test_one_forward_of_a_batch_encodes_each_image_once_unless_its_layout_is_refused(folder, tmp_path, refused):
    trainer = Trainer(recipe(folder, tmp_path), quiet=True)
    model = trainer.hf_model
    (example,) = (one for one in trainer.objective.stream.next_batch() if one.media is not None)
    media = WithImages.on(torch.device("cpu"), [[5, 6, 7]], [example.media] * 3)
    entry = entry_of(model)
    entry.verdicts.clear()
    if refused:
        entry.verdicts[Processed.of(example.media).layout()] = "a reason"
    trainer.forward(media)  # what proves a layout runs the tower too
    calls = []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    logits = trainer.forward(media)
    assert len(calls) == (3 if refused else 1)
    stock, _ = load_model(folder)
    expected = [stock(input_ids=torch.tensor([[5, 6, 7]])).logits[0]] + [stock(**example.media).logits[0]] * 3
    assert (logits - torch.cat(expected)).abs().max() <= 1e-5 * logits.abs().max()
    logits.sum().backward()
    assert model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0


def test_towers_train_with_the_rest(folder, tmp_path):
    trainer = Trainer(recipe(folder, tmp_path), quiet=True)
    before = trainer.hf_model.state_dict()["model.visual.patch_embed.proj.weight"].clone()
    trainer.train_step()
    assert not torch.equal(trainer.hf_model.state_dict()["model.visual.patch_embed.proj.weight"], before)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"freeze_parameters": ["model.visul"]}, "model.freeze_parameters must match names of the model's parameters"),
        ({"freeze_parameters": ["*"]}, "model.freeze_parameters must leave a parameter to train"),
    ],
)
def test_patterns_that_freeze_nothing_or_everything_are_refused(folder, tmp_path, model, told):
    with pytest.raises(ToolkitError) as raised:
        Trainer(recipe(folder, tmp_path, **model), quiet=True)
    assert told in str(raised.value)


def test_a_model_without_a_processor_is_refused(folder, tmp_path):
    (other := tmp_path / "other").mkdir()
    for file in folder.iterdir():
        if "processor" not in file.name:
            (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ToolkitError, match=r"model\.name_or_path must have a processor for data with images"):
        Trainer(recipe(other, tmp_path), quiet=True)
