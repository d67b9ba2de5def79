"""Connections whose client is gone: what is still sent goes nowhere, without a word on standard error."""

import asyncio
import logging
import socket

import uvicorn
from uvicorn.server import ServerState

from toolkit.serving.connection import Connection

CHUNKS = 20
"""More than the five writes after which asyncio complains."""


def test_what_is_sent_for_a_client_that_has_left_is_not_complained_of(caplog):
    ours, theirs = socket.socketpair()
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        theirs.close()
        for at in range(CHUNKS):  # in one turn of the event loop, which therefore has not seen that they left
            await send({"type": "http.response.body", "body": b"x" * 100, "more_body": at < CHUNKS - 1})
            sent.append(at)

    async def run():
        config = uvicorn.Config(app, http=Connection, ws="none", log_config=None)
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        theirs.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        transport, _ = await loop.connect_accepted_socket(lambda: Connection(config, state, {}, loop), ours)
        while not state.tasks and not sent:
            await asyncio.sleep(0)
        await asyncio.gather(*state.tasks)
        transport.abort()

    with caplog.at_level(logging.WARNING):
        asyncio.run(asyncio.wait_for(run(), 30))
    assert len(sent) == CHUNKS
    assert not caplog.records, caplog.text
