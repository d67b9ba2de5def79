"""The page of a training run: what ``toolkit watch`` and ``toolkit serve --watch`` show of its folder.

``lines``  a file of steps that grows while it is read
``run``    what the page asks for
``server`` the page alone, on the standard library's server: neither torch nor a web framework is loaded
``routes`` the same beside a served model
"""
