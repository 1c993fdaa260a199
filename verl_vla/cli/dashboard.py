"""``dashboard RUNS_DIR``: a local page on the runs of a folder, also of those that are going."""

from __future__ import annotations

import argparse
import ipaddress
import logging
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from verl_vla.core.errors import ConfigError
from verl_vla.runs.html.dashboard import LOOPBACK, make_app

logger = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> int:
    """Serve until it is interrupted."""
    options = _parser().parse_args(arguments)
    root = Path(options.runs)
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder; name the one that holds the runs, e.g. runs")
    hosts = LOOPBACK if _is_loopback(options.host) else (*LOOPBACK, options.host)
    logger.info("runs of %s: http://%s:%d (ctrl-C ends it)", root, options.host, options.port)
    if not _is_loopback(options.host):
        logger.warning("whoever reaches %s can read these runs; there is no password", options.host)
    uvicorn.run(make_app(root, hosts), host=options.host, port=options.port, log_level="warning")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl_vla dashboard", description=__doc__)
    parser.add_argument("runs", metavar="RUNS_DIR", help="folder of runs, at any depth")
    parser.add_argument("--port", type=int, default=8421)
    parser.add_argument("--host", default="127.0.0.1", help="another than this serves others too")
    return parser


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
