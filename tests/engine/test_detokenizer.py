import random

import pytest

from tests.helpers.engine_tokenizers import added_tokens, byte_level, end_of_word, metaspace, sentencepiece, wordpiece
from tests.helpers.tokenizers import make_tokenizer
from toolkit.engine.detokenizer import HOLD, REPLACEMENT, Decoder, Detokenizer
from toolkit.engine.stop_strings import StopStrings

SAMPLES = [
    "the quick brown fox",
    "naïve café 日本語 🎉🚀 end",
    "👩‍👩‍👧👩‍👩‍👧",
    "a" * 40,
    "  leading and trailing  ",
    "\n\n\ttabs\n",
]


def run(tokenizer, ids, prompt=(), skip=True, **stops):
    """(chunks shown, final text, the stop string found, tokens used)."""
    one = Detokenizer(Decoder(tokenizer, skip), list(prompt), **stops)
    chunks, found, used = [], None, 0
    for token in ids:
        found = one.push(token)
        used += 1
        if found is not None:
            break
        chunks.append(one.take())
    one.finish()
    chunks.append(one.take())
    return chunks, one.text, found, used


@pytest.mark.parametrize("text", SAMPLES)
def test_chunks_add_up_and_none_is_half_a_character(text):
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    chunks, final, _, _ = run(tokenizer, ids)
    assert "".join(chunks) == final == text
    assert not any(REPLACEMENT in chunk for chunk in chunks)


TOKENIZERS = [byte_level, added_tokens, metaspace, sentencepiece, wordpiece, end_of_word]


def whole_decode(tokenizer, ids, skip):
    """What ``tokenizers`` decodes, but whole characters among the bad bytes of a run of byte fallback are kept."""
    backend, tokens = tokenizer.backend_tokenizer, []
    special = set(tokenizer.all_special_ids) if skip else set()
    raw = [backend.id_to_token(token) for token in ids if token not in special]
    decoded, run = backend.decoder, b""
    if "ByteFallback" not in str(decoded):
        return backend.decode(ids, skip_special_tokens=skip)

    def spelt(run):
        """Bytes one after the other: a character where one begins, else U+FFFD."""
        while run:
            for length in (1, 2, 3, 4):
                try:
                    yield from (f"<0x{byte:02X}>" for byte in run[:length].decode().encode())
                except UnicodeDecodeError:
                    continue
                run = run[length:]
                break
            else:
                yield REPLACEMENT
                run = run[1:]

    for token in [*raw, "end"]:
        if token is not None and token.startswith("<0x"):
            run += bytes([int(token[3:5], 16)])
            continue
        tokens += spelt(run)
        tokens, run = [*tokens, token], b""
    return decoded.decode(tokens[:-1])


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("make", TOKENIZERS)
def test_deltas_add_up_to_the_decoded_whole_less_the_prompt(make, skip):
    """Random tokens, most of them no text at all, after random prompts of them."""
    tokenizer, rng = make(), random.Random(make.__name__)
    bytes_of = [token for token in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(token).startswith("<0x")]
    others = [token for token in range(len(tokenizer)) if token not in bytes_of]
    pool = others + rng.sample(bytes_of, min(len(bytes_of), len(others)))
    space = tokenizer.convert_tokens_to_ids("<0x20>")  # as the very first token, see below
    for _ in range(150):
        ids = [rng.choice(pool) for _ in range(rng.randrange(1, 24))]
        if rng.random() < 0.5:  # text, so that there are whole characters
            text = "".join(rng.choice(["😀", "é", "本", " a", " ", "x", "!", "the "]) for _ in range(8))
            ids = ids[:2] * rng.randrange(2) + tokenizer(text, add_special_tokens=False)["input_ids"]
        if next((token for token in ids if token not in tokenizer.all_special_ids), None) == space:
            continue
        cut = rng.randrange(len(ids))
        whole, prompt = (whole_decode(tokenizer, some, skip) for some in (ids, ids[:cut]))
        while not whole.startswith(prompt):  # it ends inside a character, which is completed
            prompt = prompt[:-1]
        chunks, final, _, _ = run(tokenizer, ids[cut:], ids[:cut], skip)
        assert "".join(chunks) == final == whole[len(prompt) :], (ids[:cut], ids[cut:])


@pytest.mark.parametrize("make", [byte_level, metaspace, sentencepiece])
@pytest.mark.parametrize("count", range(1, 9))
def test_a_prompt_of_emoji_leaves_the_emoji_after_it_whole(make, count):
    tokenizer = make()
    emoji = tokenizer("😀", add_special_tokens=False)["input_ids"][-4:]
    prompt = tokenizer("😀" * count)["input_ids"]
    chunks, final, _, _ = run(tokenizer, emoji * 2, prompt)
    assert final == "😀😀"
    assert [chunk for chunk in chunks if chunk] == ["😀", "😀"]


def test_a_replacement_character_that_ends_the_prompt_is_not_repeated():
    for tokenizer in (byte_level(), sentencepiece()):
        ids = tokenizer(f"b{REPLACEMENT}!", add_special_tokens=False)["input_ids"]
        assert run(tokenizer, ids[-1:], ids[:-1])[1] == "!"


def test_a_bad_byte_costs_no_neighbour():
    tokenizer = sentencepiece()
    byte = {value: tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in range(256)}
    ids = [*(byte[one] for one in "😀".encode()), byte[0xFF], *(byte[one] for one in "你".encode())]
    chunks, final, _, _ = run(tokenizer, ids)
    assert final == f"😀{REPLACEMENT}你"
    assert [chunk for chunk in chunks if chunk] == ["😀", REPLACEMENT, "你"]


def test_a_character_split_by_the_end_of_the_prompt_is_completed():
    tokenizer = byte_level()
    ids = tokenizer("日本🚀")["input_ids"]
    whole = tokenizer.decode(ids)
    for cut in range(len(ids) + 1):
        _, final, _, _ = run(tokenizer, ids[cut:], prompt=ids[:cut])
        assert final == whole[len(tokenizer.decode(ids[:cut]).rstrip(REPLACEMENT)) :]


def test_an_incomplete_end_is_flushed_once():
    tokenizer = byte_level()
    ids = tokenizer("ok 🚀")["input_ids"][:-1]
    chunks, final, _, _ = run(tokenizer, ids)
    assert final == tokenizer.decode(ids)
    assert final.startswith("ok ")
    assert not any(REPLACEMENT in chunk for chunk in chunks[:-1])
    assert chunks[-1].endswith(REPLACEMENT)


def test_bytes_that_never_become_text_do_not_pile_up():
    tokenizer = byte_level()
    bad = tokenizer.convert_tokens_to_ids("ÿ")  # byte 0xFF starts no character
    one = Detokenizer(Decoder(tokenizer, True), [])
    for _ in range(10 * HOLD):
        one.push(bad)
        assert len(one._window) <= 2 * HOLD + 2
    one.finish()
    assert one.text == REPLACEMENT * 10 * HOLD


def test_special_tokens_are_left_out_or_shown():
    tokenizer = byte_level()
    eos = tokenizer.eos_token_id
    dog = tokenizer(" dog")["input_ids"]
    ids = [*dog, eos, eos, *dog]
    assert run(tokenizer, ids)[1] == " dog dog"
    assert run(tokenizer, ids, skip=False)[1] == " dog<eos><eos> dog"


def test_a_long_run_of_left_out_tokens_costs_nothing():
    tokenizer = byte_level()
    one = Detokenizer(Decoder(tokenizer, True), [])
    for _ in range(1000):
        one.push(tokenizer.eos_token_id)
    assert len(one._window) == 0


def test_the_first_space_survives_after_a_prompt():
    tokenizer = metaspace()
    the, dog, is_ = (tokenizer.convert_tokens_to_ids(word) for word in ("▁the", "▁dog", "▁is"))
    assert tokenizer.decode([dog, is_]) == "dog is"
    assert run(tokenizer, [dog, is_], prompt=[the])[1] == " dog is"
    assert run(tokenizer, [dog, is_])[1] == "dog is"
    eos = tokenizer.eos_token_id
    assert run(tokenizer, [dog, eos, is_], prompt=[the])[1] == " dog is"


def test_byte_fallback_characters_are_held_until_complete():
    tokenizer = metaspace()
    the = tokenizer.convert_tokens_to_ids("▁the")
    rocket = [1 + byte for byte in "🚀é".encode()]
    chunks, final, _, _ = run(tokenizer, [the, *rocket, the])
    assert final == "the🚀é the"
    assert [chunk for chunk in chunks if chunk] == ["the", "🚀", "é", " the"]


def stop_oracle(text, stops, include):
    """Read letter by letter: the stop string that is complete first, the longest if several are."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_stop_strings_over_tokens_are_never_shown_and_are_cut(seed, include):
    tokenizer = byte_level()
    rng = random.Random(seed)
    text = "".join(rng.choice(["the", " dog", "ab", "a", "b", "é", "🚀", " "]) for _ in range(30))
    stops = tuple({"".join(rng.choice("ab é🚀t") for _ in range(rng.randint(1, 4))) for _ in range(2)})
    ids = tokenizer(text)["input_ids"]
    chunks, final, found, _ = run(tokenizer, ids, stop=stops, include_stop=include)
    assert (final, found) == stop_oracle(text, stops, include)
    assert "".join(chunks) == final
    shown = ""
    for chunk in chunks[:-1]:
        shown += chunk
        assert final.startswith(shown)
        assert not any(stop in shown for stop in stops)


def test_held_back_text_comes_when_it_turns_out_not_to_be_a_stop():
    tokenizer = byte_level()
    ids = [tokenizer(letter)["input_ids"][0] for letter in "xENy"]
    chunks, final, found, _ = run(tokenizer, ids, stop=("END",))
    assert chunks == ["x", "", "", "ENy", ""]
    assert (final, found) == ("xENy", None)
    chunks, _, found, _ = run(tokenizer, ids[:3], stop=("END",))
    assert chunks == ["x", "", "", "EN"]
    assert found is None


def test_many_long_stop_strings_cost_a_step_per_character():
    stops = tuple(f"{'ab' * 500}{at}" for at in range(64))
    automaton = StopStrings(stops)
    state, steps = 0, 0
    shorter = automaton._shorter

    class Counted(list):
        def __getitem__(self, at):
            nonlocal steps
            steps += 1
            return shorter[at]

    automaton._shorter = Counted(shorter)
    text = "ab" * 499 + "c" + "ab" * 500 + "63"
    for character in text:
        state = automaton.step(state, character)
    assert automaton.found[state] == stops[63]
    assert steps < len(text)


def test_stops_before_min_tokens_do_not_count():
    tokenizer = byte_level()
    one = Detokenizer(Decoder(tokenizer, True), [], ("aa",))
    ids = [tokenizer(letter)["input_ids"][0] for letter in "aaaa"]
    assert [one.push(token, may_stop=at >= 2) for at, token in enumerate(ids)] == [None, None, None, "aa"]
    assert one.text == "aa"


def test_kept_special_tokens_stay_in_the_text():
    tokenizer = make_tokenizer()
    ids = tokenizer("<|im_start|>hello<|im_end|> world</s>", add_special_tokens=False)["input_ids"]
    kept = tokenizer.convert_tokens_to_ids(["<|im_start|>"])
    for keep, expected in (((), "hello world"), (kept, "<|im_start|>hello world")):
        text, shown = Detokenizer(Decoder(tokenizer, True, keep), []), ""
        for token in ids:
            text.push(token)
            shown += text.take()
        text.finish()
        assert shown + text.take() == text.text == expected
