"""The dashboard serves runs, live, and nothing else."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import Request, Response
from fastapi.testclient import TestClient
from report_world import add_step, make_run

from verl_vla.cli import dashboard
from verl_vla.cli.arguments import parse
from verl_vla.core.errors import ConfigError
from verl_vla.runs.html import connections
from verl_vla.runs.html.dashboard import MAX_COMPARED, make_app
from verl_vla.runs.html.report import TEMPLATES
from verl_vla.runs.run_dir import keep_solved

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SERVER_STARTS_S = 60


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs" / "sweep" / "first run")
    make_run(tmp_path / "runs" / "second", steps=0)
    make_run(tmp_path / "outside")
    (tmp_path / "secret.txt").write_text("secret")
    return tmp_path / "runs"


@pytest.fixture
def client(root: Path) -> TestClient:
    return TestClient(make_app(root), base_url="http://127.0.0.1")


def test_all_runs_are_listed_with_where_they_stand(client):
    page = client.get("/").text
    for expected in ("sweep/first run", "second", "3 of 5", "0 of 5", "75.0% (6/8"):
        assert expected in page
    assert "outside" not in page


def test_a_folder_without_runs_says_how_to_begin(tmp_path):
    page = TestClient(make_app(tmp_path), base_url="http://127.0.0.1").get("/").text
    assert "There is no run in this folder yet" in page


def test_a_run_that_goes_on_is_read_anew(client, root):
    address = {"name": "sweep/first run"}
    assert "3 of 5 training steps" in client.get("/run", params=address).text
    add_step(root / "sweep" / "first run", 4)
    assert "4 of 5 training steps" in client.get("/run", params=address).text


def test_videos_are_served_by_episode(client):
    page = client.get("/run", params={"name": "sweep/first run"}).text
    address = page.split('<img src="')[1].split('"')[0].replace("&amp;", "&")
    answer = client.get(address)
    assert answer.headers["content-type"] == "image/webp"
    assert answer.content[:4] == b"RIFF"


def test_runs_are_compared_in_one_figure(client):
    page = client.get("/compare", params={"name": ["sweep/first run", "second"]}).text
    assert page.count("<svg") == 1
    assert "2 runs" in page
    too_many = ["second"] * (MAX_COMPARED + 1)
    assert client.get("/compare", params={"name": too_many}).status_code == 422


@pytest.mark.parametrize(
    "name",
    [
        *("../outside", "sweep/../../outside", "sweep/first run/../../../outside", "..", "/", ""),
        *("/etc", "second\0", "link", "no such run", "second/recipe.yaml", "%2e%2e/outside"),
    ],
)
def test_nothing_outside_the_runs_is_served(client, root, name):
    (root / "link").symlink_to(root.parent / "outside")
    for address in ("/run", "/compare"):
        assert client.get(address, params={"name": name}).status_code == 404
    assert client.get("/video", params={"name": name, "episode": 100}).status_code == 404
    outside = str(root.parent / "outside")
    assert client.get("/run", params={"name": outside}).status_code == 404


@pytest.mark.parametrize("name", ["x" * 5000, "second/" + "ab/" * 2000, "y" * 300])
def test_a_name_that_no_folder_can_have_is_not_found(client, name):
    for address in ("/run", "/compare"):
        assert client.get(address, params={"name": name}).status_code == 404
    assert client.get("/video", params={"name": name, "episode": 1}).status_code == 404


FILES = ("recipe.yaml", "metrics.jsonl", "episodes.jsonl", "evaluations/step_3.json", "evaluations")


@pytest.mark.parametrize("file", [*FILES, "solved.json"])
def test_a_file_of_a_run_that_leads_out_of_the_runs_is_not_read(client, root, file):
    inside, outside = root / "sweep" / "first run" / file, root.parent / "outside" / file
    keep_solved(root.parent / "outside", 3)
    if inside.is_dir():
        shutil.rmtree(inside)
    inside.unlink(missing_ok=True)
    inside.symlink_to(outside)
    assert "is a link that leads out of" in client.get("/").text
    for address in ("/run", "/compare"):
        answer = client.get(address, params={"name": "sweep/first run"})
        assert answer.status_code == 422
        assert "is a link that leads out of" in answer.text
    assert client.get("/run", params={"name": "second"}).status_code == 200


@pytest.mark.parametrize("file", FILES)
def test_a_link_among_the_runs_is_followed(client, root, file):
    place = root / "sweep" / "first run" / file
    place.rename(root / "moved")
    place.symlink_to(root / "moved")
    assert client.get("/run", params={"name": "sweep/first run"}).status_code == 200


def test_a_run_that_may_not_be_read_is_shown_as_such(client, root, monkeypatch):
    whole = Path.is_file

    def refuse(path: Path) -> bool:
        if "second" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    # whoever runs as root may read everything
    monkeypatch.setattr(Path, "is_file", refuse)
    page = client.get("/").text
    assert "3 of 5" in page
    assert "Permission denied" in page
    assert client.get("/run", params={"name": "second"}).status_code == 404


@pytest.mark.parametrize("episode", ["../../secret.txt", "1/../2", "1e3", ""])
def test_an_episode_is_a_number(client, episode):
    answer = client.get("/video", params={"name": "second", "episode": episode})
    assert answer.status_code == 422


def test_a_film_that_leads_out_of_the_runs_is_not_served(client, root):
    videos = root / "second" / "episodes"
    videos.mkdir()
    (videos / "episode_7.webp").symlink_to(root.parent / "secret.txt")
    assert client.get("/video", params={"name": "second", "episode": 7}).status_code == 404


@pytest.mark.parametrize(
    "path", ["/second/recipe.yaml", "/../secret.txt", "/docs", "/openapi.json", "/static/x"]
)
def test_there_are_no_other_addresses(client, path):
    assert client.get(path).status_code == 404


def test_it_answers_to_this_machine_s_names_alone(root):
    assert (
        TestClient(make_app(root), base_url="http://elsewhere.example").get("/").status_code == 400
    )
    assert TestClient(make_app(root), base_url="http://localhost").get("/").status_code == 200


def test_on_all_addresses_it_answers_to_each_of_them_and_to_no_foreign_name(root, monkeypatch):
    served = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **_: served.append(app))
    dashboard.run(parse("dashboard", [str(root), "--host", "0.0.0.0"]))
    for host, status in (("10.0.0.7", 200), ("[fe80::1]", 200), ("elsewhere.example", 400)):
        client = TestClient(served[0], base_url=f"http://{host}:6007")
        assert client.get("/").status_code == status
    assert "--host elsewhere.example" in client.get("/").text


def test_no_script_of_a_run_s_text_would_run(client):
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert client.get("/live.js").text == (TEMPLATES / "live.js").read_text()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no folder; name the one that holds the runs"):
        dashboard.run(parse("dashboard", [str(tmp_path / "nowhere")]))


@pytest.mark.parametrize(
    ("words", "host", "warns"),
    [([], "127.0.0.1", False), (["--host", "0.0.0.0"], "0.0.0.0", True)],
)
def test_it_binds_to_this_machine_unless_it_is_told_otherwise(
    root, monkeypatch, caplog, words, host, warns
):
    bound = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: bound.update(options))
    assert dashboard.run(parse("dashboard", [str(root), *words])) == 0
    assert bound["host"] == host
    assert ("there is no password" in caplog.text) == warns


@pytest.fixture
def served(root: Path) -> Iterator[str]:
    """The address of a real server, whose run ends a step as soon as a page has its script."""
    app = make_app(root)

    @app.middleware("http")
    async def run_substeps(
        request: Request, answer: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await answer(request)
        if request.url.path == "/live.js":
            add_step(root / "second", 4)
        return response

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + SERVER_STARTS_S
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


NUM_SLOW = 200


def test_slow_connections_are_closed_and_keep_nobody_waiting(root, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_S", 1.0)
    monkeypatch.setattr(connections, "CONNECTION_S", 2.0)
    options = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **given: options.update(given, app=app))
    dashboard.run(parse("dashboard", [str(root)]))
    server = uvicorn.Server(uvicorn.Config(**options | {"port": 0, "log_level": "error"}))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        address = server.servers[0].sockets[0].getsockname()
        slow = [socket.create_connection(address) for _ in range(NUM_SLOW)]
        # half a request, and a request whose answer is never read
        for number, connection in enumerate(slow):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"\r\n" * (number % 2))
        with urllib.request.urlopen(f"http://localhost:{address[1]}/live.js", timeout=60) as answer:
            assert answer.status == 200
            assert answer.headers["connection"] == "close"
        deadline = time.monotonic() + SERVER_STARTS_S
        for connection in slow:
            connection.settimeout(deadline - time.monotonic())
            # to the end, which only the server makes
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(1 << 16):
                    pass
            connection.close()
        assert not server.server_state.connections
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_what_is_new_in_a_run(served):
    """The page asks again by itself; waiting for that takes the browser's time, not ours."""
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    done = subprocess.run(
        [BROWSER, *flags, "--virtual-time-budget=11000", "--dump-dom", f"{served}/run?name=second"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "4 of 5 training steps" in done.stdout
    assert done.stdout.count("<svg") == 8
