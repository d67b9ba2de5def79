"""``toolkit coverage`` on a few architectures: what the pages in docs say of them still holds."""

import re
from pathlib import Path

import pytest

from toolkit.cli import main
from toolkit.cli.coverage import page, totals
from toolkit.testing.architectures import architectures, small_config
from toolkit.testing.coverage import COLUMNS, Row
from toolkit.testing.image_inputs import special

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {"causal": DOCS / "coverage.md", "image-text": DOCS / "coverage-image-text.md"}
ROW = re.compile(r"^\| ([\w.-]+) \| (covered|unsupported|wrong) \|.*\|$", re.MULTILINE)
COMPARED = {  # what is particular about each
    "gpt2": "a GPT-2: weights [K, N]",
    "opt": "scales its queries itself; the gradient of its keys' bias is 0",
    "cohere": "rotary tables with each frequency repeated, logits scaled",
    "deepseek_v2": "complex rotary tables, latent attention, shared experts",
    "dbrx": "experts in a layout that no other model has",
    "gemma3_text": "rotary tables of two kinds",
    "gpt_bigcode": "one key for all heads",
    "nemotron_h": "layers without state, and MoE layers",
    "olmo": "norms without weights",
    "phi3": "packed projections",
    "qwen3_5": "a hybrid whose positions lie along axes",
    "zamba2": "a hybrid with shared layers",
    "bart": "computes positions from a token's row in the batch",
    "bloom": "attention that does not dispatch through the interface",
}
FEW = ("gpt2", "deepseek_v2", "bart")


def written(kind: str = "causal") -> dict[str, str]:
    return dict(ROW.findall(PAGES[kind].read_text()))


@pytest.mark.parametrize("kind", PAGES)
def test_the_page_has_a_row_for_each_architecture_and_none_is_wrong(kind):
    verdicts = written(kind)
    assert set(verdicts) == set(architectures(kind))
    assert "wrong" not in verdicts.values()
    covered = list(verdicts.values()).count("covered")
    assert f"**{covered} covered, {len(verdicts) - covered} unsupported, 0 wrong.**" in PAGES[kind].read_text()


@pytest.mark.parametrize("kind", PAGES)
def test_unsupported_architectures_have_reasons(kind):
    for line in PAGES[kind].read_text().splitlines():
        if "| unsupported |" in line:
            assert len(line.rstrip("| ").rpartition("|")[2]) > 20, line


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "names", [FEW, pytest.param(tuple(COMPARED), marks=pytest.mark.sweep)], ids=["few", "all kinds"]
)
def test_architectures_are_as_the_page_says(names, capsys, tmp_path):
    assert main(["coverage", *names, "--workers", "1", "--write", str(tmp_path / "page.md")]) == 0
    verdicts = written()
    found = dict(ROW.findall(capsys.readouterr().out))
    assert found == {name: verdicts[name] for name in names}
    assert dict(ROW.findall((tmp_path / "page.md").read_text())) == found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "names",
    [
        ("llava",),
        pytest.param(
            ("qwen3_5", "gemma3", "llava_next", "idefics3", "internvl", "kimi_k25", "qwen3_omni_moe_thinker"),
            marks=pytest.mark.sweep,
        ),
    ],
    ids=["one", "several layouts of pixels"],
)
def test_models_of_images_and_text_are_measured(names, tmp_path):
    path = tmp_path / "page.md"
    assert main(["coverage", "--kind", "image-text", *names, "--workers", "1", "--write", str(path)]) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in path.read_text().splitlines()]
    header = next(cells for cells in lines if cells[:2] == ["architecture", "verdict"])
    rows = {cells[0]: dict(zip(header, cells)) for cells in lines if len(cells) == len(header)}
    for name in names:
        row = rows[name]
        assert row["verdict"] == written("image-text")[name] == "covered", row
        assert float(row["image loss"]) <= 1e-5, row
        assert float(row["image gradient"]) <= 1e-4, row
        assert row["export"] == "yes", row


def test_small_models_of_images_have_distinct_special_tokens_and_fitting_sizes():
    config = small_config("qwen2_5_vl", kind="image-text")
    tokens = {
        name: value for name, value in config.to_dict().items() if name.endswith("_token_id") and value is not None
    }
    assert len(set(tokens.values())) == len(tokens)
    assert max(tokens.values()) < 40
    text = config.text_config
    assert sum(text.rope_parameters["mrope_section"]) == text.hidden_size // text.num_attention_heads // 2
    vision = config.vision_config
    assert vision.out_hidden_size == text.hidden_size
    assert max(vision.fullatt_block_indexes) < vision.depth
    assert small_config("llava", kind="image-text").vision_config.image_size == 4 * 14


def test_a_special_token_is_found_beside_fields_that_differ_by_layer():
    config = small_config("dots3_note", kind="image-text")
    assert special(config, "image", "token") == config.image_token_id
    assert special(config, "no", "such", "token") is None


def test_a_wrong_number_is_told(capsys, monkeypatch):
    columns = COLUMNS["causal"]
    rows = [
        Row("some", columns, roles={"norm": 1}, values={"loss": 2e-3}),
        Row("other", columns, reason="patch: it cannot be made"),
    ]
    monkeypatch.setattr("toolkit.testing.coverage.measure_all", lambda *_, **__: rows)
    assert main(["coverage", "gpt2", "opt"]) == 1
    assert totals(rows) == "0 covered, 1 unsupported, 1 wrong"
    assert "| some | wrong | 1 norm |" in page(rows)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["lama"], "architecture must be a model type of transformers, got 'lama'; did you mean"),
        (["gpt2", "--workers", "0"], "--workers must be >= 1, got 0."),
    ],
)
def test_bad_input_is_named(arguments, told, capsys):
    assert main(["coverage", *arguments]) == 2
    assert told in capsys.readouterr().err
