"""Serve a local web page of all runs in a folder, also active ones."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from verl_vla.core.errors import ConfigError
from verl_vla.runs.html.dashboard import LOOPBACK, is_address, make_app

logger = logging.getLogger(__name__)

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


def run(options: argparse.Namespace) -> int:
    """Serve the dashboard until it is interrupted."""
    root = Path(options.runs)
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder; name the one that holds the runs, e.g. runs")
    # a page served on another address is asked for by that name
    hosts = LOOPBACK if _is_loopback(options.host) else (*LOOPBACK, options.host)
    logger.info("runs of %s: http://%s:%d (ctrl-C ends it)", root, options.host, options.port)
    if not _is_loopback(options.host):
        logger.warning("anyone at %s can read these runs; there is no password", options.host)
    is_everywhere = is_address(options.host) and ipaddress.ip_address(options.host).is_unspecified
    app = make_app(root, hosts, any_address=is_everywhere)
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        http=ShortConnection,
        ws="none",
    )
    return 0


def _is_loopback(host: str) -> bool:
    # a host name may resolve to any address, so it counts as open
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
