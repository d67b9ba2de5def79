"""An OpenAI-compatible HTTP server on the engine.

``openai``     OpenAI's protocol: bodies of requests and responses, routes
``generation`` requests that generate in any protocol
``metrics``    counters and histograms in Prometheus' text format
``base``       what the routes of every model share
``app``        the application: protocols on ``base``
``pooling``    the routes of a model of embeddings, scores and classes
``server``     the listening socket, signals and the clean shutdown
"""
