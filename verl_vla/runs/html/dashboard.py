"""Web dashboard of all runs in a folder; files are read again at every request.

It only reads, and only files of runs: a run is named by its path under the root, which is resolved
and must not leave it, and only a run's page and the videos of its episodes are served.
"""

from __future__ import annotations

import ipaddress
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property, partial
from http import HTTPStatus
from pathlib import Path
from typing import Annotated
from urllib.parse import quote, urlencode

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, Response

from verl_vla.core.errors import ConfigError
from verl_vla.runs.episode_recorder import video_path
from verl_vla.runs.html import figures
from verl_vla.runs.html.reader import (
    GRPOView,
    RunView,
    SFTView,
    find_runs,
    is_run,
    read_run,
    run_files,
)
from verl_vla.runs.html.report import TEMPLATES, charts, render, run_body, share_with_counts, status

LOOPBACK = ("127.0.0.1", "localhost")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src "
    "'unsafe-inline'; script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    # one request a connection, whose time is bounded: see `connections`
    "Connection": "close",
}
"""Headers of every response: a page loads nothing from other servers, and scripts inside the text
of a run do not execute."""
MAX_COMPARED = 8
"""Largest number of runs in one figure; the colours of more would repeat."""
MAX_ROWS = 1000
"""Number of rows of the overview that are kept until their run changes."""
PAGE_BYTES = 1 << 24
"""Bytes of each log that a page shows at most, the newest: less than a report does, since it is
read again with every step of a run."""


def make_app(root: Path, hosts: Sequence[str] = LOOPBACK, *, any_address: bool = False) -> FastAPI:
    """Create the dashboard of the runs under ``root``.

    Args:
        root: folder of the runs; nothing outside it is served.
        hosts: accepted host names of a request. The check prevents DNS rebinding, by which a
            foreign web page could reach the dashboard through a host name that points here.
        any_address: accept every IP address as well, which no rebinding can use: for a server
            that listens on all addresses of the machine.
    """
    pages = _Pages(root.resolve())
    # FastAPI's own pages load scripts from another server
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.middleware("http")(partial(_guard, {*hosts}, any_address))
    app.add_api_route("/", pages.overview, response_class=HTMLResponse)
    app.add_api_route("/run", pages.one, response_class=HTMLResponse)
    app.add_api_route("/compare", pages.several, response_class=HTMLResponse)
    app.add_api_route("/video", pages.video, response_class=FileResponse)
    app.add_api_route("/live.js", pages.script, response_class=FileResponse)
    return app


class _Pages:
    """Handlers of the routes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._rows = _Cache(partial(read_run, is_brief=True), MAX_ROWS)
        self._views = _Cache(partial(read_run, log_bytes=PAGE_BYTES), MAX_COMPARED)
        # pages are made one at a time: each may take gigabytes, and matplotlib's styles are global
        self._one_at_a_time = threading.Lock()

    def overview(self) -> str:
        with self._one_at_a_time:
            rows = [self._row(folder) for folder in find_runs(self._root)]
        return _page("runs", render("runs.html", rows=rows, most=MAX_COMPARED))

    def one(self, name: str) -> str:
        folder = self._folder(name)
        with self._one_at_a_time:
            run = self._read(folder)
            return _page(name, run_body(run.view, run.charts, partial(_video_address, name)))

    def several(
        self, name: Annotated[list[str], Query(min_length=1, max_length=MAX_COMPARED)]
    ) -> str:
        folders = {each: self._folder(each) for each in name}
        with self._one_at_a_time:
            views = {each: self._read(folder).view for each, folder in folders.items()}
            rows = [_row(each, view) for each, view in views.items()]
            return _page("compare", render("compare.html", rows=rows, svg=figures.compared(views)))

    def video(self, name: str, episode: int) -> FileResponse:
        # resolved, since a link among the videos may lead out of the root
        path = video_path(self._folder(name), episode).resolve()
        if not path.is_relative_to(self._root) or not path.is_file():
            raise HTTPException(404, "no video of this episode was kept")
        return FileResponse(path, media_type="image/webp")

    def script(self) -> FileResponse:
        return FileResponse(TEMPLATES / "live.js", media_type="text/javascript")

    def _row(self, folder: Path) -> dict[str, str]:
        name = folder.relative_to(self._root).as_posix()
        try:
            self._require_inside(folder)
            return _row(name, self._rows.read(folder).view)
        # one damaged folder must not hide the others
        except (ConfigError, OSError) as error:
            return _row_of_damaged(name, str(error))

    def _folder(self, name: str) -> Path:
        try:
            # no path can hold it, and resolve() raises ValueError, which would be an error 500
            folder = None if "\0" in name else (self._root / name).resolve()
            if folder is not None and folder.is_relative_to(self._root) and is_run(folder):
                return folder
        except OSError as error:
            raise HTTPException(404, f"there is no such run ({error.strerror})") from error
        raise HTTPException(404, "there is no such run")

    def _read(self, folder: Path) -> _Run:
        try:
            self._require_inside(folder)
            return self._views.read(folder)
        except (ConfigError, OSError) as error:
            raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error

    def _require_inside(self, folder: Path) -> None:
        """Refuse a run with a link that leads out of the root, before anything of it is read."""
        for file in run_files(folder):
            if not file.resolve().is_relative_to(self._root):
                raise ConfigError(
                    f"{file} is a link that leads out of {self._root}, and is not followed"
                )


class _Run:
    """A run as it was read, and its figures, which are drawn once."""

    def __init__(self, view: GRPOView | SFTView) -> None:
        self.view = view

    @cached_property
    def charts(self) -> list[tuple[str, str]]:
        return charts(self.view)


class _Cache:
    """Runs as they were read last, by the state of their files.

    Args:
        read: reads a run's folder.
        most: number of runs that are kept.
    """

    def __init__(self, read: Callable[[Path], GRPOView | SFTView], most: int) -> None:
        self._read = read
        self._most = most
        self._kept: OrderedDict[Path, tuple[object, _Run]] = OrderedDict()

    def read(self, folder: Path) -> _Run:
        """Return the run as it is now; its files are read again only if one has changed.

        Raises:
            ConfigError: a file is damaged.
        """
        # before the files are read: what is written meanwhile makes another state
        found = [(file, file.stat()) for file in run_files(folder)]
        state = [(file, status.st_size, status.st_mtime_ns) for file, status in found]
        if folder not in self._kept or self._kept[folder][0] != state:
            self._kept[folder] = (state, _Run(self._read(folder)))
        self._kept.move_to_end(folder)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return self._kept[folder][1]


async def _guard(
    hosts: set[str],
    any_address: bool,
    request: Request,
    answer: Callable[[Request], Awaitable[Response]],
) -> Response:
    host = request.url.hostname or ""
    if host in hosts or (any_address and is_address(host)):
        response = await answer(request)
    else:
        response = PlainTextResponse(
            f"this dashboard does not answer to {host!r}; start it with --host {host}",
            status_code=HTTPStatus.BAD_REQUEST,
        )
    response.headers.update(HEADERS)
    return response


def is_address(host: str) -> bool:
    """Check whether a host is an IP address and no name.

    >>> is_address("10.0.0.7"), is_address("::1"), is_address("node-7")
    (True, True, False)
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _page(title: str, body: str) -> str:
    return render("page.html", title=title, body=body, live=True)


def _video_address(name: str, episode: int) -> str:
    return "/video?" + urlencode({"name": name, "episode": episode})


def _row(name: str, view: RunView) -> dict[str, str]:
    last = list(view.evaluations.values())[-1:]
    is_tuning = isinstance(view, SFTView)
    trained = view.trained[-1:]
    metric, unit = ("train/accuracy", "% of tokens") if is_tuning else ("env/success_rate", "%")
    return {
        "name": name,
        "address": f"/run?name={quote(name)}",
        "steps": f"{view.last_step} of {view.total_steps}",
        "status": status(view),
        "suite": view.recipe["environment"]["suite"],
        "reward": "fine-tuning" if is_tuning else view.recipe["reward"],
        "seed": str(view.recipe["seed"]),
        "training": f"{100 * trained[0][metric]:.1f}{unit}" if trained else "\N{EM DASH}",
        "held_out": share_with_counts(last[0]["total"] if last else None),
    }


def _row_of_damaged(name: str, reason: str) -> dict[str, str]:
    unknown = dict.fromkeys(("steps", "suite", "reward", "seed", "training", "held_out"), "")
    return {"name": name, "address": f"/run?name={quote(name)}", "status": reason} | unknown
