"""Web dashboard of all runs in a folder; files are read again at every request.

It only reads, and only files of runs: a run is named by its path under the root, which is resolved
and must not leave it, and only a run's page and the videos of its episodes are served.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Annotated
from urllib.parse import quote, urlencode

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, Response

from verl_vla.core.errors import ConfigError
from verl_vla.runs.episode_recorder import video_path
from verl_vla.runs.html import figures
from verl_vla.runs.html.reader import RunView, find_runs, is_run, read_run
from verl_vla.runs.html.report import TEMPLATES, render, run_body, share_with_counts, status

LOOPBACK = ("127.0.0.1", "localhost")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src "
    "'unsafe-inline'; script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""Headers of every response: a page loads nothing from other servers, and scripts inside the text
of a run do not execute."""
MAX_COMPARED = 8
"""Largest number of runs in one figure; the colours of more would repeat."""


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

    def overview(self) -> str:
        rows = [self._row(folder) for folder in find_runs(self._root)]
        return _page("runs", render("runs.html", rows=rows, most=MAX_COMPARED))

    def one(self, name: str) -> str:
        return _page(name, run_body(self._view(name), partial(_video_address, name)))

    def several(
        self, name: Annotated[list[str], Query(min_length=1, max_length=MAX_COMPARED)]
    ) -> str:
        views = {each: self._view(each) for each in name}
        rows = [_row(each, view) for each, view in views.items()]
        return _page("compare", render("compare.html", rows=rows, svg=figures.compared(views)))

    def video(self, name: str, episode: int) -> FileResponse:
        # resolved, since a link among the videos may lead out of the root
        path = video_path(self._view(name).folder, episode).resolve()
        if not path.is_relative_to(self._root) or not path.is_file():
            raise HTTPException(404, "no video of this episode was kept")
        return FileResponse(path, media_type="image/webp")

    def script(self) -> FileResponse:
        return FileResponse(TEMPLATES / "live.js", media_type="text/javascript")

    def _row(self, folder: Path) -> dict[str, str]:
        name = folder.relative_to(self._root).as_posix()
        try:
            return _row(name, read_run(folder))
        # one damaged folder must not hide the others
        except ConfigError as error:
            return _row_of_damaged(name, str(error))

    def _view(self, name: str) -> RunView:
        # no path can hold it, and resolve() raises ValueError, which would be an error 500
        if "\0" in name:
            raise HTTPException(404, "there is no such run")
        folder = (self._root / name).resolve()
        if not folder.is_relative_to(self._root) or not is_run(folder):
            raise HTTPException(404, "there is no such run")
        try:
            return read_run(folder)
        except ConfigError as error:
            raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error


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
    trained = view.trained[-1:]
    return {
        "name": name,
        "address": f"/run?name={quote(name)}",
        "steps": f"{view.last_step} of {view.total_steps}",
        "status": status(view),
        "suite": view.recipe["environment"]["suite"],
        "reward": view.recipe["reward"],
        "seed": str(view.recipe["seed"]),
        "training": f"{100 * trained[0]['env/success_rate']:.1f}%" if trained else "\N{EM DASH}",
        "held_out": share_with_counts(last[0]["total"] if last else None),
    }


def _row_of_damaged(name: str, reason: str) -> dict[str, str]:
    unknown = dict.fromkeys(("steps", "suite", "reward", "seed", "training", "held_out"), "")
    return {"name": name, "address": f"/run?name={quote(name)}", "status": reason} | unknown
