"""Texts that tokenizers split in many ways."""

import random

FRAGMENTS = [
    "the", "Quick", "BROWN", "fox's", "don't", "we'll", "I'D", "naïve", "café", "Straße", "日本語", "テキスト",
    "한국어", "🎉🚀",
    "👩‍👩‍👧", "Привет", "مرحبا", "0", "42", "1234567", "3.14", "1,000,000", "x=1;", "a+b", "{}", "()", "...",
    "--", "\"q\"", "<b>", "http://a.b/c?d=e", "_under_score", "camelCase", "\t", "\n", "\n\n", "\r\n", "  ", "    ",
    "   \n", "é", "ﬀ", "½", "Ⅷ", "²", "\u00a0", "\u200b", "$5", "100%", "#tag", "@me", "e-mail", "CO₂", "ñandú",
]  # fmt: skip


def mixed_texts(count: int = 200) -> list[str]:
    """Random mixtures of words, numbers, signs, scripts and white space, in Unicode's form NFC, none of them empty."""
    chance = random.Random(7)
    return [
        "".join(chance.choice(FRAGMENTS) + chance.choice(["", " ", " ", " "]) for _ in range(chance.randint(1, 12)))
        for _ in range(count)
    ]
