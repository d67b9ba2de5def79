"""Anthropic's protocol.

``blocks``     content blocks of messages in requests
``requests``   bodies of requests, checked before the engine sees them
``responses``  bodies and events of responses
``schemas``    the same as the OpenAPI document describes them
``routes``     ``/v1/messages`` and ``/v1/messages/count_tokens``
"""
