"""``toolkit export`` and ``toolkit coverage --export``: what they print, and when they fail."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.pooling_models import HEADLESS, SEQUENCES, pooling_model
from tests.helpers.tokenizers import make_tokenizer
from toolkit.cli import main
from toolkit.engine.pooling import PoolingEngine, PoolingInput
from toolkit.errors import ToolkitError
from toolkit.exporting import MANIFEST, export
from toolkit.loading import choose_runner, find_source, load_model
from toolkit.testing.export_coverage import equal_tokens
from toolkit.testing.models import random_model, tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    return str(export(random_model("llama", hidden=32, vocabulary=340), folder, tokenizer=make_tokenizer()))


def test_a_folder_is_written_and_compared(saved, tmp_path, capsys):
    assert main(["export", saved, str(tmp_path / "out")]) == 0
    assert "8 of 8 prompts give the same 64 greedy tokens" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / MANIFEST).read_text())["proof"]["prompts"]) == 8


def test_without_a_check_there_is_no_proof(saved, tmp_path):
    assert main(["export", saved, str(tmp_path / "out"), "--no-check"]) == 0
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["proof"] is None


def test_llama_cpp_generates_the_engines_tokens(saved, tmp_path, capsys):
    pytest.importorskip("xllamacpp", reason="needs xllamacpp, which opens GGUF files")
    assert main(["export", saved, str(tmp_path / "out"), "--to", "gguf", "--quantise", "f32"]) == 0
    out = capsys.readouterr().out
    assert "xllamacpp" in out
    assert "8 of 8 prompts" in out


def test_other_tokens_of_a_lossless_export_fail(saved, tmp_path, capsys, monkeypatch):
    from toolkit.exporting.hf import HuggingFace

    real = HuggingFace.consume

    def changed(self, folder, prompts, max_tokens):
        output = real(self, folder, prompts, max_tokens)
        output.outputs[0][5] += 1
        return output

    monkeypatch.setattr(HuggingFace, "consume", changed)
    assert main(["export", saved, str(tmp_path / "out")]) == 1
    assert "7 of 8 prompts" in capsys.readouterr().out


def test_the_matrix_of_families_and_targets(capsys):
    assert main(["coverage", "--export", "llama", "mamba2", "--to", "hf", "gguf"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| family | hf | gguf f32 | gguf bf16")
    assert lines[2].startswith("| llama | 48 of 48 | ")
    assert lines[3].startswith("| mamba2 | 48 of 48 | refused | refused")
    assert lines[5].startswith("- An export to 'gguf': model_type must be one of llama")


@pytest.mark.parametrize(("other", "count"), [([1, 2, 3], 3), ([1, 5, 3], 1), ([0, 2, 3], 0)])
def test_tokens_count_to_the_first_difference(other, count):
    assert equal_tokens([1, 2, 3], other) == count


def test_a_family_that_is_not_measured_is_a_sentence(capsys):
    assert main(["coverage", "--export", "lama"]) == 2
    assert "architecture must be one of llama, " in capsys.readouterr().err


def pooled(folder):
    """What the engine makes of a text by a model as its folder says."""
    _, settings = choose_runner(find_source(folder))
    engine = PoolingEngine(load_model(folder, runner="pooling")[0], pooler_config=settings)
    return engine.pool([PoolingInput([5, 6, 7, 8])])[0].data


@pytest.mark.parametrize(("opener", "head"), [(HEADLESS, None), (SEQUENCES, "score.weight")])
def test_pooling_models_are_exported_with_their_heads_and_their_pooling(opener, head, tmp_path, capsys):
    folder, out = tmp_path / "saved", tmp_path / "out"
    pooling_model("qwen3", opener).save_pretrained(folder)
    tiny_tokenizer(331).save_pretrained(folder)
    if head is None:
        kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds.items()]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    assert main(["export", str(folder), str(out)]) == 0
    assert "8 of 8 prompts give the same output" in capsys.readouterr().out
    before, after = (pooled(str(one)) for one in (folder, out))
    assert torch.equal(before, after)
    assert head is None or torch.equal(*(load_file(one / "model.safetensors")[head] for one in (folder, out)))
    with pytest.raises(ToolkitError, match="'torch-export' holds causal language models, got a Qwen3"):
        export(load_model(str(folder), runner="pooling")[0], tmp_path / "program", "torch-export")
