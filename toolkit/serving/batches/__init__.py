"""OpenAI's files and batches, and batches without a server.

``calls``    a request to the application in the same process: what a batch asks goes through the code of every request
``lines``    the lines of an input file, and those of output files
``runner``   runs lines, so many at a time
``files``    files in a folder
``jobs``     the batches of a server
``schemas``  their objects
``routes``   ``/v1/files`` and ``/v1/batches``
"""
