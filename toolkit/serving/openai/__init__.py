"""OpenAI's protocol.

``requests``   bodies of requests, checked before the engine sees them
``forms``, ``vllm_fields``  parts of them
``responses``  bodies and events of responses
``schemas``    the same as the OpenAPI document describes them
``routes``     ``/v1/completions`` and ``/v1/chat/completions``
"""
