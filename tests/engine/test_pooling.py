"""Embeddings, scores and classes of ragged batches: against transformers one by one, alone and with neighbours."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.pooling_models import (
    ENCODERS,
    FAMILIES,
    SEQUENCES,
    TOKENS,
    hidden_of,
    logits_of,
    pooling_model,
    ragged_texts,
)
from toolkit.engine.pooling import PoolerConfig, PoolingEngine, PoolingInput, PoolingParams, Projection
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def inputs_of(texts):
    return [PoolingInput(ids) for ids in texts]


def data_of(engine, texts, **params):
    return [one.data for one in engine.pool(inputs_of(texts), PoolingParams(**params))]


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_transformers_alone_and_with_neighbours(family):
    plain, texts = pooling_model(family), ragged_texts()
    engine = PoolingEngine(pooling_model(family), max_num_batched_tokens=128, max_num_seqs=5)
    token = 0 if family in ENCODERS else -1
    assert (engine.tasks[0], engine.pooling_type) == ("embed", "CLS" if family in ENCODERS else "LAST")
    together = data_of(engine, texts)
    for ids, got in zip(texts, together, strict=True):
        torch.testing.assert_close(got, F.normalize(hidden_of(plain, ids)[token], dim=0), **CLOSE)
    for ids, got in zip(texts, together, strict=True):
        assert torch.equal(data_of(engine, [ids])[0], got)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1)).tolist()
    for at, got in zip(order, data_of(engine, [texts[at] for at in order]), strict=True):
        assert torch.equal(got, together[at])


@pytest.mark.parametrize("family", ["qwen3", "bert", "modernbert"])
@pytest.mark.parametrize("kind", ["last", "mean", "CLS", "all"])
def test_every_pooling_type_of_raw_hidden_states(family, kind):
    plain, texts = pooling_model(family), ragged_texts()
    engine = PoolingEngine(pooling_model(family), pooler_config={"pooling_type": kind, "normalize": False})
    assert PoolerConfig(pooling_type=kind).pooling_type == kind.upper()
    for ids, got in zip(texts, data_of(engine, texts), strict=True):
        hidden = hidden_of(plain, ids)
        expected = {"last": hidden[-1], "mean": hidden.mean(0), "CLS": hidden[0], "all": hidden}[kind]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    tokens = data_of(engine, texts[:3], task="token_embed", normalize=True)
    for ids, got in zip(texts, tokens, strict=False):
        torch.testing.assert_close(got, F.normalize(hidden_of(plain, ids), dim=-1), **CLOSE)


def test_dimensions_are_cut_before_the_length_is_taken():
    plain, texts = pooling_model("qwen3"), ragged_texts()
    engine = PoolingEngine(pooling_model("qwen3"))
    assert engine.embedding_size == 64
    for ids, got in zip(texts, data_of(engine, texts, dimensions=16), strict=True):
        torch.testing.assert_close(got, F.normalize(hidden_of(plain, ids)[-1, :16], dim=0), **CLOSE)
    with pytest.raises(ToolkitError, match=r"dimensions must be >= 1 and <= 64, got 65"):
        data_of(engine, texts, dimensions=65)


def test_dense_layers_stand_between_pooling_and_normalisation():
    plain, texts = pooling_model("bert"), ragged_texts()
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 64, generator=generator), torch.randn(24, generator=generator)
    config = PoolerConfig(pooling_type="MEAN", projections=(Projection(weight, bias, "tanh"),))
    engine = PoolingEngine(pooling_model("bert"), pooler_config=config)
    assert engine.embedding_size == 24
    for ids, got in zip(texts, data_of(engine, texts), strict=True):
        expected = torch.tanh(hidden_of(plain, ids).mean(0) @ weight.T + bias)
        torch.testing.assert_close(got, F.normalize(expected, dim=0), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        ({"num_labels": 1}, torch.sigmoid),
        ({"num_labels": 3}, lambda x: x.softmax(-1)),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"num_labels": 1, "problem_type": "regression"}, lambda x: x),
    ],
)
def test_classes_scores_and_rewards_are_those_of_transformers(family, settings, activation):
    plain, texts = pooling_model(family, SEQUENCES, **settings), ragged_texts()
    engine = PoolingEngine(pooling_model(family, SEQUENCES, **settings))
    assert engine.tasks == ("classify",)
    scores, rewards = data_of(engine, texts), data_of(engine, texts, use_activation=False)
    for at, ids in enumerate(texts):
        logits = logits_of(plain, ids)
        torch.testing.assert_close(scores[at], activation(logits), **CLOSE)
        torch.testing.assert_close(rewards[at], logits, rtol=1e-5, atol=3e-5)
        assert torch.equal(data_of(engine, [ids])[0], scores[at])


def test_a_text_that_ends_with_padding_is_read_as_transformers_reads_it():
    """Its classifier reads the last token that is not padding, wherever that is."""
    plain, engine = pooling_model("qwen3", SEQUENCES), PoolingEngine(pooling_model("qwen3", SEQUENCES))
    ids = [5, 6, 7, 0, 0]
    assert not torch.allclose(logits_of(plain, ids), logits_of(plain, [5, 6, 7, 0, 8]), atol=1e-3)
    got = data_of(engine, [ids], use_activation=False)[0]
    torch.testing.assert_close(got, logits_of(plain, ids), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "bert", "modernbert", "distilbert"])
def test_classes_of_tokens_are_those_of_transformers(family):
    plain, texts = pooling_model(family, TOKENS, num_labels=5), ragged_texts()
    engine = PoolingEngine(pooling_model(family, TOKENS, num_labels=5))
    assert engine.tasks == ("token_classify",)
    together = data_of(engine, texts)
    for ids, got in zip(texts, together, strict=True):
        torch.testing.assert_close(got, logits_of(plain, ids).softmax(-1), **CLOSE)
        assert torch.equal(data_of(engine, [ids])[0], got)


def test_sequences_with_other_token_types_are_not_shared():
    plain, engine = pooling_model("bert", SEQUENCES), PoolingEngine(pooling_model("bert", SEQUENCES))
    ids = [5, 6, 7, 8, 9, 10]
    kinds = [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], None]
    expected = [
        logits_of(plain, ids, **({} if one is None else {"token_type_ids": torch.tensor([one])})) for one in kinds
    ]
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    found = engine.pool([PoolingInput(ids, one) for one in kinds], PoolingParams(use_activation=False))
    for got, other in zip(found, expected, strict=True):
        torch.testing.assert_close(got.data, other, **CLOSE)


def test_a_model_that_predicts_tokens_is_pooled_by_its_hidden_states():
    model, texts = random_model("llama"), ragged_texts()
    expected = [hidden_of(model.model, ids)[-1] for ids in texts]
    for got, other in zip(data_of(PoolingEngine(model), texts), expected, strict=True):
        torch.testing.assert_close(got, F.normalize(other, dim=0), **CLOSE)


def test_activations_of_cross_encoders_are_read_from_their_configuration():
    model = pooling_model("bert", SEQUENCES, num_labels=1)
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    plain, ids = pooling_model("bert", SEQUENCES, num_labels=1), [5, 6, 7]
    torch.testing.assert_close(data_of(PoolingEngine(model), [ids])[0], logits_of(plain, ids), **CLOSE)
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.activation.Mish"}
    with pytest.raises(ToolkitError, match=r"must be one of Identity, Sigmoid, Softmax, got 'torch\.nn"):
        data_of(PoolingEngine(model), [ids])


def test_common_prefixes_are_computed_once(monkeypatch):
    from toolkit.engine.pooling import engine as module

    rows = []
    own = module.hidden_states
    monkeypatch.setattr(module, "hidden_states", lambda *args: rows.append(own(*args)) or rows[-1])
    start = list(range(5, 65))
    texts = [[*start, one] for one in range(3, 13)]
    engine = PoolingEngine(pooling_model("qwen3"))
    rows.clear()
    assert len(data_of(engine, texts)) == 10
    assert [len(one) for one in rows] == [70]
    encoder = PoolingEngine(pooling_model("bert"))
    rows.clear()
    assert len(data_of(encoder, [*texts, *texts])) == 20
    assert [len(one) for one in rows] == [610]


def test_the_size_of_a_forward_is_bounded_and_progress_is_told():
    engine = PoolingEngine(pooling_model("bert"), max_num_batched_tokens=50, max_num_seqs=3)
    told: list[int] = []
    texts = ragged_texts((40, 10, 10, 90, 1, 1, 1, 1))
    assert len(engine.pool(inputs_of(texts), progress=told.append)) == len(texts)
    assert sum(told) == len(texts)
    assert max(told) <= 3
    assert engine.num_tokens == sum(map(len, texts))


@pytest.mark.parametrize(
    ("texts", "params", "message"),
    [
        ([[5], []], {}, r"prompt 1 must have >= 1 and <= 128 tokens, got 0"),
        ([[5] * 129], {}, r"prompt must have >= 1 and <= 128 tokens, got 129"),
        ([[5, 331]], {}, r"prompt must have token ids from 0 to 330, got 331"),
        ([[5]], {"task": "classify"}, r"task must be one of embed, token_embed, got 'classify' of BertModel"),
    ],
)
def test_what_does_not_fit_is_one_sentence(texts, params, message):
    engine = PoolingEngine(pooling_model("bert"))
    with pytest.raises(ToolkitError, match=message):
        data_of(engine, texts, **params)


def test_parameters_are_checked_when_they_are_made():
    with pytest.raises(ToolkitError, match="pooling_type must be one of LAST, MEAN, CLS, ALL, got 'first'"):
        PoolerConfig(pooling_type="first")
    with pytest.raises(ToolkitError, match="normalize must be equal to use_activation"):
        PoolingParams(normalize=True, use_activation=False)
    with pytest.raises(ToolkitError, match="max_model_len must be <= 128"):
        PoolingEngine(pooling_model("bert"), max_model_len=129)
    engine = PoolingEngine(pooling_model("roberta"))
    with pytest.raises(ToolkitError, match="must not contain token 0, got one: the model takes it for padding"):
        data_of(engine, [[5, 0, 6]])


def test_models_whose_attention_is_not_proven_are_refused_with_the_reason():
    with pytest.raises(ToolkitError, match="attention of MPNetModel must be patched for a ragged batch"):
        PoolingEngine(pooling_model("mpnet"))
    with pytest.raises(ToolkitError, match="model CanineModel must be one that can be patched, got Not"):
        PoolingEngine(pooling_model("canine"))
    model = pooling_model("bert", SEQUENCES)
    model.classifier = Reversed(model.classifier)
    with pytest.raises(ToolkitError, match="head of BertForSequenceClassification must"):
        PoolingEngine(model)


class Reversed(torch.nn.Module):
    """Part of a head that depends on what was computed before it: the hidden states of an ordinary forward."""

    def __init__(self, own):
        super().__init__()
        self.own, self.calls = own, 0

    def forward(self, x):
        self.calls += 1
        return self.own(x) * self.calls


@pytest.mark.parametrize(("family", "settings"), [("albert", {"embedding_size": 32}), ("gpt2", {}), ("gpt_neox", {})])
def test_heads_of_other_forms(family, settings):
    plain, texts = pooling_model(family, SEQUENCES, **settings), ragged_texts()
    engine = PoolingEngine(pooling_model(family, SEQUENCES, **settings))
    for ids, got in zip(texts, data_of(engine, texts, use_activation=False), strict=True):
        torch.testing.assert_close(got, logits_of(plain, ids), rtol=1e-5, atol=3e-5)


def test_half_types_are_close_and_batch_invariant():
    plain, texts = pooling_model("qwen3").bfloat16(), ragged_texts((9, 33, 4))
    engine = PoolingEngine(pooling_model("qwen3").bfloat16())
    together = data_of(engine, texts)
    assert together[0].dtype == torch.float32
    for ids, got in zip(texts, together, strict=True):
        torch.testing.assert_close(got, F.normalize(hidden_of(plain, ids)[-1].float(), dim=0), rtol=0, atol=2e-2)
        assert torch.equal(data_of(engine, [ids])[0], got)


def test_a_head_may_call_the_forward_of_its_class():
    plain, model = pooling_model("qwen3", SEQUENCES), pooling_model("qwen3", SEQUENCES)

    class Negated(type(model)):
        def forward(self, input_ids=None, **given):
            output = super().forward(input_ids, **given)
            output.logits = -output.logits
            return output

    model.__class__ = Negated
    got = data_of(PoolingEngine(model), [[5, 6, 7]], use_activation=False)[0]
    torch.testing.assert_close(got, -logits_of(plain, [5, 6, 7]), **CLOSE)
