"""``check-suite``: where its results go, told without a simulator."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from verl_vla.cli import check_suite as verb
from verl_vla.cli.arguments import parse
from verl_vla.core.errors import ConfigError
from verl_vla.diagnostics.suite_check import TaskCheck

WORDS = ["--suite", "mini", "--out"]


def pretend(task: int) -> TaskCheck:
    return TaskCheck(task_id=task, name=f"task {task}", fault=None, was_foreseen=False)


def test_a_file_in_no_folder_is_refused_before_the_first_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []
    monkeypatch.setattr(verb, "check_tasks", lambda *words: begun.append(words))
    with pytest.raises(ConfigError, match=r"--out is .*nowhere/answer.json, but there is no"):
        verb.run(parse("check-suite", [*WORDS, str(tmp_path / "nowhere" / "answer.json")]))
    assert not begun


def test_results_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "answer.json"
    monkeypatch.setattr(verb, "PROGRESS_EVERY", 2)
    seen: list[int] = []

    def check(
        chosen: Any, config: Any, tasks: Sequence[int], show: Callable[[TaskCheck], None]
    ) -> list[TaskCheck]:
        for task in tasks[:3]:
            show(pretend(task))
            seen.append(len(json.loads(out.read_text())) if out.is_file() else 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "check_tasks", check)
    with pytest.raises(KeyboardInterrupt):
        verb.run(parse("check-suite", [*WORDS, str(out)]))
    assert seen == [0, 2, 2]
    assert [row["task"] for row in json.loads(out.read_text())] == [0, 1, 2]
