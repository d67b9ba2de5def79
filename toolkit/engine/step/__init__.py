"""The captured step: what a decode step runs, recorded once and replayed without the model's Python.

``graph`` records the ops of a forward, ``passes`` and ``layer_passes`` shorten what was recorded, an executor runs it:
``native`` as one call of the native library, ``straight_line`` as Python, one call an op. ``decode_graphs`` keeps one
graph per batch size and drops it when the model is no longer what it was captured from. ``inputs`` is the memory that a
step reads, ``sampling`` how it samples its rows.
"""
