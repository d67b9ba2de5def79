"""Token ids in, token ids out: vLLM's ``/inference/v1/generate``, which trainers speak.

``requests``   its body
``responses``  its responses and events, with the weight version of each token
``routes``     the route
"""
