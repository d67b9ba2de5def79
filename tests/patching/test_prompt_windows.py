"""Layers whose tokens see the whole prompt and a window of what was written after it (Unlimited OCR)."""

import pytest
import torch

import toolkit
from toolkit.errors import ToolkitError
from toolkit.patching.cache_windows import cache_window, keeps_prompt
from toolkit.patching.state_spec import state_spec
from toolkit.state.batch import RaggedBatch
from toolkit.state.prompt_windows import seen_positions
from toolkit.testing.architectures import IMAGE_TEXT, small_config, small_model

pytest.importorskip("transformers.models.unlimited_ocr", reason="needs a transformers with Unlimited OCR")

WINDOW, MORE = 8, 21


@pytest.fixture(scope="module")
def model():
    found = small_model("unlimited_ocr", kind=IMAGE_TEXT)
    toolkit.patch(found)
    return found


def tokens(count, seed=3):
    return torch.randint(5, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def generated(model, prompt):
    """transformers' greedy completion, beyond the window."""
    out = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=MORE, min_new_tokens=MORE, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def step_by_step(model, prompt, completion):
    """Log-probabilities of a completion by the model's own cache, token by token."""
    past, found = None, []
    given = torch.tensor([prompt])
    with torch.no_grad():
        for token in completion:
            out = model(input_ids=given, past_key_values=past, use_cache=True)
            past, given = out.past_key_values, torch.tensor([[token]])
            found.append(out.logits[0, -1].log_softmax(-1)[token])
    return torch.stack(found)


def test_what_a_cache_keeps():
    config = small_config("unlimited_ocr", kind=IMAGE_TEXT).text_config
    assert (cache_window(config, 0), keeps_prompt(config, 0)) == (WINDOW, True)
    assert cache_window(config, None) == 0
    other = small_config("mistral", sliding_window=6)
    assert (cache_window(other, 1), keeps_prompt(other, 1)) == (6, False)
    assert cache_window(small_config("llama"), 1) == 0


def test_the_claim_names_the_window(model):
    report = toolkit.patch(model)
    text = [claim for claim in report.claims if claim.role == "attention"]
    assert len(text) == 2
    assert all(claim.op.endswith(f"the prompt and a window of {WINDOW}") for claim in text)
    assert {spec.kind for spec in state_spec(model) if spec.kind != "routing"} == {"prompt_window"}


def test_a_layer_whose_cache_keeps_less_than_its_masks_show_is_skipped(monkeypatch):
    """As it would be if the cache dropped the prompt too."""
    monkeypatch.setattr("toolkit.patching.roles.attention.keeps_prompt", lambda config, layer: False)
    other = small_model("unlimited_ocr", kind=IMAGE_TEXT)
    reasons = {one.reason for one in toolkit.patch(other).skipped if one.role == "attention"}
    assert any("generate() and the forward differ" in reason for reason in reasons)
    with pytest.raises(ToolkitError, match="must be patched for a ragged batch"):
        toolkit.token_logprobs(other, [[5, 6, 7]])


def test_seen_positions_against_loops():
    lengths, prompts, window = (17, 6, 9), (4, 6, 1), 3
    batch = RaggedBatch.from_sequences([[0] * length for length in lengths], share=False, prompt_lengths=prompts)
    wanted = [
        [key for key in range(at + 1) if key < prompt or at - key < window]
        for length, prompt in zip(lengths, prompts, strict=True)
        for at in range(length)
    ]
    found = seen_positions(batch, window)
    assert [[key for key in row if key >= 0] for row in found.tolist()] == wanted
    assert seen_positions(batch, 16) is None
    assert seen_positions(RaggedBatch.from_sequences([[0] * 9]), window) is None


def test_greedy_completions_beyond_the_window_are_those_of_generate(model):
    """Chunked prompts side by side; then a prompt that is a completed sequence, whose pages are no prompt's."""
    prompts = [tokens(19), tokens(3, seed=5), tokens(19)[:11]]
    toolkit.unpatch(model)
    expected = [generated(model, prompt) for prompt in prompts]
    longer = prompts[0] + expected[0][:15]
    expected_after = generated(model, longer)
    toolkit.patch(model)
    assert [generated(model, prompt) for prompt in prompts] == expected
    params = toolkit.SamplingParams(max_tokens=MORE, temperature=0.0, ignore_eos=True)
    with toolkit.Engine(model, max_num_seqs=4, max_num_batched_tokens=8, block_size=4) as engine:
        assert [one.token_ids for one in engine.generate(prompts, params)] == expected
        (after,) = engine.generate([longer], params)
        assert after.token_ids == expected_after
        (again,) = engine.generate([longer], params)
        assert again.token_ids == expected_after


def test_training_has_the_bits_of_decoding(model):
    """Of the completions of one prompt, and of one that continues a completed sequence; with and without sharing."""
    prompt = tokens(13, seed=8)
    params = toolkit.SamplingParams(max_tokens=MORE, n=2, ignore_eos=True, seed=4)
    with toolkit.Engine(model, max_num_seqs=4, max_num_batched_tokens=16, block_size=4) as engine:
        outputs = engine.generate([prompt], params)
        longer = prompt + list(outputs[0].token_ids)
        outputs += engine.generate([longer], toolkit.SamplingParams(max_tokens=MORE, ignore_eos=True, seed=5))
    sequences = [one.prompt_token_ids + list(one.token_ids) for one in outputs]
    with torch.no_grad():
        for share in (True, False):
            trained = toolkit.token_logprobs(model, sequences, share=share, last=[MORE] * 3)
            for output, values in zip(outputs, trained, strict=True):
                assert output.logprobs == values.tolist()
    toolkit.unpatch(model)
    own = [step_by_step(model, one.prompt_token_ids, one.token_ids) for one in outputs]
    toolkit.patch(model)
    for values, other in zip(trained, own, strict=True):
        torch.testing.assert_close(values, other, rtol=0, atol=1e-5)


def test_without_a_prompt_the_forward_is_the_models_own(model):
    """All tokens are a prompt's then, as in an ordinary forward."""
    text = tokens(31, seed=9)
    with torch.no_grad():
        (found,) = toolkit.token_logprobs(model, [text])
        ids = torch.tensor([text])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        (narrow,) = toolkit.token_logprobs(model, [text], last=[26])
    own = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5)
    assert (found[-10:] - narrow[-10:]).abs().max() > 1e-4
