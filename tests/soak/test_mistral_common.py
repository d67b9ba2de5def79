"""A checkpoint of Mistral's with tekken.json alone: texts, chats and calls get the tokens of mistral-common."""

import pytest

from tests.helpers.client_environments import ROOT, client_environment, run_script

PACKAGES = ["mistral-common==1.13.1", "tiktoken==0.14.0", "pydantic-extra-types==2.11.1", "pycountry==26.2.16"]


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_texts_and_chats_have_the_tokens_of_mistral_common(tmp_path):
    # Without what it depends on: its bound on numpy leaves this environment's out, with which it works.
    python = client_environment(tmp_path, "mistral-common", ["--no-deps", *PACKAGES], beside=True)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    found = run_script(python, "mistral_common_tokens.py", folder, str(folder), PYTHONPATH=str(ROOT))
    assert len(found) == 11
    for theirs, ours in found:
        assert len(theirs) > 1
        assert ours == theirs
