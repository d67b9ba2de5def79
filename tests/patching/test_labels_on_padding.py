"""Labels that count on padding behind the tokens, as ``labels=input_ids`` of a padded batch has: stock counts them."""

import copy

import peft
import pytest
import torch

import toolkit
from tests.train_patches.test_peft import relative
from toolkit.testing.models import random_model

IDS = torch.randint(3, 331, (3, 13), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[1, 9:], MASK[2, 5:] = 0, 0


def loss_and_gradients(model, labels, **arguments):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=IDS, attention_mask=MASK, labels=labels, use_cache=False, **arguments).loss
    loss.backward()
    return loss.detach(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_next", "lfm2", "deepseek_v3_moe", "mamba2"])
def test_they_count_as_in_the_unpatched_model(family):
    stock = random_model(family)
    model = copy.deepcopy(stock)
    toolkit.patch(model)
    ignored = IDS.masked_fill(MASK == 0, -100)
    for labels in (IDS, ignored, IDS):  # the second call leaves padding out again
        expected_loss, expected = loss_and_gradients(stock, labels)
        loss, gradients = loss_and_gradients(model, labels)
        assert relative(loss, expected_loss) < 2e-6
        assert max(relative(gradients[name], expected[name]) for name in expected) < 2e-4


def test_of_a_classifier_of_tokens_too():
    from transformers import LlamaConfig, LlamaForTokenClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    stock = LlamaForTokenClassification(LlamaConfig(vocab_size=331, num_labels=3, **sizes)).eval()
    model = copy.deepcopy(stock)
    toolkit.patch(model)
    labels = IDS % 3
    expected = stock(input_ids=IDS, attention_mask=MASK, labels=labels).loss
    assert relative(model(input_ids=IDS, attention_mask=MASK, labels=labels).loss, expected) < 2e-6


@pytest.mark.parametrize("wrapped", [False, True])
def test_through_adapters_and_positional_arguments(wrapped):
    stock = random_model("llama")
    if wrapped:
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        stock = peft.get_peft_model(stock, config).eval()
    model = copy.deepcopy(stock)
    toolkit.patch(model)
    with torch.no_grad():
        assert relative(model(IDS, MASK, labels=IDS).loss, stock(IDS, MASK, labels=IDS).loss) < 2e-6
        shifted = {"labels": IDS, "shift_labels": IDS.roll(-1, 1)}
        expected = stock(input_ids=IDS, attention_mask=MASK, **shifted).loss
        assert relative(model(input_ids=IDS, attention_mask=MASK, **shifted).loss, expected) < 2e-6


def test_a_patch_leaves_no_hook():
    model = random_model("llama")
    toolkit.patch(model)
    toolkit.patch(model)
    assert len(model._forward_pre_hooks) == 1
    copied = copy.deepcopy(model)
    toolkit.unpatch(copied)
    toolkit.unpatch(model)
    assert not model._forward_pre_hooks
    assert not copied._forward_pre_hooks
