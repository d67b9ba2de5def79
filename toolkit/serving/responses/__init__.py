"""OpenAI's Responses, without a store: every request has its whole conversation.

``items``      input items
``requests``   the body of a request, checked before the engine sees it
``output``     output items as they come, and their events
``writer``     bodies and events of responses
``schemas``    the same as the OpenAPI document describes them
``routes``     ``/v1/responses``
"""
