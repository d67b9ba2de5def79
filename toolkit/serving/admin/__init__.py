"""What operators and trainers ask of a server: vLLM's endpoints of these names, behind an admin key.

``control``  sleeping, pausing, aborting, caches
``weights``  new weights while it serves
``info``     what is served, and by which numerics
``schemas``  bodies of requests and responses
``routes``   all of them
"""
