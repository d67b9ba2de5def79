"""inspect-ai's evaluation of a served model: texts, and a tool that the model calls. Arguments: URL, expected text."""

import json
import os
import sys

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageTool, GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import ToolFunction, tool

url, expected = sys.argv[1:]
os.environ |= {"TOOLKIT_API_KEY": "-", "TOOLKIT_BASE_URL": f"{url}/v1"}
QUESTION = "the quick brown fox"
GREEDY = GenerateConfig(temperature=0, max_tokens=8, max_retries=0)


@tool
def turn():
    async def execute(side: str) -> str:
        """Turn to a side.

        Args:
            side: "left" or "right".
        """
        return f"turned {side[:4]}"

    return execute


def model(provider: str, **arguments):
    return get_model(f"{provider}/tiny", base_url=f"{url}/v1", api_key="-", **arguments)


def evaluated(task: Task, of, config: GenerateConfig):
    (log,) = eval(
        task, model=of, display="none", log_dir="logs", log_format="json", **config.model_dump(exclude_none=True)
    )
    assert log.status == "success", log.error
    return log


def counts(usage) -> list[int]:
    """(tokens of the prompt, of the output); inspect-ai counts cached ones apart."""
    return [usage.input_tokens + (usage.input_tokens_cache_read or 0), usage.output_tokens]


found = {}
samples = [Sample(input=QUESTION, target=expected), Sample(input=QUESTION, target="never said")]
for provider, arguments in {"openai-api/toolkit": {}, "vllm": {}, "openai": {"responses_api": True}}.items():
    log = evaluated(Task(dataset=samples, solver=generate(), scorer=includes()), model(provider, **arguments), GREEDY)
    found[provider] = {
        "texts": [one.output.completion for one in log.samples],
        "accuracy": log.results.scores[0].metrics["accuracy"].value,
        "usage": [counts(one.output.usage) for one in log.samples],
    }
calling = Task(
    dataset=samples[:1], solver=[use_tools(turn(), tool_choice=ToolFunction("turn")), generate(tool_calls="single")]
)
log = evaluated(calling, model("openai-api/toolkit"), GenerateConfig(temperature=0, max_tokens=200, max_retries=0))
results = [one for one in log.samples[0].messages if isinstance(one, ChatMessageTool)]
found["tool"] = [[one.function, one.text, one.error and one.error.message] for one in results]
print(json.dumps(found))
