"""Role encoder_attention: a tower's layers, whose tokens all see each other, take the op where each is proven."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, SiglipVisionConfig, SiglipVisionModel

import toolkit
from tests.helpers.picture_models import ORDINARY, picture_model
from tests.helpers.rowwise import seeded
from toolkit.errors import ToolkitError
from toolkit.modules import attention as attention_module
from toolkit.modules.attention import read_runs
from toolkit.patching.attention_configs import FIELD, attention_configs, eager_modules
from toolkit.patching.roles import DEFAULT_ROLES

ROLES = ["default", "encoder_attention"]
FAST = ("qwen3_vl", "mistral3", "smolvlm")
ALL = [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.sweep) for kind in ORDINARY]
TEXT = [21, 22, 23, 9, "a", 10, 31, 32, 9, "bb", 10, *range(33, 39)]
TYPES = ("input_ids", "token_type_ids", "mm_token_type_ids")


def tower_layers(model):
    """Paths of attention layers outside of the text part."""
    text = model.config.get_text_config()
    return {
        path
        for path, module in model.named_modules()
        if type(module).__name__.endswith("Attention") and getattr(module, "config", text) is not text
    }


def run(model, batch):
    """Loss and all gradients; those of the tower are a separate vector too."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
    loss.backward()
    found = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
    tower = [grad for name, grad in found.items() if "vis" in name]
    return loss.detach(), torch.cat(list(found.values())), torch.cat(tower)


def in_float64(batch):
    """The batch with its numbers in float64."""
    return {name: one.double() if one.is_floating_point() else one for name, one in batch.items()}


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def implementations(model):
    return [getattr(config, FIELD) for config in attention_configs(model)]


@pytest.mark.parametrize("kind", ALL)
def test_a_tower_that_is_taken_has_the_loss_and_gradients_of_eager_modules(kind):
    made = picture_model(kind)
    model, batch = made.model, made.outputs(TEXT)
    with eager_modules(model):
        expected = run(model, batch)
        exact = run(copy.deepcopy(model).double(), in_float64(batch))
    before = implementations(model)
    report = toolkit.patch(model, ROLES)
    assert {claim.path for claim in report.claims if claim.role == "encoder_attention"} == tower_layers(model) != set()
    for got, eager, wanted in zip(run(model, batch), expected, exact, strict=True):
        assert relative(got, wanted) < max(1e-5, 2 * relative(eager, wanted))
    toolkit.unpatch(model)
    assert implementations(model) == before


def features(model, **pixels):
    with torch.no_grad():
        return list(model.get_image_features(**pixels).pooler_output)


def test_packed_images_of_pixtral_do_not_depend_on_each_other(monkeypatch):
    """Each image is a block of one long row, which dense attention would add up in another order."""
    model = picture_model("mistral3").model
    toolkit.patch(model, ROLES)
    monkeypatch.setattr(attention_module, "_dense", lambda *_: pytest.fail("torch's dense attention was taken"))
    sizes = torch.tensor([[56, 84], [112, 112], [84, 56]])
    pixels = seeded(3, 3, 112, 112, dtype=torch.float32)
    together = features(model, pixel_values=pixels, image_sizes=sizes)
    for at, size in enumerate(sizes):
        (alone,) = features(model, pixel_values=pixels[at : at + 1], image_sizes=size[None])
        assert torch.equal(together[at], alone)


@pytest.mark.parametrize("kind", ["llava", *(pytest.param(k, marks=pytest.mark.sweep) for k in ("gemma3", "internvl"))])
def test_images_of_a_batch_do_not_depend_on_each_other(kind):
    model = picture_model(kind).model
    toolkit.patch(model, ROLES)
    side = 56 if kind == "internvl" else 32
    pixels = seeded(5, 3, side, side, dtype=torch.float32)
    together = features(model, pixel_values=pixels)
    for at in range(5):
        assert torch.equal(together[at], features(model, pixel_values=pixels[at : at + 1])[0])


@pytest.mark.parametrize("kind", ["qwen3_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.sweep)])
def test_images_of_a_packed_row_do_not_depend_on_each_other(kind):
    made = picture_model(kind)
    toolkit.patch(made.model, ROLES)

    def of(*names):
        return features(made.model, **{k: v for k, v in made.outputs(names).items() if k not in TYPES})

    together = of("ccc", "a", "eeeee")
    for at, name in enumerate(("ccc", "a", "eeeee")):
        assert torch.equal(together[at], of(name)[0])


def test_padded_patches_see_no_padding():
    """As SigLIP 2 masks patches: some images have fewer than others."""
    made = picture_model("lfm2_vl")
    model = made.model
    toolkit.patch(model, ROLES)
    shapes, known = torch.tensor([[4, 4], [2, 4]]), torch.ones(2, 16, dtype=torch.long)
    known[1, 8:] = 0
    pixels = seeded(2, 16, 3 * 64, dtype=torch.float32)
    together = features(model, pixel_values=pixels, spatial_shapes=shapes, pixel_attention_mask=known)
    noisy = pixels.clone()
    noisy[1, 8:] = 99.0
    again = features(model, pixel_values=noisy, spatial_shapes=shapes, pixel_attention_mask=known)
    for at in range(2):
        mask = known[at : at + 1]
        (alone,) = features(
            model, pixel_values=pixels[at : at + 1], spatial_shapes=shapes[at : at + 1], pixel_attention_mask=mask
        )
        assert torch.equal(together[at], alone)
        assert torch.equal(together[at], again[at])


@pytest.mark.parametrize("kind", ["llava", pytest.param("mistral3", marks=pytest.mark.sweep)])
def test_ragged_batches_and_checkpointing_have_the_tower_too(kind):
    made = picture_model(kind)
    model, outputs = made.model, made.outputs(TEXT)
    with eager_modules(model):
        expected = run(model, outputs)
        with torch.no_grad():
            logits = model(**outputs, use_cache=False).logits[0, :-1]
    ids = outputs["input_ids"]
    wanted = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    toolkit.patch(model, ROLES)
    with torch.no_grad():
        (found,) = toolkit.token_logprobs(model, [ids[0].tolist()], images=[outputs])
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    model.train()
    model.gradient_checkpointing_enable()
    for got, other in zip(run(model, outputs), expected, strict=True):
        assert relative(got, other) < 1e-5


def test_attention_weights_are_those_of_eager_modules():
    model = SiglipVisionModel(siglip())
    pixels = seeded(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad(), eager_modules(model):
        expected = model(pixels, output_attentions=True).attentions
    toolkit.patch(model, ["encoder_attention"])
    with torch.no_grad():
        found = model(pixels, output_attentions=True).attentions
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def siglip():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SiglipVisionConfig(**sizes, image_size=32, patch_size=8)


def test_a_tower_in_bfloat16_is_as_close_to_float32_as_eager_modules():
    model = SiglipVisionModel(siglip())
    pixels = seeded(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad(), eager_modules(model):
        model.bfloat16()
        narrow = model(pixels.bfloat16()).last_hidden_state
        exact = copy.deepcopy(model).float()(pixels.bfloat16().float()).last_hidden_state
    report = toolkit.patch(model, ["encoder_attention"])
    assert report.roles() == {"encoder_attention": 2}
    with torch.no_grad():
        found = model(pixels.bfloat16()).last_hidden_state
    assert relative(found, exact) < 1.2 * relative(narrow, exact)


def scaled(layer):
    """A layer whose forward is not what it hands to eager attention: it knows the interface's name."""

    class Scaled(type(layer)):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            out, weights = super().forward(hidden_states, attention_mask, **kwargs)
            return (out if self.config._attn_implementation == "eager" else out * 1.01), weights

    layer.__class__ = Scaled


def needy(layer):
    """A layer that asks for something that no probe knows."""

    class Needy(type(layer)):
        def forward(self, hidden_states, grid, attention_mask=None, **kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)

    layer.__class__ = Needy


def holed(layer):
    """A layer that hides nothing where the interface hands it a mask with holes."""

    class Holed(type(layer)):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            if attention_mask is not None and attention_mask.dtype == torch.bool:
                attention_mask = None
            return super().forward(hidden_states, attention_mask, **kwargs)

    layer.__class__ = Holed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (scaled, "the interface changes it: probe error"),
        (needy, "its forward asks for grid, which a probe does not know"),
        (holed, "the interface changes it: probe error .* with padding"),
    ],
)
def test_a_layer_that_is_not_proven_leaves_all_of_its_tower_alone(change, reason):
    model = picture_model("llava").model
    layer = next(m for n, m in model.named_modules() if n.endswith("vision_tower.encoder.layers.1.self_attn"))
    change(layer)
    with pytest.raises(ToolkitError, match=rf"LlavaForConditionalGeneration can take it: .*{reason}"):
        toolkit.patch(model, ["encoder_attention"])
    assert layer.config._attn_implementation == "sdpa"
    with pytest.raises(
        ToolkitError, match=r"others of its configuration keep their own attention: .*layers\.1\.self_attn"
    ):
        toolkit.patch(model, ["encoder_attention"])


def test_a_tower_of_another_configuration_is_taken_beside_one_that_is_not_proven():
    model = SiglipVisionModel(siglip())
    first, second = (m for n, m in model.named_modules() if n.endswith("self_attn"))
    second.config = copy.deepcopy(second.config)
    scaled(second)
    report = toolkit.patch(model, ["encoder_attention"])
    assert [claim.module for claim in report.claims] == [first]
    assert [skipped.path.split(".")[-2] for skipped in report.skipped] == ["1"]
    assert (first.config._attn_implementation, second.config._attn_implementation) == ("toolkit", "sdpa")


def test_other_modules_of_the_configuration_keep_their_own():
    """An attention layer that is causal is not the role's, and continues as before."""
    model = SiglipVisionModel(siglip())
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.self_attn"))
    model.spare = copy.deepcopy(layer)
    model.spare.config, model.spare.is_causal = layer.config, True
    hidden = seeded(2, 7, 32, dtype=torch.float32)
    with torch.no_grad():
        expected = model.spare(hidden)[0]
        toolkit.patch(model, ["encoder_attention"])
        assert torch.equal(model.spare(hidden)[0], expected)


def test_a_changed_implementation_is_named():
    model = SiglipVisionModel(siglip())
    toolkit.patch(model, ["encoder_attention"])
    model.set_attn_implementation("sdpa")
    with pytest.raises(ToolkitError, match=r"config\._attn_implementation .* got 'sdpa'; call toolkit.patch"):
        model(seeded(1, 3, 32, 32, dtype=torch.float32))


def test_the_role_is_asked_for():
    assert "encoder_attention" not in DEFAULT_ROLES
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, vocab_size=97))
    # A text reaches an encoder of text: its layers have role attention.
    with pytest.raises(ToolkitError, match="roles has 'encoder_attention', but no module of BertModel can take it"):
        toolkit.patch(model, ROLES)
    with pytest.raises(ToolkitError, match=r"roles must be one of .*, got 'defaults'; did you mean 'default'"):
        toolkit.patch(model, ["defaults"])
    assert toolkit.patch(model, ["default"]).roles() == toolkit.patch(model).roles()


def blocks(kept=None):
    image = torch.tensor([0, 0, 0, 1, 1, 1])
    mask = torch.zeros(1, 1, 6, 6).masked_fill(image[:, None] != image, torch.finfo(torch.float32).min)
    return mask if kept is None else kept(mask)


@pytest.mark.parametrize(
    ("mask", "taken"),
    [
        (blocks(), True),
        (blocks(lambda m: m == 0), True),
        (blocks(lambda m: m.clamp(min=-1.0)), False),  # a bias
        (blocks(lambda m: nn.Parameter(m)), False),  # which may learn
        (blocks(lambda m: m.index_fill(2, torch.tensor([1]), torch.finfo(torch.float32).min)), False),  # sees nothing
        (blocks(lambda m: m.index_fill(3, torch.tensor([1]), torch.finfo(torch.float32).min)), False),  # holes
    ],
    ids=["blocks", "boolean", "bias", "parameter", "nothing", "holes"],
)
def test_masks_that_a_model_adds_are_read_where_they_say_no_more_than_runs(mask, taken):
    read_runs(mask)
    assert (attention_module._kept_runs(mask, 1, 6, 6) is not None) == taken
    with torch.no_grad():
        mask[0, 0, 2, 0] = 0  # somebody writes to it
    assert attention_module._kept_runs(mask, 1, 6, 6) is None
