"""The documentation site builds without a warning, and the first page's figures are the committed results."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_documentation_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "tour" / "index.html").is_file()


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation, page.name


def test_the_tests_that_the_robustness_page_names_exist():
    named = re.findall(r"`(tests/[a-z_/]+\.py)`", (ROOT / "docs" / "robustness.md").read_text())
    assert len(named) > 30
    assert [file for file in named if not (ROOT / file).is_file()] == []


def test_the_readme_s_table_is_that_of_the_results():
    from benchmarks.picture import rows, table

    assert table(rows()) in (ROOT / "README.md").read_text()


def test_the_picture_is_that_of_the_results(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    from benchmarks.picture import PICTURE, plot, rows

    assert plot(rows(), tmp_path / "picture.svg").read_text() == PICTURE.read_text()
