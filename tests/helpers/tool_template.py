"""A chat template of a model that reasons and calls tools, its syntax that of Hermes and Qwen 3."""

TEMPLATE = (
    "{% if tools %}tools: {% for t in tools %}{{ t.function | tojson }}{% endfor %}; call as "
    '<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>\n{% endif %}'
    "{% for m in messages %}{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: "
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}"
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
REASONED_CALL = ["<th", "ink>\nI ", "wonder.\n</think>\n\n", "Let me ", "look.", "\n<tool_call>\n{", '"na', 'me": "wea',
                 'ther", "arguments": {"ci', 'ty": "Oslo"}}\n', "</tool_call>"]  # fmt: skip
"""A reply with reasoning, text and a call, in chunks that cut markers."""
