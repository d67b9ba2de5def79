"""When a model is patched: one ragged forward against ordinary ones of its sequences, one by one."""

import threading

import pytest
import torch
from transformers import AutoConfig

import toolkit
from toolkit import Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.patching import find_claims, ragged_check
from toolkit.testing.architectures import small_model
from toolkit.testing.models import from_config, random_model
from toolkit.testing.parity import check_parity


def roberta(padding=3):
    return from_config(
        AutoConfig.for_model(
            "roberta", vocab_size=331, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, pad_token_id=padding, is_decoder=True,
        )
    )  # fmt: skip


def test_positions_begin_where_the_models_own_do():
    model = roberta()
    text = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        logits = model(text, use_cache=False).logits[0].log_softmax(-1)
    report = toolkit.patch(model)
    assert (report.ragged.position_offset, report.ragged.uncounted_token) == (4, 3)
    got = toolkit.token_logprobs(model, [text[0].tolist(), [12, 13, 14]])[0]
    torch.testing.assert_close(got, logits[:-1].gather(1, text[0, 1:, None])[:, 0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ToolkitError, match="sequence 1 must not contain token 3, got one"):
        toolkit.token_logprobs(model, [[5, 6], [5, 3, 6]])


def test_the_engine_counts_as_training_does():
    parity = check_parity(roberta(), [[5, 6, 7, 8], [9, 10], [11] * 9], min_tokens=60, max_new_tokens=8)
    assert parity.differing == 0


def test_the_engine_ends_where_the_table_of_positions_does():
    model = roberta()
    with Engine(model) as engine:
        found = engine.generate([5, 6, 7], SamplingParams(max_tokens=57, ignore_eos=True))[0]
        assert (len(found.token_ids), found.error) == (64 - 4 - 3, None)
        with pytest.raises(ToolkitError, match=r"fit in max_model_len \(60\)"):
            engine.generate([5, 6, 7], SamplingParams(max_tokens=58))
        with pytest.raises(ToolkitError, match="prompt must not contain token 3, got one"):
            engine.generate([5, 3, 7])


def test_quantities_of_the_whole_batch_are_refused():
    """A model that divides its embeddings by the number of tokens of the call."""
    model = random_model("llama")

    class Counted(type(model.model.embed_tokens)):
        def forward(self, ids):
            return super().forward(ids) / (1 + ids.shape[1])

    model.model.embed_tokens.__class__ = Counted
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.05
    report = toolkit.patch(model)
    assert report.ragged.reason is not None
    assert "no ragged batches: model LlamaForCausalLM" in str(report)
    with pytest.raises(ToolkitError, match="LlamaForCausalLM"):
        toolkit.token_logprobs(model, [[3, 4, 5]])


def test_positions_from_rows_are_refused_when_the_model_is_patched():
    report = toolkit.patch(small_model("bart"))
    assert report.ragged.reason is None or "from a token's row in the batch" in report.ragged.reason


@pytest.mark.parametrize("family", ["gemma2", "qwen3_next"])
def test_models_that_are_right_pass_with_no_offset(family):
    report = toolkit.patch(random_model(family))
    assert report.ragged == type(report.ragged)(checked=True)


def test_a_check_that_was_broken_off_is_done_again(monkeypatch):
    model = roberta()

    def broken(copied, report, forward):
        report.ragged.position_offset = 9
        raise KeyboardInterrupt

    monkeypatch.setattr(ragged_check, "_checked", broken)
    report = find_claims(model)
    with pytest.raises(KeyboardInterrupt):
        ragged_check.check_ragged(model, report, None)
    assert not report.ragged.checked
    monkeypatch.setattr(ragged_check, "_checked", lambda *_: None)
    ragged_check.check_ragged(model, report, None)
    assert (report.ragged.checked, report.ragged.position_offset) == (True, 0)


def test_another_thread_waits_for_the_check(monkeypatch):
    model, calls, begun = random_model("llama"), [], threading.Event()
    report = find_claims(model)
    other = threading.Thread(target=lambda: (begun.wait(), check(), calls.append(report.ragged.reason)))

    def check():
        ragged_check.check_ragged(model, report, None)

    def slow(copied, report, forward):
        check()  # a forward of the check itself
        begun.set()
        other.join(0.2)
        calls.append("checked")
        return "it differs"

    monkeypatch.setattr(ragged_check, "_checked", slow)
    other.start()
    check()
    other.join()
    assert calls == ["checked", "it differs"]
