"""Tiny tokenizers, trained on a few sentences; nothing is downloaded."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
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


@cache
def added_tokens() -> PreTrainedTokenizerFast:
    """Byte-level BPE with added tokens: special or not, within the byte alphabet (which spells bytes) or not."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_level().backend_tokenizer.to_str()))
    tokenizer.add_tokens([AddedToken("é"), AddedToken("日▁本"), AddedToken("<|end|>", special=True), AddedToken("a b")])
    return tokenizer


@cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """Characters and words after ▁, a BOS token in front, bytes for all other characters, as Llama-2 has."""
    words = ["▁Hello", "▁a", "▁", "b", "é", "本", "!"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for letter in sorted(set("".join(words))):
        vocab[letter] = len(vocab)
    merges = []
    for word in words:
        for at in range(1, len(word)):
            vocab.setdefault(word[: at + 1], len(vocab))
            merges.append((word[:at], word[at]))
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    """Words and their continuations after ##, as BERT has."""
    words = ["[UNK]", "[SEP]", "the", "dog", "##s", "##ing", ".", ",", "'", "n't", "本", "##本", "é", "!", "a", "##a"]
    backend = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece("##", cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]")


@cache
def end_of_word() -> PreTrainedTokenizerFast:
    """Words that end in </w>, as the first GPT has: the space after a word comes with the next one."""
    words = ["<unk>", "the</w>", "do", "g</w>", "!</w>", "é</w>", "a"]
    backend = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.decoder = decoders.BPEDecoder("</w>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
