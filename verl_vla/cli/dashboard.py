"""Serve a local web page of all runs in a folder, also active ones."""

from __future__ import annotations

import argparse
import ipaddress
import logging
from pathlib import Path

import uvicorn

from verl_vla.core.errors import ConfigError
from verl_vla.runs.html.connections import ShortConnection
from verl_vla.runs.html.dashboard import LOOPBACK, is_address, make_app

logger = logging.getLogger(__name__)


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
