"""Tiny tokenizers, trained on a few sentences; nothing is downloaded."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "def forward(self, x): return self.weight * x",
    "the quick brown fox jumps over the lazy dog and the dog is not amused",
    "naïve café über Straße",
    "日本語のテキスト 🎉🚀 👩‍👩‍👧",
]


@cache
def byte_level(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2 has: many characters are split over several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """Words marked by a leading ▁, bytes to fall back on, as in Llama-2: decoding strips the first space."""
    words = [
        "<eos>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁the",
        "▁dog",
        "▁is",
        "s",
        "ly",
        ".",
        "本",
    ]
    tokenizer = Tokenizer(
        models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True, unk_token="<eos>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
