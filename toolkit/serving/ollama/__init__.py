"""Ollama's protocol.

``requests``   bodies of requests, checked before the engine sees them
``responses``  bodies and lines of responses, and errors
``schemas``    the same as the OpenAPI document describes them
``about``      routes that say what is served
``routes``     ``/api/chat`` and ``/api/generate``
"""
