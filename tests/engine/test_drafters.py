"""What drafts tokens, and how many of them are verified, beside slow definitions of both."""

import itertools
import random

import pytest

import toolkit
from tests.helpers.engine_standin import make_request
from toolkit.engine.speculation.config import SpeculativeConfig
from toolkit.engine.speculation.drafter import Draft
from toolkit.engine.speculation.lengths import Chances, StepTimes, choose_lengths
from toolkit.engine.speculation.ngram import NgramDrafter, continuation
from toolkit.engine.speculation.suffix import SuffixDrafter
from toolkit.engine.speculation.text_index import Follower, TextIndex
from toolkit.errors import ToolkitError


def sequence_of(tokens, max_tokens=1000):
    sequence = make_request([tokens[0]], toolkit.SamplingParams(max_tokens=max_tokens)).sequences[0]
    sequence.tokens += tokens[1:]
    return sequence


def longest_match(tokens, least, longest):
    """Where the longest run of last tokens occurred before, the last time, and its length, by definition."""
    for length in range(min(longest, len(tokens) - 1), least - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                return end, length
    return 0, 0


@pytest.mark.parametrize("seed", range(40))
def test_the_longest_run_of_last_tokens_is_found_where_it_occurred_last(seed):
    chance = random.Random(seed)
    alphabet = chance.choice((2, 3, 9))
    tokens = [chance.randrange(alphabet) for _ in range(chance.randint(1, 60))]
    least, longest = chance.choice(((1, 1), (1, 4), (2, 8), (3, 3)))
    follower = Follower(TextIndex(least), longest, own=True)
    for _ in range(30):
        follower.follow(tokens)
        end, length = longest_match(tokens, least, longest)
        assert follower.text.find(tokens, longest, own=True) == (end, length)
        assert follower.length == length
        assert tokens[follower.end - length : follower.end] == tokens[len(tokens) - length :]
        assert follower.end < len(tokens)
        tokens += [chance.randrange(alphabet) for _ in range(chance.choice((0, 1, 1, 1, 4)))]


@pytest.mark.parametrize("seed", range(20))
def test_a_run_is_followed_in_a_text_that_grows(seed):
    chance = random.Random(seed)
    least, longest = chance.choice(((1, 4), (2, 8), (3, 3)))
    text, tokens = TextIndex(least), [0]
    follower = Follower(text, longest)
    for _ in range(60):
        if chance.random() < 0.2 and len(text.tokens) < 120:
            text.extend([*(chance.randrange(3) for _ in range(chance.randint(0, 9))), -1])
        tokens += [chance.randrange(3) for _ in range(chance.choice((1, 1, 2)))]
        follower.follow(tokens)
        ends = [
            (length, end)
            for length in range(least, min(longest, len(tokens)) + 1)
            for end in range(length, len(text.tokens) + 1)
            if text.tokens[end - length : end] == tokens[-length:]
        ]
        length, end = max(ends, default=(0, 0))
        assert text.find(tokens, longest) == (end, length)
        assert follower.length == length
        assert text.tokens[follower.end - length : follower.end] == tokens[len(tokens) - length :]


def test_a_search_looks_at_so_many_occurrences_only():
    text = TextIndex(1)
    text.extend([7, 8] + [0, 8] * TextIndex.MOST_SEARCHED)
    assert text.find([7, 8], 4) == (len(text.tokens), 1)
    text.extend([7, 8])
    assert text.find([7, 8], 4) == (len(text.tokens), 2)


def test_a_continuation_goes_on_with_itself_at_the_end():
    tokens = [7, 8, 9, 1, 2]
    assert continuation(tokens, 1, 2) == [8, 9]
    assert continuation(tokens, 3, 5) == [1, 2, 1, 2, 1]
    assert continuation(tokens, 4, 3) == [2, 2, 2]


def test_prompt_lookup_follows_a_sequence_that_grows():
    drafter, sequence = NgramDrafter(2, 4), sequence_of([1, 2, 3, 4, 5, 1, 2])
    assert drafter.propose([sequence], [3]) == [Draft([3, 4, 5], 2)]
    sequence.tokens += [3, 9]
    assert drafter.propose([sequence], [3]) == [Draft()]
    sequence.tokens += [1, 2, 3, 9]
    assert drafter.propose([sequence], [2]) == [Draft([1, 2], 4)]


def occurrences(texts, run):
    """What follows ``run`` in each text, wherever it occurs."""
    ends = [(text, end) for text in texts for end in range(len(run), len(text) + 1)]
    return [text[end:] for text, end in ends if text[end - len(run) : end] == run]


@pytest.mark.parametrize("seed", range(25))
def test_drafts_from_finished_texts_are_what_followed_the_longest_run(seed):
    chance = random.Random(seed)
    drafter, texts = SuffixDrafter(1, 6, 10**6), []
    live = [sequence_of([chance.randrange(4)]) for _ in range(3)]
    for _ in range(60):
        if chance.random() < 0.1:
            text = [chance.randrange(4) for _ in range(chance.randint(1, 12))]
            drafter.observe(sequence_of(text))
            texts.append(text)
        for sequence in live:
            sequence.tokens += [chance.randrange(4) for _ in range(chance.randint(0, 3))]
        for sequence, draft in zip(live, drafter.propose(live, [3] * 3)):
            tokens = sequence.tokens
            own = longest_match(tokens, 1, 6)[1]
            found = [n for n in range(1, len(tokens) + 1) if occurrences(texts, tokens[-n:])]
            longest = min(max(found, default=0), 6)
            following = [text[:3] for text in occurrences(texts, tokens[-longest:])] if longest > own else []
            if draft.match == own:  # nothing longer, or a text that ends with it
                assert not following or [] in following
            else:
                assert draft.match == longest
                assert draft.tokens
                assert draft.tokens in following


def test_finished_texts_are_forgotten_by_halves():
    drafter = SuffixDrafter(2, 6, 40)
    for first in range(0, 1000, 10):
        drafter.observe(sequence_of(list(range(first, first + 10))))
        assert sum(len(text.tokens) for text in drafter._texts) <= 40 + 2 * 11
    assert drafter.propose([sequence_of([990, 991, 992])], [4]) == [Draft([993, 994, 995, 996], 3)]
    assert drafter.propose([sequence_of([0, 1, 2])], [4]) == [Draft()]


@pytest.mark.parametrize("seed", range(30))
def test_the_lengths_chosen_bring_the_most_tokens_per_second(seed):
    chance = random.Random(seed)
    sizes = (1, 2, 3, 4, 6, 8, 12, 16, 24)
    times = StepTimes(lambda rows: next(size for size in sizes if size >= rows))
    seconds = {size: 1 + size * chance.choice((0.01, 0.1, 0.4)) for size in sizes}
    for size in sizes * 2:
        times.saw(size, seconds[size])
    seconds = {size: times.of(size) for size in sizes}
    chances = Chances()
    for match in range(1, 4):
        for _ in range(chance.randint(0, 20)):
            chances.saw(Draft([], match), chance.randint(0, 3), 3)
    rows, most = chance.randint(3, 5), chance.choice((3, 10))
    drafts = [Draft([0] * chance.randint(0, 4), chance.randint(1, 3)) for _ in range(3)]

    def speed(lengths):
        expected = sum(chances.of(draft) ** at for draft, length in zip(drafts, lengths) for at in range(1, length + 1))
        return (rows + expected) / times.of(rows + sum(lengths))

    every = itertools.product(*(range(len(draft.tokens) + 1) for draft in drafts))
    best = max(speed(lengths) for lengths in every if sum(lengths) <= most)
    chosen = choose_lengths(drafts, chances, times, rows, most)
    assert all(0 <= length <= len(draft.tokens) for length, draft in zip(chosen, drafts))
    assert sum(chosen) <= most
    assert speed(chosen) == pytest.approx(best, rel=1e-12)


def test_nothing_is_drafted_before_a_step_was_timed_nor_where_drafts_fail():
    times, chances, draft = StepTimes(lambda rows: rows), Chances(), Draft([1, 2, 3], 2)
    assert choose_lengths([draft], chances, times, 1, 8) == [0]
    for rows in (1, 1, 2, 2, 3, 3, 4, 4):
        times.saw(rows, 1 + 0.2 * rows)
    assert choose_lengths([draft], chances, times, 1, 8) != [0]
    for _ in range(40):
        chances.saw(draft, 0, 1)
    assert choose_lengths([draft], chances, times, 1, 8) == [0]
    assert choose_lengths([Draft([1, 2, 3], 2, predicted=True)], chances, times, 1, 8) != [0]  # is judged apart
    for _ in range(3000):  # what worked for nobody is tried again by and by
        chances.passed_by(draft)
    assert choose_lengths([draft], chances, times, 1, 8) != [0]


def test_the_first_step_of_a_size_and_a_step_that_waited_count_little():
    times = StepTimes(lambda rows: rows)
    times.saw(4, 50.0)
    assert times.of(4) is None
    times.saw(4, 1.0)
    times.saw(4, 1000.0)
    assert times.of(4) < 1.3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "medusa"}, "method of speculative_config must be one of prediction, ngram, suffix, draft_model"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens of speculative_config must be an integer >= 1"),
        ({"prompt_lookup_min": 9}, "prompt_lookup_min of speculative_config must be <= prompt_lookup_max"),
        ({"adaptive": 1}, "adaptive of speculative_config must be True or False, got 1"),
        ({"method": "draft_model"}, "model of speculative_config must be a model with method 'draft_model', got None"),
        ({"model": 3}, "model of speculative_config must be None with method 'ngram', got int"),
        ({"num_tokens": 3}, "speculative_config has no argument 'num_tokens'"),
        ("ngram", "speculative_config must be a dictionary such as"),
    ],
)
def test_what_cannot_be_is_one_sentence(given, message):
    with pytest.raises(ToolkitError, match=message.replace("(", r"\(")):
        SpeculativeConfig.check(given)
