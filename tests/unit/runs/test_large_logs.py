"""Logs of gigabytes: read from their end, line by line, and never as a whole."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from report_world import add_step, make_run

from verl_vla.core import json_files
from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import keep_json_lines, read_json_lines, read_last_json_lines
from verl_vla.runs.episode_log import EpisodeLog, read_episodes, require_own
from verl_vla.runs.html import dashboard, reader, report
from verl_vla.runs.html.dashboard import make_app
from verl_vla.runs.html.reader import read_run
from verl_vla.runs.html.report import write_report
from verl_vla.runs.metrics import MetricsFile, read_metrics
from verl_vla.runs.replay import read_episode

LOG, METRICS = "episodes.jsonl", "metrics.jsonl"
GIGABYTES = 3 << 30


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "one")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without figures, which take a second."""
    for module in (report, dashboard):
        monkeypatch.setattr(module, "charts", lambda _: [])


@pytest.fixture
def client(run: Path) -> TestClient:
    return TestClient(make_app(run.parent), base_url="http://127.0.0.1")


def put_hole(file: Path, after_line: int) -> None:
    """Put gigabytes that take no disk after a line; what follows begins with a line's end."""
    lines = file.read_bytes().splitlines(keepends=True)
    with file.open("wb") as opened:
        opened.writelines(lines[:after_line])
        opened.seek(GIGABYTES, 1)
        opened.write(b"\n")
        opened.writelines(lines[after_line:])


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail where much more memory is taken than there was before."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_dashboard_reads_the_end_of_a_log_of_gigabytes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_hole(run / METRICS, 1)
    put_hole(run / LOG, 1)
    # holes are read too, a second for as much as is shown of a log without one
    monkeypatch.setattr(report, "REPORT_BYTES", 1 << 20)
    monkeypatch.setattr(dashboard, "PAGE_BYTES", 1 << 20)
    client = TestClient(make_app(run.parent), base_url="http://127.0.0.1")
    with little_memory():
        assert "3 of 5" in client.get("/").text
        page = client.get("/run", params={"name": "one"}).text
        written = write_report(run).read_text()
    for text in (page, written):
        assert "3 of 5 training steps" in text
        assert "Only the newest part of metrics.jsonl and episodes.jsonl is shown" in text


def test_a_page_of_logs_that_are_read_whole_says_nothing_of_it(run: Path) -> None:
    assert "Only the newest part" not in write_report(run).read_text()


@pytest.mark.parametrize("name", [LOG, METRICS])
def test_a_line_of_gigabytes_is_refused(run: Path, name: str) -> None:
    put_hole(run / name, 1)
    reads: dict[str, list[Callable[[], Any]]] = {
        LOG: [
            lambda: read_episodes(run),
            lambda: read_episode(run, 100),
            lambda: EpisodeLog(run, {"suite": "mini"}).rewind(1),
        ],
        METRICS: [
            lambda: read_metrics(run / METRICS),
            lambda: MetricsFile(run / METRICS).rewind(1),
        ],
    }
    before = sorted(run.iterdir())
    for read in reads[name]:
        with little_memory(), pytest.raises(ConfigError, match=f"{name} has a line of more than"):
            read()
    assert sorted(run.iterdir()) == before


@pytest.mark.parametrize("begin", [b"", b"{"])
def test_a_foreign_log_of_one_line_of_gigabytes_is_no_ones_evaluation(
    tmp_path: Path, begin: bytes
) -> None:
    with (tmp_path / LOG).open("wb") as file:
        file.write(begin)
        file.truncate(GIGABYTES)
    with little_memory(), pytest.raises(ConfigError, match=LOG):
        require_own(tmp_path, {"suite": "mini"})


def test_a_torn_line_of_any_length_is_dropped(run: Path) -> None:
    before = (run / LOG).read_bytes()
    with (run / LOG).open("ab") as file:
        file.write(b'{"step": 4, ' + b" " * (3 << 20))
    EpisodeLog(run, {"suite": "mini"})
    assert (run / LOG).read_bytes() == before


LINES = [json.dumps({"a": i}) + "\n" for i in range(100)]


@pytest.mark.parametrize("num_bytes", [1, 8, 50, 500, 10_000])
def test_the_last_lines_are_whole_and_in_order(tmp_path: Path, num_bytes: int) -> None:
    file = tmp_path / "log"
    file.write_text("".join(LINES) + '{"a": 7')
    found = list(read_last_json_lines(file, dict[str, int], "mend it", num_bytes))
    assert found == [{"a": i} for i in range(100 - len(found), 100)]
    size = sum(len(json.dumps(line)) + 1 for line in found)
    assert size <= num_bytes
    if num_bytes == 10_000:
        assert len(found) == 100
        assert list(read_last_json_lines(file, dict[str, int], "", num_bytes, first=1)) == found[1:]
    elif len(found):
        # another line would not fit, or only as a part of it
        assert size + len(LINES[0]) + len('{"a": 7') + 1 > num_bytes - len(LINES[-1])


def test_a_damaged_line_near_the_end_is_named(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("".join([*LINES, "{\n"]))
    with pytest.raises(ConfigError, match="log, in the last 50 bytes: it is no JSON"):
        list(read_last_json_lines(file, dict[str, int], "mend it", 50))


def test_a_line_that_is_too_long_is_told_from_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "MOST_LINE_BYTES", 10)
    (tmp_path / "fits").write_text('{"a":1  }\n{"a": 2}\n')
    assert len(list(read_json_lines(tmp_path / "fits", dict[str, int], ""))) == 2
    (tmp_path / "long").write_text('{"a":1   }\n')
    with pytest.raises(ConfigError, match="a line of more than 10 bytes"):
        list(read_json_lines(tmp_path / "long", dict[str, int], "mend it"))


def test_lines_are_kept_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text('anything\n{"a":   1}\n{"a": 2}\n{"a":3}\n{"a": 4')
    dropped = keep_json_lines(file, dict[str, int], "", lambda line: line["a"] != 2, first=1)
    assert dropped == [{"a": 2}]
    assert file.read_text() == 'anything\n{"a":   1}\n{"a":3}\n'


def test_a_run_is_read_again_only_when_it_has_changed(
    run: Path, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def note(folder: Path, **options: Any) -> Any:
        read.append(folder)
        return read_run(folder, **options)

    monkeypatch.setattr(dashboard, "read_run", note)
    client = TestClient(make_app(run.parent), base_url="http://127.0.0.1")
    for _ in range(3):
        assert "3 of 5" in client.get("/").text
        assert client.get("/run", params={"name": "one"}).status_code == 200
    assert len(read) == 2
    add_step(run, 4)
    assert "4 of 5" in client.get("/").text
    assert "4 of 5" in client.get("/run", params={"name": "one"}).text
    assert len(read) == 4


def test_as_many_runs_are_kept_as_are_compared(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for number in range(dashboard.MAX_COMPARED + 2):
        make_run(root / str(number), steps=0)
    cache = dashboard._Cache(read_run, 3)
    first = cache.read(root / "0")
    assert cache.read(root / "0") is first
    assert first.charts is first.charts
    for number in (1, 2, 0, 3):
        cache.read(root / str(number))
    assert cache.read(root / "0") is first
    assert reader.is_run(root / "1")
    assert set(cache._kept) == {root / "2", root / "0", root / "3"}
