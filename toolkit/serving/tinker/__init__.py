"""Tinker's API: its client trains and samples LoRA adapters on the weights that are served.

``requests``  the bodies that are JSON
``messages``  the bodies and results that are protobuf
``promises``  results that clients ask for until they are there
``completions``  which of a sampling session's are there
``sessions``  what the routes share, and the routes of sessions and promises
``training``  the routes of training clients
``sampling``  the routes of samplers
``archive``   the routes of checkpoints: lists, lifetimes, downloads
``routes``    all of them
"""
