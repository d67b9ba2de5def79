"""An application on a socket, in the process of the test."""

import threading
import time
from contextlib import contextmanager

import uvicorn


@contextmanager
def on_a_port(app):
    """The address of the application on a socket, for clients that want one."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
