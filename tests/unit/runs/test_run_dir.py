"""What a run's folder remembers of its evaluations."""

from __future__ import annotations

import json

from verl_vla.core.episode import Outcome
from verl_vla.core.success_rate import SuccessRate
from verl_vla.runs.run_dir import evaluated_steps, evaluation_record, keep_evaluation

CONDITIONS = {"suite": "mini", "states": "held_out"}


def entries(*outcomes: Outcome) -> list[dict]:
    """One episode of task 2 per outcome."""
    return [
        {
            "episode": i,
            "task": 2,
            "init_state": 50 + i,
            "outcome": outcome,
            "steps": 10 + i,
            "crash": "lost" if outcome == Outcome.CRASH else None,
        }
        for i, outcome in enumerate(outcomes)
    ]


def test_an_evaluation_is_written_with_its_conditions():
    played = entries(Outcome.SUCCESS, Outcome.TIMEOUT, Outcome.CRASH)
    record = evaluation_record(played, CONDITIONS, {2: "name"})
    rate = SuccessRate(successes=1, episodes=2, crashes=1).as_json()
    assert record == CONDITIONS | {
        "total": rate,
        "tasks": {"name": rate},
        "episodes": [
            {"episode": 0, "task": 2, "init_state": 50, "outcome": 0, "steps": 10},
            {"episode": 1, "task": 2, "init_state": 51, "outcome": 1, "steps": 11},
            {"episode": 2, "task": 2, "init_state": 52, "outcome": 2, "steps": 12},
        ],
        "crashes": {"2": "lost"},
    }


def test_an_evaluation_that_lost_everything_is_still_json():
    record = evaluation_record(entries(Outcome.CRASH), CONDITIONS, {2: "name"})
    assert json.loads(json.dumps(record, allow_nan=False))["total"]["rate"] is None


def test_evaluations_are_kept_by_step(tmp_path):
    assert evaluated_steps(tmp_path) == []
    for step, outcome in ((0, Outcome.TIMEOUT), (15, Outcome.TIMEOUT), (5, Outcome.SUCCESS)):
        record = evaluation_record(entries(outcome), CONDITIONS, {2: "name"})
        keep_evaluation(tmp_path, step, record)
    folder = tmp_path / "evaluations"
    rates = {p.stem: json.loads(p.read_text())["total"]["rate"] for p in folder.iterdir()}
    assert rates == {"step_0": 0.0, "step_5": 1.0, "step_15": 0.0}
    assert evaluated_steps(tmp_path) == [0, 5, 15]
