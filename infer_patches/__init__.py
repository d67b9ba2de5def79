"""How the toolkit's structures enter an inference stack that is not its own: one file a host.

``generate`` (pipelines with it) and ``continuous_batching`` are hosts; ``route`` and ``generation_config`` are what
they share.

A host is what drives the model there, such as transformers' ``generate``. Each file takes a patched model
into that host and out again, and imports the host only when it is used. Inference in the toolkit's own hands
needs none of them: ``toolkit.Engine`` drives a patched model, and ``toolkit serve`` answers requests on it.
"""
