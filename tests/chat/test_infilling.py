"""Prompts that are filled in: the token sequences that each family's own documentation gives."""

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.helpers.engine_tokenizers import byte_level, sentencepiece
from toolkit.chat import infill
from toolkit.chat.infilling import FAMILIES
from toolkit.errors import ToolkitError

BEFORE, BEHIND = "def f(x):\n    ", "\n    return é"


def tokenizer_with(tokens, of=byte_level, bos=None):
    backend = Tokenizer.from_str(of().backend_tokenizer.to_str())
    if bos is not None:
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $0", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=of().unk_token)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return made


WRITTEN = {
    "Qwen2.5-Coder, CodeGemma, Granite 4": ("<|fim_prefix|>", BEFORE, "<|fim_suffix|>", BEHIND, "<|fim_middle|>"),
    "StarCoder, SantaCoder, Granite Code": ("<fim_prefix>", BEFORE, "<fim_suffix>", BEHIND, "<fim_middle>"),
    "SantaCoder (hyphens)": ("<fim-prefix>", BEFORE, "<fim-suffix>", BEHIND, "<fim-middle>"),
    "DeepSeek-Coder": ("<｜fim▁begin｜>", BEFORE, "<｜fim▁hole｜>", BEHIND, "<｜fim▁end｜>"),
    "Codestral": ("[SUFFIX]", BEHIND, "[PREFIX]", BEFORE),
    "Seed-Coder": ("<[fim-suffix]>", BEHIND, "<[fim-prefix]>", BEFORE, "<[fim-middle]>"),
}


def test_every_family_is_tested():
    assert {*WRITTEN, "Code Llama"} == set(FAMILIES)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_order_of_each_family(name):
    family, parts = FAMILIES[name], WRITTEN[name]
    marks = [part for part in parts if part not in (BEFORE, BEHIND)]
    tokenizer = tokenizer_with([*marks, *family.ends], bos="<pad>")
    found = infill(tokenizer, BEFORE, BEHIND)
    assert tokenizer.decode(found.token_ids) == "<pad>" + "".join(parts)
    assert tokenizer.convert_ids_to_tokens(found.stop_token_ids) == list(family.ends)
    assert [token for token in tokenizer.convert_ids_to_tokens(found.token_ids) if token in marks] == marks
    assert infill(tokenizer, "", "").token_ids == [2 - 1, *tokenizer.convert_tokens_to_ids(marks)]


def test_code_llama_has_no_space_of_the_tokenizers_before_the_text_behind():
    tokenizer = tokenizer_with(["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"], of=sentencepiece, bos="<s>")
    found = infill(tokenizer, "Hello a", "b !")
    tokens = tokenizer.convert_ids_to_tokens(found.token_ids)
    assert tokens == ["<s>", "▁<PRE>", "▁Hello", "▁a", "▁<SUF>", "b", "▁", "!", "▁<MID>"]
    assert tokenizer.convert_ids_to_tokens(found.stop_token_ids) == ["▁<EOT>"]


def test_a_tokenizer_without_all_of_a_familys_tokens_is_refused():
    for tokens in ([], ["<fim_prefix>", "<fim_suffix>"], ["[PREFIX]"]):
        with pytest.raises(ToolkitError, match="suffix must not be given, since the model's tokenizer has no"):
            infill(tokenizer_with(tokens), "a", "b")
