"""How the toolkit's structures enter another inference framework: one file per framework.

``generate`` (pipelines with it) and ``continuous_batching``, with its ``engine_manager``, are transformers'; ``route``
and ``generation_config`` are what they share. ``ray`` generates in actors of Ray.

Each file takes a patched model into a framework and out again, and imports the framework only when it is used. The
toolkit's own inference needs none of them: ``toolkit.Engine`` runs a patched model, and ``toolkit serve`` serves it.
"""
