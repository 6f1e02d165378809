"""HTTP/1.1 connections with a deadline per request and a limit on their number; uvicorn has neither.

The deadline ends when a request has arrived in full, so responses may take any time. The numbers are Apache's
(mod_reqtimeout: 20 s, 500 bytes/s).
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["BoundedProtocol"]


class BoundedProtocol(H11Protocol):
    """Connection that is aborted if a request stalls, or arrives too slowly on average.

    Above the limit on connections, the one whose request has been pending longest is aborted; if none is pending, the
    new one.
    """

    stall_seconds = 20.0
    min_rate = 500.0  # bytes per second
    max_connections = 400  # of 1024 open files, the usual limit of a process

    _deadline: asyncio.TimerHandle | None = None
    _request_began = 0.0
    _received = 0  # bytes of the pending request

    @property
    def _is_request_pending(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._set_deadline()
        if len(self.connections) > self.max_connections:
            pending = [
                each for each in self.connections if isinstance(each, BoundedProtocol) and each._is_request_pending
            ]
            min(pending, key=lambda each: each._request_began)._abort()  # includes the new one

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._received == 0:
            self._request_began = self.loop.time()
        self._received += len(data)
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        self._set_deadline()

    def _set_deadline(self) -> None:
        self._clear_deadline()
        if not self._is_request_pending:
            self._received = 0
            return
        now = self.loop.time()
        if self._received == 0:
            self._request_began = now
        until = min(now, self._request_began + self._received / self.min_rate) + self.stall_seconds
        self._deadline = self.loop.call_at(until, self._expire)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        if self.flow.read_paused:  # the delay is the application's, not the client's
            self._deadline = self.loop.call_later(self.stall_seconds, self._expire)
        else:
            self._abort()

    def _abort(self) -> None:
        self.connections.discard(self)
        self._clear_deadline()
        self.transport.abort()
