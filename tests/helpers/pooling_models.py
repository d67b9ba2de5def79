"""Small random models without a head and with heads, and what transformers computes with them one by one."""

import copy
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

from toolkit.testing.models import from_config

HEADLESS, SEQUENCES, TOKENS = AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification
VOCABULARY = 331
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_WINDOWS = {"layer_types": ["full_attention", "sliding_attention"]}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 9},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "modernbert": {**_WINDOWS, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    "roberta": {"max_position_embeddings": 130},
    "distilbert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    "gte": {},
    "gemma3_text": {
        **_WINDOWS, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8, "use_bidirectional_attention": True,
    },
}  # fmt: skip
FAMILIES = DECODERS | ENCODERS


@cache
def _made(family: str, opener: Any, settings: tuple[tuple[str, Any], ...]) -> Any:
    config = AutoConfig.for_model(family, **(_SIZES | FAMILIES.get(family, {}) | dict(settings)))
    model = from_config(config, opener=opener)
    model.set_attn_implementation("eager")
    return model


def pooling_model(family: str, opener: Any = HEADLESS, **settings: Any) -> Any:
    """A random float32 model with eager attention; the caller's own copy."""
    return copy.deepcopy(_made(family, opener, tuple(sorted(settings.items()))))


@cache
def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Words between [CLS] and [SEP]; the second text of a pair is of type 1."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "play", "##er", "##s", "game", "a", "of", "runs"]
    backend = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair=pair, special_tokens=special)
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    kept = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=kept, **names)


def ragged_texts(lengths: tuple[int, ...] = (40, 1, 7, 23, 5, 100, 2), seed: int = 3) -> list[list[int]]:
    """Token ids; two more texts continue the first one's beginning, and one of them is there twice."""
    source = torch.Generator().manual_seed(seed)
    texts = [torch.randint(3, VOCABULARY, (count,), generator=source).tolist() for count in lengths]
    return [*texts, texts[0][:30] + texts[2], texts[0][:20], texts[0][:20]]


@torch.no_grad()
def hidden_of(model: Any, ids: list[int], **inputs: Any) -> torch.Tensor:
    """[n, H] the last hidden states of one text alone, by an unpatched model."""
    return model(input_ids=torch.tensor([ids]), **inputs).last_hidden_state[0]


@torch.no_grad()
def logits_of(model: Any, ids: list[int], **inputs: Any) -> torch.Tensor:
    """[N] or [n, N] the logits of one text alone, by an unpatched model."""
    return model(input_ids=torch.tensor([ids]), **inputs).logits[0]
