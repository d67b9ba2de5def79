"""An OpenAI-compatible HTTP server on the engine.

``protocol``   request bodies, checked before the engine sees them
``responses``  response bodies
``metrics``    counters and histograms in Prometheus' text format
``base``       what the routes of every model share
``app``        the routes of a model that generates
``pooling``    the routes of a model of embeddings, scores and classes
``server``     the listening socket, signals and the clean shutdown
"""
