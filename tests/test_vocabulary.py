"""The words that stay out: the list finds them, and the project is free of them."""

from pathlib import Path

from tools.vocabulary import ROOT, files, uses


def test_the_project_is_free_of_the_words_that_stay_out():
    found = [str(use) for path in files([ROOT]) for use in uses(path)]
    assert not found, "\n".join(found[:50])


def test_names_texts_and_messages_are_looked_at(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Rows keep their bits in any company."""\n'
        "def drawn_rows(place):  # the likeliest one\n"
        '    raise ValueError(f"place is {place}; allowed are 0 and 1.")\n'
    )
    words = [use.word.lower() for use in uses(path)]
    assert words.count("keep their bits") == words.count("company") == words.count("likeliest") == 1
    assert words.count("drawn_rows") == words.count("allowed are") == 1
    assert "place" in words


def test_triton_bodies_keep_their_local_names_and_prose_does_not(tmp_path):
    path = tmp_path / "triton_rows.py"
    path.write_text("wide = 1  # mixtures of experts\n")
    assert [use.word for use in uses(path)] == ["mixtures of experts"]


def test_the_files_that_are_looked_at():
    named = {path.relative_to(ROOT).as_posix() for path in files([ROOT])}
    assert {"README.md", "toolkit/ops/native/matmul.h", "recipes/grpo.yaml", "docs/glossary.md"} <= named
    assert not any(name.startswith((".venv", "benchmarks/results")) for name in named)
    assert Path("tools/vocabulary.py").as_posix() not in named
