"""Web dashboard of all runs in a folder; files are read again at every request.

It only reads, and only files of runs: a run is named by its path under the root, which is resolved
and must not leave it, and only a run's page and the videos of its episodes are served.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated
from urllib.parse import quote, urlencode

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import FileResponse, HTMLResponse, Response

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


def make_app(root: Path, hosts: Sequence[str] = LOOPBACK) -> FastAPI:
    """Create the dashboard of the runs under ``root``.

    Args:
        root: folder of the runs; nothing outside it is served.
        hosts: accepted host names of a request. The check prevents DNS rebinding, by which a
            foreign web page could reach the dashboard through a host name that points here.
    """
    pages = _Pages(root.resolve())
    # FastAPI's own pages load scripts from another server
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.middleware("http")(_guard)
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
        rows = [
            _row(folder.relative_to(self._root).as_posix(), read_run(folder))
            for folder in find_runs(self._root)
        ]
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

    def _view(self, name: str) -> RunView:
        # no path can hold it, and resolve() raises ValueError, which would be an error 500
        if "\0" in name:
            raise HTTPException(404, "there is no such run")
        folder = (self._root / name).resolve()
        if not folder.is_relative_to(self._root) or not is_run(folder):
            raise HTTPException(404, "there is no such run")
        return read_run(folder)


async def _guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    response = await answer(request)
    response.headers.update(HEADERS)
    return response


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
