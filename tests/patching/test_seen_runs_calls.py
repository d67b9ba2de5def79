"""Ordinary calls whose queries see one run of keys each take the op: pictures, packed sequences, no causality."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import toolkit
from tests.helpers.picture_models import picture_model
from tests.helpers.rowwise import seeded
from toolkit.errors import ToolkitError
from toolkit.modules import attention as attention_module
from toolkit.modules.attention import attend, keep_runs
from toolkit.patching.attention_interface import mask_function, proven_attention
from toolkit.state.context import AttentionSettings
from toolkit.testing.models import random_model


@pytest.fixture
def no_dense(monkeypatch):
    """Torch's dense attention is an error."""
    monkeypatch.setattr(attention_module, "_dense", lambda *_: pytest.fail("torch's dense attention was taken"))


def two_rows(batch):
    """The batch beside the same picture in another text, which is padded on the left."""
    ids, kinds = batch["input_ids"], next(name for name in batch if name.endswith("token_type_ids"))
    row = torch.cat([ids[:, :1].expand(-1, 3), ids[:, 4:8], ids[:, :4], ids[:, 11:]], 1)
    more = {"input_ids": torch.cat([ids, row]), "attention_mask": torch.ones(2, ids.shape[1], dtype=torch.long)}
    more["attention_mask"][1, :3] = 0
    others = {name: torch.cat([value, value]) for name, value in batch.items() if name not in ("input_ids", kinds)}
    image = ids[batch[kinds] == 1][0]
    return others | more | {kinds: (more["input_ids"] == image).to(batch[kinds].dtype)}


def run(model, batch):
    """Loss, logits of tokens, and all gradients in one vector."""
    model.zero_grad(set_to_none=True)
    # Not a sequence's first token either: it is predicted by a row of padding, which sees nothing.
    known = batch["attention_mask"] * F.pad(batch["attention_mask"], (1, -1), value=1)
    labels = batch["input_ids"].masked_fill(known == 0, -100)
    output = model(**batch, labels=labels, use_cache=False)
    logits = output.logits.detach()[batch["attention_mask"] == 1]
    output.loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return output.loss.detach(), logits, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.usefixtures("no_dense")
@pytest.mark.parametrize("family", ["gemma4", pytest.param("gemma3", marks=pytest.mark.sweep)])
def test_pictures_see_themselves(family):
    """Layers with a window that cuts the picture and without one; as eager attention has it."""
    made = picture_model(family)
    model, batch = made.model, made.outputs([21, 22, 23, 9, "a", 10, *range(31, 39)])
    for config in (model.config.text_config, model.model.language_model.config):
        config.sliding_window = 3
    batch = two_rows(batch)
    model.set_attn_implementation("eager")
    expected = run(model, batch)
    kinds = next(name for name in batch if name.endswith("token_type_ids"))
    assert not torch.allclose(run(model, batch | {kinds: torch.zeros_like(batch[kinds])})[1], expected[1])
    toolkit.patch(model)
    for got, wanted, near in zip(run(model, batch), expected, (1e-5, 1e-5, 1e-4), strict=True):
        assert float((got.double() - wanted.double()).norm() / wanted.double().norm()) < near


@pytest.mark.usefixtures("no_dense")
@pytest.mark.parametrize("family", ["gemma2", pytest.param("llama", marks=pytest.mark.sweep)])
def test_packed_sequences_have_the_bits_that_they_have_alone(family):
    model = random_model(family)
    toolkit.patch(model)
    parts = [torch.arange(3, 12)[None], torch.arange(40, 41)[None], torch.arange(20, 37)[None]]
    positions = torch.cat([torch.arange(one.shape[1]) for one in parts])[None]
    with torch.no_grad():
        packed = model(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
        alone = [model(one, use_cache=False).logits for one in parts]
    assert torch.equal(packed, torch.cat(alone, 1))


def heads(queries=6, keys=6):
    return [seeded(2, n, h, 8, dtype=torch.float32, seed=h) for n, h in ((queries, 4), (keys, 2), (keys, 2))]


def with_mask(q, k, v, mask):
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, scale=0.3, enable_gqa=True)
    return out.transpose(1, 2)


def test_a_mask_that_is_written_to_is_a_mask_like_any_other():
    q, k, v = heads()
    at = torch.arange(6)
    mask = (at[:, None] >= at).expand(2, 1, 6, 6).clone()
    keep_runs(mask)
    mask[0, 0, 5, 2] = False
    got = attend(0, q, k, v, mask, None, AttentionSettings(0.3))
    torch.testing.assert_close(got, with_mask(q, k, v, mask))


@pytest.mark.usefixtures("no_dense")
def test_inside_inference_mode_too():
    q, k, v = heads()
    with torch.inference_mode():
        picture = torch.tensor([[0, 0, 1, 1, 1, 0]] * 2)

        def see(batch, head, query, key):
            same = (picture[batch, query] == 1) & (picture[batch, key] == 1)
            return (key <= query) | same

        mask = mask_function(2, 6, 6, mask_function=see, allow_is_causal_skip=False)
        got = attend(0, q, k, v, mask, None, AttentionSettings(0.3))
    torch.testing.assert_close(got, with_mask(q, k, v, mask))


@pytest.mark.usefixtures("no_dense")
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (3, 7)])
def test_without_causality_every_key_is_seen(queries, keys):
    q, k, v = heads(queries, keys)
    module = SimpleNamespace(is_causal=False)
    inputs = [x.transpose(1, 2) for x in (q, k, v)]
    out, weights = proven_attention(module, *inputs, None, scaling=0.3)
    torch.testing.assert_close(out, with_mask(q, k, v, None))
    assert weights is None
    with pytest.raises(ToolkitError, match="for a causal mask"):
        proven_attention(module, *inputs, torch.ones(2, keys, dtype=torch.bool), scaling=0.3)


@pytest.mark.usefixtures("no_dense")
def test_padding_of_an_encoder_gives_what_torch_gives():
    q, k, v = heads()
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    mask = mask_function(
        2, 6, 6, attention_mask=padding.bool(), mask_function=lambda b, h, q, k: q >= 0, allow_is_causal_skip=False
    )
    got, _ = proven_attention(
        SimpleNamespace(is_causal=False), *(x.transpose(1, 2) for x in (q, k, v)), mask, scaling=0.3
    )
    torch.testing.assert_close(got, with_mask(q, k, v, mask))
