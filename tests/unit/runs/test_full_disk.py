"""A disk that is full, or not as it should be, wherever a run writes a record of itself.

Linux has a file that is always full: what is written through a link to ``/dev/full`` fails as it
does on a full disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_world import make_trajectories
from report_world import make_run

from verl_vla.cli.main import EXIT_CHECKPOINT, main
from verl_vla.core.errors import CheckpointError, ConfigError, WriteError
from verl_vla.evaluation import cold_start
from verl_vla.runs.episode_log import EPISODE_LOG_FILE, EpisodeLog
from verl_vla.runs.episode_recorder import video_path, write_video
from verl_vla.runs.html.report import write_report
from verl_vla.runs.metrics import MetricsFile
from verl_vla.runs.run_dir import keep_evaluation, keep_solved
from verl_vla.trainer.grpo.unscored_episodes import UnscoredEpisodes

IMAGES = np.zeros((3, 8, 8, 3), dtype=np.uint8)
VIDEO = 7


def append_episode(folder: Path) -> None:
    log = EpisodeLog(folder, {"suite": "mini"})
    (folder / EPISODE_LOG_FILE).unlink()
    (folder / EPISODE_LOG_FILE).symlink_to("/dev/full")
    log.append([{"episode": 1}])


RECORDS: dict[str, tuple[str, Callable[[Path], Any], str | None]] = {
    "a video": (
        f"episodes/episode_{VIDEO}.webp",
        lambda folder: write_video(video_path(folder, VIDEO), IMAGES, [1, 1, 1]),
        None,
    ),
    "the episode log": ("episodes.jsonl", append_episode, "nothing"),
    "the metrics": (
        "metrics.jsonl",
        lambda folder: MetricsFile(folder / "metrics.jsonl").append(1, {"env/steps": 1.0}),
        None,
    ),
    "an evaluation": (
        "evaluations/step_3.json",
        lambda folder: keep_evaluation(folder, 3, {}),
        "evaluations/step_3.tmp",
    ),
    "the cold-start check": (
        "cold_start.json",
        lambda folder: cold_start.keep(folder, {}),
        "cold_start.tmp",
    ),
    "the end of a solved run": (
        "solved.json",
        lambda folder: keep_solved(folder, 3),
        "solved.tmp",
    ),
    "episodes without a score": (
        "unscored_step_3.npz",
        lambda folder: UnscoredEpisodes(folder, 1).keep(make_trajectories(crash_last=True), 3),
        "unscored_step_3.partial",
    ),
}
"""What is written, how, and the file that is written first."""


@pytest.mark.parametrize("name", RECORDS)
def test_a_full_disk_is_told_in_a_line_with_path_room_and_remedy(tmp_path: Path, name: str) -> None:
    record, write, first = RECORDS[name]
    file = tmp_path / (record if first is None else first)
    file.parent.mkdir(exist_ok=True)
    if first != "nothing":
        file.symlink_to("/dev/full")
    with pytest.raises(WriteError) as caught:
        write(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / record} could not be written (No space left on device; ")
    assert said.endswith(
        " MiB are free there). Make room or lift the quota, and start the same command again"
    )
    assert "\n" not in said


@pytest.mark.parametrize("name", ["a video", "an evaluation"])
def test_a_file_where_a_folder_belongs_is_named(tmp_path: Path, name: str) -> None:
    record, write, _ = RECORDS[name]
    folder = (tmp_path / record).parent
    folder.write_text("a file")
    with pytest.raises(WriteError, match=rf"Move away what is not as it should be, {folder}, and"):
        write(tmp_path)


def test_a_folder_where_a_file_belongs_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(WriteError, match=r"metrics.jsonl could not be written \(Is a directory"):
        MetricsFile(tmp_path / "metrics.jsonl").append(1, {})
    (tmp_path / EPISODE_LOG_FILE).mkdir()
    with pytest.raises(ConfigError, match=r"episodes.jsonl is a folder, and must be a file"):
        EpisodeLog(tmp_path, {"suite": "mini"})


def test_a_report_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "report.tmp").symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"report.html could not be written"):
        write_report(run)


def write_after(error: Exception | None) -> None:
    """Meet a full disk, perhaps while another error is on its way out."""
    try:
        if error is not None:
            raise error
    finally:
        with Path("/dev/full").open("w") as file:
            file.write("a line")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, r"stopped: .* could not be written \(No space left on device\). Make room, and"),
        (WriteError("episodes.jsonl could not be"), "stopped: episodes.jsonl could not be"),
        (CheckpointError("step 3 could not be"), "stopped: step 3 could not be"),
    ],
)
def test_a_command_that_meets_a_full_disk_ends_with_a_line_and_its_own_code(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception | None,
    said: str,
) -> None:
    monkeypatch.setattr("verl_vla.cli.recipes.run", lambda _: write_after(error))
    assert main(["recipes"]) == EXIT_CHECKPOINT
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.match(said, lines[0])


def test_another_fault_of_the_system_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise FileNotFoundError(2, os.strerror(2), "a file of the program itself")

    monkeypatch.setattr("verl_vla.cli.recipes.run", fail)
    with pytest.raises(FileNotFoundError):
        main(["recipes"])
