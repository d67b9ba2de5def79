"""OpenAI's protocol.

``completion_request``, ``requests``  bodies of completions and of chats, checked before the engine sees them
``sampling``  what they share; ``forms``, ``vllm_fields`` parts of it
``completion_prompts``  prompts of completions as token ids, and what of them is echoed
``responses``, ``chat_response``  bodies and events of responses
``schemas``    the same as the OpenAPI document describes them
``routes``     ``/v1/completions`` and ``/v1/chat/completions``
"""
