"""What a run's folder remembers of its evaluations."""

from __future__ import annotations

import json
import math

import numpy as np
import torch

from verl_vla.envs.libero import EnvConfig
from verl_vla.envs.suites import suite
from verl_vla.evaluation import Evaluation, SuccessRate, count
from verl_vla.run_folder import evaluation_record, keep_evaluation
from verl_vla.types import Decisions, Episodes, Outcome, Trajectories

MINI = suite("mini")


def make_evaluation(outcomes: list[Outcome]) -> Evaluation:
    """One episode of task 2 per outcome, without decisions."""
    number = len(outcomes)
    ids = torch.arange(number)
    played = Trajectories(
        episodes=Episodes(
            task_id=torch.full((number,), 2),
            init_state_id=ids + 50,
            group_id=ids,
            episode_id=ids,
            outcome=torch.tensor(outcomes, dtype=torch.int64),
            num_steps=ids + 10,
        ),
        decisions=Decisions(
            episode=torch.zeros(0, dtype=torch.int64),
            image=torch.zeros(0, 1, 2, 2, 3, dtype=torch.uint8),
            proprio=torch.zeros(0, 8),
            bins=torch.zeros(0, 56, dtype=torch.int64),
            logp=torch.zeros(0, 56),
            executed=torch.zeros(0, dtype=torch.int64),
        ),
        prompt_ids=(),
        goals=(np.zeros((1, 1, 3), dtype=np.float32),) * number,
        crashes={i: "lost" for i, o in enumerate(outcomes) if o == Outcome.CRASH},
    )
    rate = count(played, [2])
    return Evaluation(total=rate, per_task={2: rate}, trajectories=played)


def test_an_evaluation_is_written_with_what_decides_whether_two_compare():
    env = EnvConfig(suite="mini", render_size=64)
    result = make_evaluation([Outcome.SUCCESS, Outcome.TIMEOUT, Outcome.CRASH])
    record = evaluation_record(result, env, {2: "name"})
    rate = SuccessRate(successes=1, episodes=2, crashes=1).as_json()
    assert record == {
        "suite": "mini",
        "step_limits": {"name": MINI.step_limit("published", 2)},
        "states": "held_out",
        "render_size": 64,
        "total": rate,
        "tasks": {"name": rate},
        "episodes": [
            {"task": 2, "init_state": 50, "outcome": 0, "steps": 10},
            {"task": 2, "init_state": 51, "outcome": 1, "steps": 11},
            {"task": 2, "init_state": 52, "outcome": 2, "steps": 12},
        ],
        "crashes": {"2": "lost"},
    }


def test_an_evaluation_that_lost_everything_is_still_json():
    result = make_evaluation([Outcome.CRASH])
    assert math.isnan(result.total.rate)
    record = evaluation_record(result, EnvConfig(suite="mini"), {2: "name"})
    assert json.loads(json.dumps(record, allow_nan=False))["total"]["rate"] is None


def test_an_evaluation_of_drawn_starts_says_so():
    result = make_evaluation([Outcome.SUCCESS])
    ids = result.trajectories.episodes.init_state_id
    ids += MINI.num_init_states
    assert evaluation_record(result, EnvConfig(suite="mini"), {2: "name"})["states"] == "drawn"


def test_evaluations_are_kept_by_step(tmp_path):
    env = EnvConfig(suite="mini")
    for step, outcome in ((0, Outcome.TIMEOUT), (5, Outcome.SUCCESS)):
        keep_evaluation(
            tmp_path, step, evaluation_record(make_evaluation([outcome]), env, {2: "name"})
        )
    folder = tmp_path / "evaluations"
    rates = {p.stem: json.loads(p.read_text())["total"]["rate"] for p in folder.iterdir()}
    assert rates == {"step_0": 0.0, "step_5": 1.0}
