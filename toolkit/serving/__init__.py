"""An OpenAI-compatible HTTP server on the engine.

``protocol``   what a request may say, checked before the engine sees it
``responses``  what an answer looks like
``runner``     the one thread that steps the engine, and the tickets that wait on it
``metrics``    counters and histograms in Prometheus' text format
``app``        the routes
``server``     the listening socket, signals and the clean shutdown
"""
