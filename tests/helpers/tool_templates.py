"""Short chat templates that show tools, calls, results and reasoning, in the syntaxes of some families."""

_LINE = "{{ '\\n' }}"  # Jinja drops a newline behind a block
_MESSAGES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}" + _LINE
    + "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}CALL{% if not loop.last %}" + _LINE + "{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
)  # fmt: skip
_TOOLS = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
)
_PROMPT = (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_EFFORT = "{% if reasoning_effort %}effort {{ reasoning_effort }}\n{% endif %}"
_DOCUMENTS = "{% for d in documents or [] %}document {{ d.title }}\n{% endfor %}"


def _template(call: str) -> str:
    return _EFFORT + _DOCUMENTS + _TOOLS + _MESSAGES.replace("CALL", call) + _PROMPT


HERMES = _template(
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
)
CODER = _template(
    "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments | items %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
)
LLAMA = _template('<|python_tag|>{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}')
