"""A client's connection: how many there are at once, and how long a client may keep one without a whole request."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.api.errors import ApiError, response

LINGER_S = 1.0
"""For what a refused client still sends: closed at once, it might see a reset in the place of the answer."""

LINGERING = 64
"""Refused connections that are kept so long; more are closed at once."""


class Connection(H11Protocol):
    """uvicorn's, which by itself takes any number and waits for ever for the rest of a request.

    `most` connections are served, the next are told 503. A request that is not there `client_s` after its beginning is
    told 408; a client that takes nothing of its answer for as long is left. `failed` counts these by their status.
    """

    def __init__(
        self,
        *args: Any,
        most: int,
        client_s: float,
        failed: Callable[[int], None],
        lingering: "set[Connection]",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._most, self._client_s, self._failed, self._lingering = most, client_s, failed, lingering
        self._refused = False
        self._late: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Of asyncio's protocol, as all that follow."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that it is known whenever something waits to be taken
        if len(self.connections) > self._most:
            self.connections.discard(self)  # it takes nobody's place
            text = f"{self._most} connections are open already, the most here; try again later"
            self._refuse(ApiError(503, text, code="too_many_connections"))
        else:
            self._await_request()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        if self._refused:
            return
        super().data_received(data)
        self._await_request()

    def on_response_complete(self) -> None:
        """uvicorn's: the next request may have begun already; one that has not has uvicorn's own time for that."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._await_request()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, for what is not HTTP."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
        else:
            self._refuse(ApiError(400, f"not a request in HTTP: {msg}", code="invalid_http"))

    def pause_writing(self) -> None:
        """The client does not take what is written."""
        super().pause_writing()
        self._stuck = self.loop.call_later(self._client_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        _cancel(self._stuck)
        super().resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        """It is over."""
        _cancel(self._late)
        _cancel(self._stuck)
        self._lingering.discard(self)
        super().connection_lost(error)

    def _await_request(self) -> None:
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):  # it is whole
            _cancel(self._late)
            self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(self._client_s, self._too_late)

    def _too_late(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.SEND_BODY and self.cycle.response_started:  # refused before its end
            self.transport.abort()
            return
        self._refuse(ApiError(408, f"the request was not whole within {self._client_s:g} s", code="request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        self._refused = True
        self._failed(error.status)
        if self.cycle is not None and not self.cycle.response_complete:  # what waits for the rest of the request
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if len(self._lingering) >= LINGERING:
            self.transport.abort()
            return
        self._lingering.add(self)
        answer = response(error)
        headers = [*answer.raw_headers, (b"connection", b"close")]
        head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
        head += [name + b": " + value for name, value in headers]
        self.transport.write(b"\r\n".join([*head, b"", answer.body]))
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
