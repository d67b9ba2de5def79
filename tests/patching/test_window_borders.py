"""Windows and chunks whose real sizes no probe is as long as: masks are asked at their real borders."""

import pytest
import torch
from transformers import AutoConfig
from transformers.masking_utils import create_causal_mask, sliding_window_overlay
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.llama4 import modeling_llama4
from transformers.models.mistral import modeling_mistral

import toolkit
from toolkit.patching.mask_borders import BOTH_SIDES, CAUSAL, CHUNKS, border_reason
from toolkit.testing.architectures import small_model
from toolkit.testing.models import from_config

WINDOW = 4096
COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 131_072,
}  # fmt: skip
MISTRAL = {"sliding_window": WINDOW}
QWEN2 = {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
LLAMA4 = {
    "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "no_rope_layers": [1, 0],
    "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": WINDOW,
}  # fmt: skip


def model_of(name, settings):
    return from_config(AutoConfig.for_model(name, **COMMON, **settings))


def attention(model):
    """The reasons why layers are skipped, and the ops of those that are claimed."""
    report = toolkit.patch(model)
    found = {one.reason for one in report.skipped if one.role == "attention"}
    return found, {one.op for one in report.claims if one.role == "attention" and one.path}


@pytest.mark.parametrize(("name", "settings"), [("mistral", MISTRAL), ("qwen2", QWEN2), ("llama4_text", LLAMA4)])
def test_thousands_of_tokens_are_no_obstacle(name, settings):
    reasons, ops = attention(model_of(name, settings))
    assert not reasons
    assert any("chunks" in op for op in ops) == (name == "llama4_text")


@pytest.mark.parametrize("step", [-1, 1])
def test_a_layer_whose_window_is_one_token_off_its_mask(step):
    """Eager attention reads the mask, and a ragged batch would read the layer's window."""
    model = model_of("qwen2", QWEN2)
    model.model.layers[1].self_attn.sliding_window += step
    reasons, ops = attention(model)
    # One token more is that of a configuration without the token itself, whose masks show it: a probe sees that.
    why = f"with a window of {WINDOW + step}" if step < 0 else "the interface changes it"
    assert any(why in reason for reason in reasons)
    assert not ops


@pytest.mark.parametrize("step", [-1, 1])
def test_a_mask_that_is_one_token_off_at_its_real_size(step, monkeypatch):
    """With the short windows of a probe it is right."""

    def own(config, *args, **kwargs):
        size = config.sliding_window + (step if config.sliding_window == WINDOW else 0)
        return create_causal_mask(config, *args, **kwargs, and_mask_function=sliding_window_overlay(size))

    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", own)
    reasons, ops = attention(model_of("mistral", MISTRAL))
    assert reasons
    assert not ops
    assert all(f"with a window of {WINDOW}" in reason for reason in reasons)


def test_a_window_in_the_mask_alone_that_begins_far_behind_a_probe(monkeypatch):
    def own(config, *args, **kwargs):
        return create_causal_mask(config, *args, **kwargs, and_mask_function=sliding_window_overlay(config.far))

    monkeypatch.setattr(modeling_mistral, "create_causal_mask", own)
    reasons, ops = attention(model_of("mistral", {"sliding_window": None, "far": 9000}))
    assert reasons
    assert not ops
    assert all("which is not causal attention" in reason for reason in reasons)


def test_chunks_that_are_one_token_off_at_their_real_size(monkeypatch):
    make = modeling_llama4.create_chunked_causal_mask

    def own(config, *args, **kwargs):
        size = config.attention_chunk_size
        config.attention_chunk_size = size + (size == WINDOW)
        try:
            return make(config, *args, **kwargs)
        finally:
            config.attention_chunk_size = size

    monkeypatch.setattr(modeling_llama4, "create_chunked_causal_mask", own)
    reasons, _ = attention(model_of("llama4_text", LLAMA4))
    assert any(f"not attention in chunks with a window of {WINDOW}" in reason for reason in reasons)


class Windowed(BloomAttention):
    """Its own code adds a window to the mask that it is handed."""

    def forward(self, hidden_states, residual, alibi, attention_mask, **kwargs):
        at = torch.arange(attention_mask.shape[-1])
        hidden = at[None] <= at[:, None] - self.shown()
        mask = attention_mask.masked_fill(hidden, torch.finfo(attention_mask.dtype).min)
        return super().forward(hidden_states, residual, alibi, mask, **kwargs)

    def shown(self):
        return self.sliding_window + self.more


@pytest.mark.parametrize("more", [0, 1])
def test_a_window_that_a_layer_writes_out(more):
    model = small_model("bloom")
    model.config.sliding_window = WINDOW
    for layer in model.transformer.h:
        layer.self_attention.__class__ = Windowed
        layer.self_attention.sliding_window, layer.self_attention.more = WINDOW, more
    reasons, ops = attention(model)
    assert bool(reasons) == bool(more)
    assert any("its window is" in reason for reason in reasons) == bool(more)
    assert bool(ops) == (not more)


SHOWN = {
    CAUSAL: lambda q, k, size: (k <= q) & (q - k < size),
    CHUNKS: lambda q, k, size: (k <= q) & (k // size == q // size),
    BOTH_SIDES: lambda q, k, size: (q - k < size) & (k - q < size),
}


@pytest.mark.parametrize("window", [1, 5, 4096])
@pytest.mark.parametrize("kind", SHOWN)
def test_every_other_size_is_another_mask(window, kind):
    """By the definitions of the masks, in integers."""
    for size in (window - 1, window, window + 1):
        for other, shown in SHOWN.items():
            if size:
                reason = border_reason(lambda b, h, q, k: shown(q, k, size), window, None, torch.device("cpu"), kind)  # noqa: B023
                # A token that sees itself alone is that by every definition.
                assert (reason is None) == (size == window and (kind == other or window == 1)), (size, other, reason)
