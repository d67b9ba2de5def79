"""lm-eval's ``local-completions`` and ``local-chat-completions`` against a server, beside its own ``hf`` backend.

The tasks and their data are written here. lm-eval is installed beside this environment's packages.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.client_environments import client_environment, run_client
from tests.helpers.engine_tokenizers import byte_level
from tests.helpers.server_process import serving
from toolkit.testing.models import random_model

VERSION = "0.4.13"
NEW_TOKENS = 12
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "not", "amused", "café", "日本", "naïve"]
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}reply:{% endif %}"
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = """output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
"""

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with lm-eval, beside this environment's packages."""
    return client_environment(
        tmp_path_factory.mktemp("environment"), "lm-eval", [f"lm_eval[api]=={VERSION}"], beside=True
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


def write_tasks(folder: Path) -> None:
    """Fill a folder with a model and two tasks, some of whose answers are what the model says."""
    chance = random.Random(1)
    model, tokenizer = random_model("llama", vocabulary=300), byte_level()
    with torch.no_grad():  # what it writes is text: bytes that are none read otherwise behind a prompt than alone
        for token in range(300):
            if "\ufffd" in tokenizer.decode([token]) or token in tokenizer.all_special_ids:
                model.lm_head.weight[token] = 0
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    def text(count: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(count))

    def said(question: str, count: int) -> list[int]:
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        how: Any = {"do_sample": False, "max_new_tokens": count, "eos_token_id": 0, "pad_token_id": 0}
        found: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, ids.shape[1] :].tolist()
        return found

    choices, texts = [], []
    for at in range(40):
        question = text(chance.randint(1, 12))
        wrong = [" " + text(chance.randint(1, 4)) for _ in range(3)]
        first = tokenizer.decode(said(question, 1))
        whole = tokenizer(question)["input_ids"] + said(question, 1)
        right = first if tokenizer(question + first)["input_ids"] == whole else " " + text(1)
        choices.append({"question": question, "choices": [right, *wrong], "answer": at % 2})
        reply = tokenizer.decode(said(question, NEW_TOKENS), skip_special_tokens=True)
        texts.append({"question": question, "answer": reply if at % 2 else text(2)})
    (folder / "yaml").mkdir()
    for name, rows, rest in (("choice", choices, CHOICE), ("generate", texts[:12], GENERATE)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "yaml" / f"{name}.yaml").write_text(TASK.format(name=f"local_{name}", data=data) + rest)


def evaluated(python: str, folder: Path, out: str, model: str, arguments: str, tasks: str, *more: str) -> Any:
    """(scores, the responses of each task's samples) of a run of lm-eval."""
    command = [
        python, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments, "--tasks", tasks,
        "--include_path", str(folder / "yaml"), "--log_samples", "--output_path", str(folder / out), *more,
    ]  # fmt: skip
    run_client(command, folder)
    (results,) = (folder / out).rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    samples = {}
    for path in (folder / out).rglob("samples_*.jsonl"):
        rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
        samples[path.name.split("_20")[0].removeprefix("samples_")] = [row["filtered_resps"] for row in rows]
    return {name: {metric: of[metric] for metric in of if "," in metric} for name, of in scores.items()}, samples


@pytest.fixture(scope="module")
def expected(python: str, tasks: Path) -> Any:
    arguments = "pretrained=model,dtype=float32"
    return evaluated(python, tasks, "hf", "hf", arguments, "local_choice,local_generate", "--device", "cpu")


@pytest.mark.parametrize("tokenized", [True, False])
def test_completions_have_the_scores_of_the_hf_backend(
    python: str, tasks: Path, expected: Any, tokenized: bool
) -> None:
    with serving(tasks / "model", "--port", "0", "--max-model-len", "256") as server:
        arguments = (
            f"model=model,base_url={server.url}/v1/completions,tokenizer=model,tokenizer_backend=huggingface,"
            f"tokenized_requests={tokenized},num_concurrent=4,max_retries=1,max_length=255"
        )
        found = evaluated(
            python, tasks, f"completions-{tokenized}", "local-completions", arguments, "local_choice,local_generate"
        )
    assert found[0] == expected[0]
    assert 0 < expected[0]["local_choice"]["acc,none"] < 1
    assert 0 < expected[0]["local_generate"]["exact_match,none"] < 1
    assert found[1]["local_generate"] == expected[1]["local_generate"]
    flags = set()
    for mine, theirs in zip(found[1]["local_choice"], expected[1]["local_choice"], strict=True):
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
        assert [float(value) for value, _ in mine] == pytest.approx([float(value) for value, _ in theirs], abs=1e-3)
        flags |= {greedy for _, greedy in theirs}
    assert flags == {"True", "False"}


def test_chats_have_the_texts_of_the_hf_backend(python: str, tasks: Path) -> None:
    chat = "--apply_chat_template"
    arguments = "pretrained=model,dtype=float32"
    theirs = evaluated(python, tasks, "hf-chat", "hf", arguments, "local_generate", chat, "--device", "cpu")
    with serving(tasks / "model", "--port", "0", "--max-model-len", "256") as server:
        arguments = f"model=model,base_url={server.url}/v1/chat/completions,num_concurrent=4,max_retries=1"
        mine = evaluated(python, tasks, "chat", "local-chat-completions", arguments, "local_generate", chat)
    assert mine == theirs
