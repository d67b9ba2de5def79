"""An OpenAI-compatible HTTP server on the engine.

``protocol``   request bodies, checked before the engine sees them
``responses``  response bodies
``metrics``    counters and histograms in Prometheus' text format
``app``        the routes
``server``     the listening socket, signals and the clean shutdown
"""
