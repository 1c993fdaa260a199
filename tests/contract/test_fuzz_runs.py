"""Damaged files of runs and evaluations: read as valid, or refused by all that read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from damage import changed_bytes, documents, inputs, replaced
from hypothesis import given
from hypothesis import strategies as st
from report_world import make_run

from verl_vla.core.episode import Outcome
from verl_vla.evaluation.compare import pair, read_evaluation
from verl_vla.runs.episode_log import EpisodeLog
from verl_vla.runs.html.reader import read_run
from verl_vla.runs.html.report import write_report
from verl_vla.runs.metrics import MetricsFile
from verl_vla.runs.replay import read_episode
from verl_vla.runs.run_dir import evaluation_file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("fuzz") / "runs" / "one")


def readers(run: Path) -> Mapping[str, Callable[[], Any]]:
    return {
        "page": lambda: read_run(run),
        "report": lambda: write_report(run),
        "replay": lambda: read_episode(run, 100),
        "evaluation": lambda: read_evaluation(evaluation_file(run, 3)),
        "episodes of a resumed run": lambda: EpisodeLog(run, {"suite": "mini"}).rewind(1),
        "metrics of a resumed run": lambda: MetricsFile(run / "metrics.jsonl").rewind(1),
    }


@pytest.mark.parametrize("name", ["episodes.jsonl", "metrics.jsonl", "recipe.yaml"])
@given(data=st.data())
@inputs(50)
def test_files_of_a_run(run: Path, name: str, data: st.DataObject) -> None:
    kept = {file: (run / file).read_bytes() for file in ("episodes.jsonl", "metrics.jsonl")}
    changed = data.draw(changed_bytes((run / name).read_bytes()))
    for read in readers(run).values():
        replaced(run / name, changed, read, named="")
        for file, content in kept.items():
            (run / file).write_bytes(content)


@given(data=st.data())
@inputs(200)
def test_the_record_of_an_evaluation(run: Path, data: st.DataObject) -> None:
    file = evaluation_file(run, 3)
    valid = read_evaluation(file)
    text = json.dumps(data.draw(documents(json.loads(file.read_text()))))

    def read() -> None:
        found = read_evaluation(file)
        counted = pair(found, valid)["all tasks"].pairs
        crashes = sum(episode["outcome"] == Outcome.CRASH for episode in found["episodes"])
        # no episode is counted twice or dropped without a word
        assert counted == len(found["episodes"]) - crashes
        assert found["total"]["successes"] <= found["total"]["episodes"]

    replaced(file, text.encode(), read, named="")
