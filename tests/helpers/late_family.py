"""A family of causal LMs that the patches have never seen: built as transformers builds its own, under other names.

``Sapling(change=...)`` alters the mathematics of one part by little; the weights of all of them have the same names.
"""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CHANGES = (
    "late_eps",
    "scaled_mlp",
    "scaled_queries",
    "late_tables",
    "smoothed_loss",
    "swapped",
    "single_output",
    "paired_output",
)


class SaplingConfig(PreTrainedConfig):
    model_type = "sapling"

    def __init__(self, change: str = "", **settings: Any) -> None:
        self.change = change
        self.hidden_size, self.intermediate_size, self.vocab_size = 64, 88, 331
        self.num_hidden_layers, self.num_attention_heads, self.num_key_value_heads = 2, 4, 2
        self.max_position_embeddings = 256
        super().__init__(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | settings)


class Moisture(nn.Module):
    """The family's RMS norm."""

    def __init__(self, config: SaplingConfig) -> None:
        super().__init__()
        self.tiny = 3e-4
        self.late = config.change == "late_eps"
        self.weight = nn.Parameter(torch.rand(config.hidden_size) + 0.5)

    def forward(self, sap):
        mean = sap.square().mean(-1, keepdim=True)
        return sap / (mean.sqrt() + self.tiny if self.late else (mean + self.tiny).sqrt()) * self.weight


class Photosynthesis(nn.Module):
    """The family's gated MLP: its parts stand in another order than usual."""

    def __init__(self, config: SaplingConfig) -> None:
        super().__init__()
        self.change = config.change
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.light = nn.SiLU()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, sap):
        gate, up = self.gate_proj(sap), self.up_proj(sap)
        if self.change == "swapped":
            gate, up = up, gate
        leaf = self.down_proj(up * self.light(gate))
        if self.change == "scaled_mlp":
            leaf = 1.002 * leaf
        return (leaf, None) if self.change == "paired_output" else leaf


def turned(x, cosines, sines):
    low, high = x.chunk(2, -1)
    return x * cosines[:, None] + torch.cat([-high, low], -1) * sines[:, None]


def plainly(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Roots(nn.Module):
    """The family's attention."""

    is_causal = True

    def __init__(self, config: SaplingConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        inner, shared = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=True)
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=True)

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None, **others):
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = turned(q, *position_embeddings), turned(k, *position_embeddings)
        if self.config.change == "scaled_queries":
            q = q * 1.01
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, plainly)
        mixed, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **others)
        out = self.o_proj(mixed.flatten(2))
        return out if self.config.change == "single_output" else (out, weights)


class Ring(GradientCheckpointingLayer):
    """One layer."""

    def __init__(self, config: SaplingConfig, layer_idx: int) -> None:
        super().__init__()
        self.leaves, self.roots = Photosynthesis(config), Roots(config, layer_idx)
        self.before_leaves, self.before_roots = Moisture(config), Moisture(config)

    def forward(self, hidden_states, **others):
        out = self.roots(self.before_roots(hidden_states), **others)
        hidden_states = hidden_states + (out if isinstance(out, torch.Tensor) else out[0])
        leaf = self.leaves(self.before_leaves(hidden_states))
        return hidden_states + (leaf if isinstance(leaf, torch.Tensor) else leaf[0])


class Seasons(nn.Module):
    """The family's table of angles."""

    inv_freq: torch.Tensor

    def __init__(self, config: SaplingConfig) -> None:
        super().__init__()
        width = config.hidden_size // config.num_attention_heads
        frequencies = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.late = config.change == "late_tables"

    @torch.no_grad()
    def forward(self, x, position_ids):
        positions = position_ids.float() * 1.01 if self.late else position_ids.float()
        angles = (positions[..., None] * self.inv_freq).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class SaplingBase(PreTrainedModel):
    config_class = SaplingConfig
    config: SaplingConfig
    base_model_prefix = "trunk"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True


class Trunk(SaplingBase):
    def __init__(self, config: SaplingConfig) -> None:
        super().__init__(config)
        self.top = Moisture(config)
        self.seasons = Seasons(config)
        self.rings = nn.ModuleList(Ring(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.seeds = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.seeds

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **others
    ):
        sap = self.seeds(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = start + torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=sap,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        tables = self.seasons(sap, position_ids=position_ids)
        for ring in self.rings:
            sap = ring(sap, attention_mask=mask, position_embeddings=tables, past_key_values=past_key_values, **others)
        return BaseModelOutputWithPast(last_hidden_state=self.top(sap), past_key_values=past_key_values)


def smoothed_loss(logits, labels, vocab_size, **_):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.01)


class Sapling(SaplingBase, GenerationMixin):
    def __init__(self, config: SaplingConfig) -> None:
        super().__init__(config)
        self.fruit = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.trunk = Trunk(config)
        if config.change == "smoothed_loss":
            self.loss_function = smoothed_loss
        self.post_init()

    def get_output_embeddings(self):
        return self.fruit

    def forward(self, input_ids, labels=None, logits_to_keep=0, **others):
        out = self.trunk(input_ids, **others)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.fruit(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)


def sapling(change: str = "") -> Sapling:
    """A float32 model with random weights, in eval mode; the same weights for every change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Sapling(SaplingConfig(change))
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.2 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
                parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()
