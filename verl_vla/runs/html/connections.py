"""Connections of the dashboard, none of which stays open for long."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S = 10.0
"""Seconds within which a request must be complete."""
CONNECTION_S = 120.0
"""Seconds after which a connection ends, whatever it does; the largest page takes some ten."""


class ShortConnection(H11Protocol):
    """A connection that is closed if its request or its reader is too slow.

    uvicorn bounds the time between two requests, and neither that of a request nor of an answer.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start both clocks."""
        super().connection_made(transport)
        self.loop.call_later(REQUEST_S, self._end_without_request, transport)
        # a transport that is closed already is left alone
        self.loop.call_later(CONNECTION_S, transport.abort)

    def _end_without_request(self, transport: asyncio.Transport) -> None:
        # uvicorn says that it is never None, and makes it so
        if self.cycle is None:  # pyright: ignore[reportUnnecessaryComparison]
            transport.abort()
