"""A tiny random chat model on disk, with a byte-level tokenizer trained on the spot."""

import pytest

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    wrapped.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=len(wrapped),
        max_position_embeddings=4096,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def talking_model(chat_model, tmp_path_factory):
    """``chat_model`` that never ends a text, and writes ASCII when it is greedy: what it does not write has logit 0."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    never = [token for token, text in enumerate(texts) if token == 0 or not (text.isascii() and text.isprintable())]
    with torch.no_grad():
        model.lm_head.weight[never] = 0
    folder = tmp_path_factory.mktemp("talking") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def calling_model(talking_model, tmp_path_factory):
    """``talking_model`` whose chat template has reasoning and tools."""
    from shutil import copytree

    from transformers import AutoTokenizer

    from tests.helpers.tool_template import TEMPLATE as WITH_TOOLS

    folder = tmp_path_factory.mktemp("calling") / "tiny"
    copytree(talking_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = WITH_TOOLS
    tokenizer.save_pretrained(folder)
    return folder
