"""Labels of a patched model's call: what is ignored, what is refused, and calls in which none counts."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

import toolkit
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model
from toolkit.testing.oracle import eager
from toolkit.training.long_sequence import backward_in_chunks

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def pair(dtype: torch.dtype = torch.float32, numerics: str = "bitwise", family: str = "llama"):
    """A stock model and a patched copy."""
    stock = eager(random_model(family, hidden=32, vocabulary=97).to(dtype)).train()
    model = copy.deepcopy(stock)
    toolkit.patch(model, numerics=numerics)
    return stock, model


def trained(model, labels, **settings):
    """Loss and gradients, then one step of AdamW on them."""
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)  # a smaller one is 0 in float16
    loss = model(input_ids=IDS, labels=labels, **settings).loss
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    return loss.detach(), gradients


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
def test_no_nan_is_on_the_way_of_a_gradient_without_labels(count):
    """Anomaly detection is silent, also where the caller replaces the loss, which is NaN."""
    stock, model = pair()
    for repair in (lambda loss: loss, torch.nan_to_num):
        for one in (stock, model) if count is None else (model,):  # stock divides 0 by 0 in its gradient otherwise
            with torch.autograd.detect_anomaly():
                repair(one(input_ids=IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=count).loss).backward()
            assert all(not parameter.grad.any() for parameter in one.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numerics", ["bitwise", "fast"])
@pytest.mark.parametrize("settings", [{}, {"num_items_in_batch": torch.tensor(0)}, {"num_items_in_batch": 7}])
def test_a_call_without_a_label_keeps_the_weights(dtype, numerics, settings):
    stock, model = pair(dtype, numerics)
    nothing = torch.full_like(IDS, -100)
    (wanted, zeros), (loss, gradients) = (trained(one, nothing, **settings) for one in (stock, model))
    torch.testing.assert_close(loss, wanted.to(loss.dtype), equal_nan=True)
    for ours, theirs in zip(gradients, zeros, strict=True):
        assert torch.equal(ours, torch.zeros_like(ours))
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_accumulation_with_one_empty_batch_and_an_empty_step():
    """As transformers' Trainer counts: labels of the whole step divide each batch's sum."""
    stock, model = pair()
    nothing = torch.full_like(IDS, -100)
    for batches in ((IDS, nothing), (nothing, nothing)):
        count = sum((one[:, 1:] != -100).sum() for one in batches)
        found = []
        for one in (stock, model):
            one.zero_grad()
            for labels in batches:
                one(input_ids=IDS, labels=labels, num_items_in_batch=count).loss.backward()
            found.append([parameter.grad.clone() for parameter in one.parameters()])
        for wanted, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_in_transformers_trainer(tmp_path):
    """Steps of two batches, of which one or both have no label: the weights of the unpatched Trainer."""
    rows = [{"input_ids": IDS[0], "labels": IDS[0] if at in (1, 4) else IDS[0] * 0 - 100} for at in range(6)]
    ends = []
    for model in pair():
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=3,
            learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer._get_train_sampler = lambda *_: None  # rows in order
        trainer.train()
        ends.append(model.state_dict())
    for name, wanted in ends[0].items():
        torch.testing.assert_close(ends[1][name], wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, -99, -101, -200, 97, 2**40])
def test_a_label_that_is_no_token_is_refused(wrong):
    stock, model = pair()
    labels = IDS.clone()
    labels[1, 4] = wrong
    with pytest.raises(IndexError):
        stock(input_ids=IDS, labels=labels)
    sentence = rf"labels must be -100 or a token id from 0 to 96, got {wrong}\."
    for call in (
        lambda: model(input_ids=IDS, labels=labels),
        lambda: model(input_ids=IDS, labels=labels, num_items_in_batch=16),
        lambda: model(input_ids=IDS, labels=labels, shift_labels=labels),
        lambda: model.eval()(input_ids=IDS, labels=labels),
    ):
        with pytest.raises(ToolkitError, match=sentence):
            call()
    with pytest.raises(ToolkitError, match="must be -100 or a token id from 0 to 96"):
        backward_in_chunks(model, IDS[1], targets=labels[1])


@pytest.mark.parametrize("ignored", [-1, 5, -200])
def test_a_caller_chooses_what_is_ignored(ignored):
    """As stock: any number, token ids included; -100 is no label then."""
    stock, model = pair()
    labels = IDS.clone()
    labels[0, 2:6] = ignored
    wanted, exact = trained(stock, labels, ignore_index=ignored)
    loss, gradients = trained(model, labels, ignore_index=ignored)
    torch.testing.assert_close(loss, wanted)
    for ours, theirs in zip(gradients, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    labels[0, 0:2] = -100
    for one, error in ((stock, IndexError), (model, ToolkitError)):
        with pytest.raises(error):
            one(input_ids=IDS, labels=labels, ignore_index=ignored)
