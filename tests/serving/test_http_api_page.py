"""The page of all endpoints is made of the code, and has a text for what clients send."""

from toolkit.serving.field_texts import entries, field_texts
from toolkit.serving.tokens.requests import GenerateRequest, TokenSampling
from tools.http_api import COMMAND, PAGE, page


def test_the_page_is_that_of_the_code():
    made = page()
    assert PAGE.read_text(encoding="utf-8") == made, f"docs/http-api.md is not up to date; `{COMMAND}` writes it."
    for path in ("POST /v1/completions", "POST /update_weights", "GET /server_info", "POST /v1/embeddings"):
        assert made.count(f"### `{path}`") == 1
    assert "| `weight_dir` | text |  | a folder of safetensors files that the server can read. |" in made
    assert "| `max_tokens` | integer (≥ 0) |  | most tokens of a completion;" in made


def test_texts_of_fields_are_those_of_docstrings():
    text = """First line.

    Args:
        one: a text
            of two lines.
        two, three: for both.

    Raises:
        Error: no field.
    """
    assert entries(text) == {"one": "a text of two lines.", "two": "for both.", "three": "for both."}
    assert field_texts(GenerateRequest)["token_ids"] == "the prompt."
    assert field_texts(TokenSampling)["logprobs"].startswith("alternatives at each token; 0 for")
    assert field_texts(TokenSampling)["temperature"].startswith("divides the logits")
