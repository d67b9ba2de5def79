"""guidellm in a separate environment: a load of chats and of completions; what it counts is what was asked."""

import json

import pytest

from tests.helpers.client_environments import client_environment, run_client
from tests.helpers.server_process import serving

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]
REQUESTS, PROMPT, OUTPUT = 12, 24, 8


@pytest.fixture(scope="module")
def reports(talking_model, tmp_path_factory):
    """By request format: guidellm's benchmark, as it writes it."""
    folder = tmp_path_factory.mktemp("guidellm")
    python = client_environment(folder, "guidellm", ["guidellm==0.8.1"], ["torch==2.13.0"])
    found = {}
    with serving(talking_model, "--port", "0", "--max-model-len", "512") as server:
        for name in ("chat/completions", "completions", "responses"):
            out = folder / f"{name.replace('/', '-')}.json"
            run_client(
                [
                    python.replace("python", "guidellm"), "run", "--disable-console",
                    "--backend", f"kind=openai_http,target={server.url},model=tiny,request_format=/v1/{name}",
                    "--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={REQUESTS}",
                    "--tokenizer", f"kind=hf_auto,model={talking_model}",
                    "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
                    "--output", f"kind=json,path={out}",
                ],
                folder,
            )  # fmt: skip
            (found[name],) = json.loads(out.read_text())["benchmarks"]
    return found


@pytest.mark.parametrize("name", ["chat/completions", "completions", "responses"])
def test_every_request_has_the_tokens_that_were_asked_for(reports, name):
    requests = reports[name]["requests"]
    failed = [*requests["errored"], *requests["incomplete"]]
    assert not failed, failed[0]
    assert len(requests["successful"]) == REQUESTS
    for one in requests["successful"]:
        assert one["output_metrics"]["text_tokens"] == OUTPUT
