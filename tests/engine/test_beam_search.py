"""Beam search of ``toolkit.LLM``: against transformers' ``generate``, and against a search written out here."""

import pytest
import torch

from toolkit import LLM, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.llm import BeamSearchParams
from toolkit.testing.models import random_model, tiny_tokenizer

PROMPTS = [[5, 6, 7, 8], [9, 10], list(range(20, 60))]


def logprobs_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def searched(model, prompt, width, count, eos, penalty):
    """vLLM's search: of each beam the 2 * width best tokens; those that end it are set aside."""
    beams, finished = [(prompt, 0.0)], []
    for _ in range(count):
        found = []
        for tokens, total in beams:
            row = logprobs_of(model, tokens)
            for token in row.topk(2 * width).indices.tolist():
                one = [*tokens, token], total + float(row[token])
                (finished if token == eos else found).append(one)
        beams = sorted(found, key=lambda one: -one[1])[:width]

    def score(one):
        tokens, total = one
        return total / (len(tokens) - (tokens[-1] == eos)) ** penalty

    return sorted([*finished, *beams], key=lambda one: -score(one))[:width]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next"])
def test_beams_of_one_length_are_those_of_generate(family):
    plain = random_model(family)
    with LLM(random_model(family), max_num_seqs=16) as llm:
        found = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True))
    for prompt, output in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        expected = plain.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=3, num_return_sequences=3, max_new_tokens=6,
            do_sample=False, eos_token_id=None, pad_token_id=0, length_penalty=0.0, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        assert [one.tokens for one in output.sequences] == expected.sequences.tolist()
        totals = torch.tensor([one.cum_logprob for one in output.sequences])
        torch.testing.assert_close(totals, expected.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -2.0])
def test_beams_that_end_are_ranked_with_the_others(penalty):
    plain = random_model("llama")
    # A token that is likely somewhere on the way ends texts.
    eos = int(logprobs_of(plain, [*PROMPTS[0], int(logprobs_of(plain, PROMPTS[0]).argmax())]).argmax())
    model = random_model("llama", eos_token_id=eos)
    model.generation_config.eos_token_id = eos
    with LLM(model) as llm:
        params = BeamSearchParams(beam_width=2, max_tokens=5, length_penalty=penalty)
        found = llm.beam_search(PROMPTS, params)
    ended = 0
    for prompt, output in zip(PROMPTS, found, strict=True):
        expected = searched(plain, prompt, 2, 5, eos, penalty)
        assert [one.tokens for one in output.sequences] == [tokens for tokens, _ in expected]
        for one, (_, total) in zip(output.sequences, expected, strict=True):
            assert one.cum_logprob == pytest.approx(total, abs=1e-4)
            assert sum(one.logprobs) == pytest.approx(one.cum_logprob)
            assert one.finish_reason == ("stop" if one.tokens[-1] == eos else "length")
            assert one.text is None
            ended += one.finish_reason == "stop"
    assert ended


def test_texts_have_texts_and_prefixes_are_shared():
    with LLM(random_model("llama"), tiny_tokenizer(), block_size=4) as llm:
        (found,) = llm.beam_search("Small random", BeamSearchParams(beam_width=4, max_tokens=12, ignore_eos=True))
        stats = llm.engine.stats()
    assert len(found.sequences) == 4
    prompt = tiny_tokenizer()("Small random")["input_ids"]
    for one in found.sequences:
        assert one.tokens[: len(prompt)] == prompt
        assert one.text == tiny_tokenizer().decode(one.tokens, skip_special_tokens=True)
    assert stats["prefix_cache_hits"] > 200


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_beams_fork_their_parents(family):
    params = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
    with LLM(random_model(family), block_size=4) as llm:
        step, counts = llm.engine.runner.step, []

        def counted(chunks, *rest):
            counts.append([chunk.count for chunk in chunks])
            llm.engine.check_integrity()
            return step(chunks, *rest)

        llm.engine.runner.step = counted
        found = llm.beam_search(PROMPTS, params)
        assert counts == [[4, 2, 40], *[[1] * 9] * 7]
        assert llm.engine.stats()["num_used_blocks"] == 0
        llm.engine.check_integrity()
        llm.engine.reset_prefix_cache()
        for prompt, output in zip(PROMPTS, found, strict=True):
            for beam in output.sequences:  # scored whole, in one piece
                scored = llm.engine.generate([beam.tokens], SamplingParams(max_tokens=0, prompt_logprobs=-1))[0]
                ids = list(enumerate(beam.tokens))[len(prompt) :]
                assert beam.logprobs == [scored.prompt_logprobs[at][token] for at, token in ids]


def test_too_few_blocks_for_all_parents_change_no_beam():
    params = BeamSearchParams(beam_width=4, max_tokens=20, ignore_eos=True)
    with LLM(random_model("llama"), block_size=4) as llm:
        expected = llm.beam_search(PROMPTS[:2], params)
    with LLM(random_model("llama"), block_size=4, num_blocks=10, max_num_seqs=4, swap_space=0) as llm:
        assert llm.beam_search(PROMPTS[:2], params) == expected
        points = llm.engine.scheduler.fork_points
        assert 0 < points.num_forks < 2 * 4 * 19
        llm.engine.check_integrity()
        assert llm.engine.stats()["num_used_blocks"] == 0


def test_what_does_not_fit_is_one_sentence():
    with LLM(random_model("llama"), max_model_len=32) as llm:
        with pytest.raises(ToolkitError, match="max_tokens must be <= 28 after a prompt of 4 tokens, got 29"):
            llm.beam_search(PROMPTS[:1], BeamSearchParams(beam_width=2, max_tokens=29))
        with pytest.raises(ToolkitError, match="prompt must be token ids"):
            llm.beam_search("Small", BeamSearchParams(beam_width=2, max_tokens=2))
    with pytest.raises(ToolkitError, match="beam_width must be an integer >= 1, got 0"):
        BeamSearchParams(beam_width=0, max_tokens=2)
