"""Pooling models from folders: sentence-transformers' files, checkpoints of other heads, and what is refused."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM

from tests.helpers.pooling_models import HEADLESS, SEQUENCES, TOKENS, hidden_of, pooling_model
from toolkit.engine.pooling import PoolingEngine, PoolingInput
from toolkit.errors import ToolkitError
from toolkit.loading import choose_runner, find_source, load_model, pooler_settings
from toolkit.testing.models import random_model

IDS = [5, 6, 7, 8, 9]
MODULES = "sentence_transformers.models"


def modules(folder, *kinds):
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": "3_Normalize"}
    found = [
        {"idx": at, "name": str(at), "path": paths.get(kind, kind), "type": f"{MODULES}.{kind}"}
        for at, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(found))


def pooling(folder, **modes):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **modes}))


def dense(folder, weight, bias):
    (folder / "2_Dense").mkdir()
    config = {"in_features": 64, "out_features": 24, "bias": True, "activation_function": "torch.nn.modules.Tanh"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense" / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    pooling_model("bert").save_pretrained(tmp_path)
    return tmp_path


def embedding(folder):
    runner, settings = choose_runner(find_source(folder))
    assert runner == "pooling"
    longest = settings.pop("max_model_len", None)
    model, _ = load_model(str(folder), runner=runner)
    engine = PoolingEngine(model, pooler_config=settings, max_model_len=longest)
    return engine, engine.pool([PoolingInput(IDS)])[0].data


@pytest.mark.parametrize(
    ("modes", "kind"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "MEAN"),
        ({"pooling_mode_cls_token": True}, "CLS"),
        ({"pooling_mode_lasttoken": True}, "LAST"),
        ({"pooling_mode": "mean"}, "MEAN"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_files_of_sentence_transformers_are_the_defaults(folder, modes, kind, normalize):
    modules(folder, "Transformer", "Pooling", *(["Normalize"] if normalize else []))
    pooling(folder, **modes)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 100, "do_lower_case": False}))
    engine, got = embedding(folder)
    assert (engine.pooling_type, engine.max_model_len) == (kind, 100)
    hidden = hidden_of(pooling_model("bert"), IDS)
    expected = {"MEAN": hidden.mean(0), "CLS": hidden[0], "LAST": hidden[-1]}[kind]
    torch.testing.assert_close(got, F.normalize(expected, dim=0) if normalize else expected, rtol=1e-5, atol=1e-5)


def test_dense_modules_are_projections(folder):
    modules(folder, "Transformer", "Pooling", "Dense", "Normalize")
    pooling(folder, pooling_mode_mean_tokens=True)
    source = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 64, generator=source), torch.randn(24, generator=source)
    dense(folder, weight, bias)
    expected = torch.tanh(hidden_of(pooling_model("bert"), IDS).mean(0) @ weight.T + bias)
    torch.testing.assert_close(embedding(folder)[1], F.normalize(expected, dim=0), rtol=1e-5, atol=1e-5)


def test_what_is_not_served_is_refused_by_name(folder):
    modules(folder, "Transformer", "WeightedLayerPooling")
    with pytest.raises(ToolkitError, match=r"got 'sentence_transformers\.models\.WeightedLayerPooling'"):
        pooler_settings(find_source(folder))
    modules(folder, "Transformer", "Pooling")
    pooling(folder, pooling_mode_max_tokens=True)
    with pytest.raises(ToolkitError, match="must ask for one of cls, mean and lasttoken pooling, got pooling_mode_max"):
        pooler_settings(find_source(folder))
    pooling(folder, pooling_mode_cls_token=True, pooling_mode_mean_tokens=True)
    with pytest.raises(ToolkitError, match="got pooling_mode_cls_token, pooling_mode_mean_tokens"):
        pooler_settings(find_source(folder))
    pooling(folder, pooling_mode_cls_token=True)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    with pytest.raises(ToolkitError, match=r"do_lower_case in .* must be false"):
        pooler_settings(find_source(folder))
    (folder / "modules.json").write_text("{}")
    with pytest.raises(ToolkitError, match="must be a JSON list of modules"):
        pooler_settings(find_source(folder))


@pytest.mark.parametrize(("opener", "task"), [(HEADLESS, "embed"), (SEQUENCES, "classify"), (TOKENS, "token_classify")])
def test_the_architecture_says_what_a_checkpoint_is_for(tmp_path, opener, task):
    pooling_model("qwen3", opener).save_pretrained(tmp_path)
    runner, settings = choose_runner(find_source(tmp_path))
    assert (runner, settings) == ("pooling", {})
    model, _ = load_model(str(tmp_path), runner=runner)
    assert PoolingEngine(model).tasks[0] == task


def test_a_model_that_generates_is_pooled_where_that_is_asked_for(tmp_path):
    model = random_model("qwen3")
    model.save_pretrained(tmp_path)
    source = find_source(tmp_path)
    assert choose_runner(source)[0] == "generate"
    assert choose_runner(source, "pooling")[0] == "pooling"
    loaded, _ = load_model(str(tmp_path), runner="pooling")
    got = PoolingEngine(loaded).pool([PoolingInput(IDS)])[0].data
    torch.testing.assert_close(got, F.normalize(hidden_of(model.model, IDS)[-1], dim=0), rtol=1e-5, atol=1e-5)
    modules(tmp_path, "Transformer", "Pooling", "Normalize")
    pooling(tmp_path, pooling_mode_lasttoken=True)
    assert choose_runner(source) == ("pooling", {"normalize": True, "projections": [], "pooling_type": "LAST"})
    assert choose_runner(source, "generate") == ("generate", {})
    with pytest.raises(ToolkitError, match="runner must be one of auto, generate, pooling, got 'draft'"):
        choose_runner(source, "draft")


def test_masked_language_models_are_embedded_without_the_pooler_that_they_lack(tmp_path):
    model = pooling_model("bert", AutoModelForMaskedLM)
    model.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path), runner="pooling")
    assert loaded.pooler is None
    engine = PoolingEngine(loaded, pooler_config={"pooling_type": "mean", "normalize": False})
    expected = hidden_of(model.bert, IDS).mean(0)
    torch.testing.assert_close(engine.pool([PoolingInput(IDS)])[0].data, expected, rtol=1e-5, atol=1e-5)
