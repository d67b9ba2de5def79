"""uvicorn's HTTP/1.1 connection, with an end for clients that never finish a request, and for garbage behind one."""

import asyncio
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class _UntilClosed:
    """A transport that is written to until it is closing.

    uvicorn learns that a client has left when the event loop turns. What is sent for it before that goes nowhere, and
    asyncio would complain of it on standard error ("socket.send() raised exception").
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(H11Protocol):
    """One connection. ``timeout_keep_alive`` bounds the wait for the head of a request, and pauses in its body.

    uvicorn sets it between two requests only, and stops it with the next byte: a client that connects and sends
    nothing, or a byte a minute, would hold a file descriptor for good.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_UntilClosed(transport))  # type: ignore[arg-type]
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        self.conn.receive_data(data)  # the timer runs until ``handle_events`` finds a request
        self.handle_events()
        if self._under_way:
            self._unset_keepalive_if_required()
            if self.cycle.more_body:
                self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.end_upload)

    def send_400_response(self, msg: str) -> None:
        """Garbage gets a 400 where no response has begun, and ends the connection in any case."""
        self._lose_client()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def shutdown(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()  # a second close() would make asyncio's TLS transport forget its connection
        else:
            super().shutdown()

    def end_upload(self) -> None:
        """End the connection if the body of its request has not arrived."""
        if self._under_way and self.cycle.more_body:
            self._lose_client()
            self.transport.abort()

    def drop_idle(self) -> None:
        """End the connection at once if it has neither a request nor anything to send."""
        if not self._under_way and not self.transport.get_write_buffer_size():
            self.transport.abort()

    @property
    def _under_way(self) -> bool:
        return cast("object | None", self.cycle) is not None and not self.cycle.response_complete

    def _lose_client(self) -> None:
        """What a disconnect does to the request that is under way: nothing more is sent for it."""
        if self._under_way:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
