"""Files of runs and evaluations that were damaged: every reader names file, line and reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from report_world import make_run, make_tuning_run

from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.core.episode import Outcome, Start
from verl_vla.core.errors import ConfigError
from verl_vla.evaluation.compare import read_evaluation
from verl_vla.evaluation.resumable import read_played, require_evaluation
from verl_vla.runs.episode_log import EpisodeLog, read_episodes, require_own
from verl_vla.runs.html.dashboard import make_app
from verl_vla.runs.html.reader import read_run
from verl_vla.runs.html.report import write_report
from verl_vla.runs.metrics import MetricsFile, read_metrics
from verl_vla.runs.replay import read_episode
from verl_vla.runs.run_dir import evaluation_file, open_run_dir

LOG, METRICS, RECIPE = "episodes.jsonl", "metrics.jsonl", "recipe.yaml"
LINES = {
    "binary": bytes(range(128, 160)) + b"\n",
    "NUL": b"\0\0\0\n",
    "half a line": b'{"step": 1, "epis\n',
    "a list": b"[]\n",
    "null": b"null\n",
    "empty": b"\n",
    "a word for a number": b'{"step": "one"}\n',
    "no step": b"{}\n",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "one")


def insert(file: Path, number: int, line: bytes) -> None:
    """Put a line before line ``number`` of a file, counted from 1."""
    lines = file.read_bytes().splitlines(keepends=True)
    lines.insert(number - 1, line)
    file.write_bytes(b"".join(lines))


def change_line(file: Path, number: int, **changed: Any) -> None:
    lines = file.read_text().splitlines(keepends=True)
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | changed) + "\n"
    file.write_text("".join(lines))


def everything_that_reads(run: Path) -> dict[str, Callable[[], Any]]:
    episode = 100
    return {
        "report": lambda: write_report(run),
        "replay": lambda: read_episode(run, episode),
        "resume": lambda: EpisodeLog(run, {"suite": "mini"}).rewind(1),
    }


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_damaged_line_of_an_episode_log_is_named_by_all_that_read_it(
    run: Path, line: bytes
) -> None:
    insert(run / LOG, 4, line)
    for name, read in everything_that_reads(run).items():
        with pytest.raises(ConfigError, match=rf"{LOG}, line 4: "):
            read()
            pytest.fail(name)


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_damaged_line_of_the_metrics_is_named(run: Path, line: bytes) -> None:
    insert(run / METRICS, 2, line)
    for read in (lambda: write_report(run), lambda: MetricsFile(run / METRICS).rewind(1)):
        with pytest.raises(ConfigError, match=rf"{METRICS}, line 2: "):
            read()


def test_the_torn_last_line_of_a_killed_run_is_left_out(run: Path) -> None:
    episodes, metrics = read_episodes(run), read_metrics(run / METRICS)
    for name in (LOG, METRICS):
        with (run / name).open("ab") as file:
            file.write(b'{"step": 4, "epi')
    assert (read_episodes(run), read_metrics(run / METRICS)) == (episodes, metrics)
    MetricsFile(run / METRICS).rewind(10)
    EpisodeLog(run, {"suite": "mini"}).rewind(10)
    assert (read_episodes(run), read_metrics(run / METRICS)) == (episodes, metrics)
    assert (run / METRICS).read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"outcome": "x"}, "outcome is 'x'"),
        ({"outcome": 7}, "outcome is 7"),
        ({"task": -1}, "task is -1"),
        ({"episode": None}, "episode is None"),
        ({"progress": ["a"]}, r"progress\[0\] is 'a'"),
        ({"actions": {"shape": [1], "base64": ""}}, "actions.shape"),
        ({"executed": "all"}, "executed is 'all'"),
    ],
)
def test_an_entry_that_means_nothing_is_named(run: Path, changed: Any, said: str) -> None:
    change_line(run / LOG, 3, **changed)
    with pytest.raises(ConfigError, match=rf"line 3: .*{said}"):
        read_episodes(run)


STARTS = [Start(task_id=2, init_state_id=i) for i in range(3)]


def ended(episode: int, **more: Any) -> dict[str, Any]:
    line = {"episode": episode, "task": 2, "init_state": episode, "outcome": 0, "steps": 3}
    return line | {"crash": None, "progress": [], "actions": None, "executed": None} | more


def log_of(folder: Path, *lines: dict[str, Any]) -> Path:
    EpisodeLog(folder, {"suite": "mini"}).append(lines)
    return folder


def test_a_line_of_another_start_is_not_counted(tmp_path: Path) -> None:
    """Two of three were once written for a quota of four."""
    folder = log_of(tmp_path, ended(0), ended(1, task=3))
    with pytest.raises(ConfigError, match=r"line 3: episode 1 of task 3 and init state 1 is not"):
        read_played(folder, STARTS)
    other = log_of(tmp_path / "more", ended(3))
    with pytest.raises(ConfigError, match=r"line 2: episode 3 .* is not among the 3"):
        read_played(other, STARTS)


def test_an_episode_ends_once_and_is_repeated_after_a_crash_only(tmp_path: Path) -> None:
    crash = int(Outcome.CRASH)
    lines = [ended(0, outcome=crash), ended(0, outcome=crash), ended(0), ended(1)]
    assert read_played(log_of(tmp_path / "one", *lines), STARTS) == lines
    twice = log_of(tmp_path / "two", ended(1), ended(0), ended(1, outcome=1))
    with pytest.raises(ConfigError, match="line 4: episode 1 ended before"):
        read_played(twice, STARTS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "files",
    [
        {LOG: b"somebody's notes"},
        {LOG: b"somebody's notes\nin two lines\n"},
        {LOG: b'{"header": {"suite": "libero_10"}}\n'},
        {"thesis.tex": b"\\begin"},
        {"config.json": b"{}", "model.safetensors": b""},
    ],
    ids=["one line", "two lines", "another evaluation", "a document", "a policy"],
)
def test_a_folder_that_is_somebody_elses_is_refused_and_not_changed(
    tmp_path: Path, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "theirs"
    out.mkdir()
    for name, content in files.items():
        (out / name).write_bytes(content)
    words = ["--policy", "bases/mini", "--suite", "mini", "--tasks", "0", "--out", str(out)]
    assert main(["eval", *words]) == EXIT_USAGE
    assert str(out) in capsys.readouterr().err
    assert main(["train", "recipe=quickstart", f"out='{out}'"]) == EXIT_USAGE
    assert str(out) in capsys.readouterr().err
    assert contents(out) == files


@pytest.mark.parametrize("torn", ["", "{", '{"hea', '{"header": {"suite": "mi'])
def test_a_header_that_a_kill_cut_off_is_ones_own(tmp_path: Path, torn: str) -> None:
    (tmp_path / LOG).write_text(torn)
    require_own(tmp_path, {"suite": "mini"})
    require_evaluation(tmp_path, {"suite": "mini"})
    EpisodeLog(tmp_path, {"suite": "mini"}).append([ended(0)])
    assert [line["episode"] for line in read_episodes(tmp_path)] == [0]


def test_a_new_folder_and_an_empty_one_are_anybodys(tmp_path: Path) -> None:
    require_evaluation(tmp_path / "new", {})
    require_evaluation(tmp_path, {})
    (tmp_path / "lock").touch()
    require_evaluation(tmp_path, {})


@pytest.mark.parametrize(
    "content", [b"{", b"null", b"seed: [", b"\xff\xfe", b"- 1", b"", b"[" * 10_000]
)
def test_a_damaged_recipe_of_a_run_is_named(run: Path, content: bytes) -> None:
    (run / RECIPE).write_bytes(content)
    with pytest.raises(ConfigError, match=RECIPE):
        read_run(run)
    before = contents(run)
    with pytest.raises(ConfigError, match=RECIPE), open_run_dir(run, {"seed": 1}, ()):
        pytest.fail("the run was opened")
    assert contents(run) == before


@pytest.mark.parametrize("content", ["{", "null", "[]", '{"total": 3}', '{"episodes": [1]}'])
def test_a_damaged_evaluation_is_named(run: Path, content: str) -> None:
    file = evaluation_file(run, 3)
    file.write_text(content)
    for read in (lambda: read_run(run), lambda: read_evaluation(file)):
        with pytest.raises(ConfigError, match=file.name):
            read()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["episodes"].append(r["episodes"][2]), "task 0 with init state 2 is listed 2"),
        (lambda r: r["tasks"].popitem(), "rates of 1 tasks and the episodes of 2"),
        (lambda r: r["total"].update(successes=7), "total.successes is 7"),
        (lambda r: r["episodes"][3].update(outcome=0), "its episodes have 7"),
        (lambda r: next(iter(r["tasks"].values())).update(crashes=1), "the sum over its tasks 1"),
    ],
)
def test_an_evaluation_whose_numbers_disagree_is_named(
    run: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    file = evaluation_file(run, 3)
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    for read in (lambda: read_run(run), lambda: read_evaluation(file)):
        with pytest.raises(ConfigError, match=f"{file.name}: .*{said}"):
            read()


def test_one_bad_folder_is_shown_as_bad_and_the_others_work(run: Path) -> None:
    root = run.parent
    insert(make_run(root / "damaged") / METRICS, 2, b"null\n")
    make_tuning_run(root / "tuned")
    (root / "tuned badly").mkdir()
    recipe = {"seed": 0, "demos": {"files": []}, "environment": {"suite": "mini"}}
    (root / "tuned badly" / RECIPE).write_text(yaml.safe_dump(recipe))
    os.mkfifo(root / "tuned badly" / METRICS)
    client = TestClient(make_app(root), base_url="http://127.0.0.1")
    page = client.get("/").text
    for expected in ("3 of 5", "metrics.jsonl, line 2", "4 of 6", "50.0% of tokens", "fine-tuning"):
        assert expected in page
    assert f"{METRICS} is a pipe or a device" in page
    for name in ("one", "tuned"):
        assert client.get("/run", params={"name": name}).status_code == 200
    for name in ("damaged", "tuned badly"):
        assert client.get("/run", params={"name": name}).status_code == 422


@pytest.mark.parametrize("missing", ["policy", "trainer", "demos.folder", "optimizer.lr"])
def test_a_recipe_of_fine_tuning_that_lacks_an_entry_is_named(tmp_path: Path, missing: str) -> None:
    run = make_tuning_run(tmp_path / "tuned")
    recipe = yaml.safe_load((run / RECIPE).read_text())
    *above, last = missing.split(".")
    (recipe[above[0]] if above else recipe).pop(last)
    (run / RECIPE).write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match=f"{RECIPE}: {missing} is missing; restore the file"):
        write_report(run)
