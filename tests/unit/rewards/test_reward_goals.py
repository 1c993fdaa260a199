"""Rewards that are told the simulator's distances."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.rewards import TrajectoryBatch, goal_progress, load_reward, smallest_reach

START = (0.4, 0.2, 0)
TOUCHED = (0.0, 0.2, 0)
HALFWAY = (0.0, 0.1, 0)
THERE = (0.0, 0.05, 1)


def readings(*moments: tuple[float, float, float]) -> np.ndarray:
    """An episode of one goal."""
    return np.array(moments, dtype=np.float32)[:, None]


def make_batch(*episodes: np.ndarray) -> TrajectoryBatch:
    number = len(episodes)
    return TrajectoryBatch(
        episode_id=np.arange(number),
        group_id=np.zeros(number, dtype=np.int64),
        task_key=("mini/0",) * number,
        init_state_id=np.zeros(number, dtype=np.int64),
        success=np.array([bool(e[-1, :, 2].all()) for e in episodes]),
        num_steps=np.array([8 * (len(e) - 1) for e in episodes]),
        frames=None,
        proprio=None,
        goals=episodes,
    )


def test_progress_is_the_way_covered_by_the_gripper_and_by_the_object():
    progress = goal_progress(readings(START, TOUCHED, HALFWAY, THERE))
    np.testing.assert_allclose(progress, [0, 0.5, 0.75, 1])


def test_going_away_is_no_progress():
    assert goal_progress(readings(START, (0.9, 0.3, 0)))[-1] == 0


def test_goals_count_alike():
    reached = np.concatenate([readings(START, THERE), readings(START, START)], axis=1)
    assert goal_progress(reached)[-1] == 0.5


def test_an_object_that_was_there_from_the_start_had_no_way_to_go():
    progress = goal_progress(readings((0.4, 0, 0), (0.2, 0, 0)))
    np.testing.assert_allclose(progress, [0, 0.25], rtol=1e-6)


def test_only_objects_that_must_still_be_moved_are_reached_for():
    both = np.concatenate([readings((0.1, 0.2, 1)), readings((0.3, 0.2, 0))], axis=1)
    assert smallest_reach(both).tolist() == pytest.approx([0.3])
    assert smallest_reach(readings(THERE)).tolist() == [0]


def test_the_oracle_ranks_failures_below_every_success():
    reward = load_reward("oracle", {"alpha": 0.6})
    batch = make_batch(*(readings(START, m) for m in (START, TOUCHED, HALFWAY, THERE)))
    np.testing.assert_allclose(reward(batch).score, [0, 0.3, 0.45, 1], rtol=1e-6)


def test_reaching_is_the_nearest_that_an_episode_came():
    reward = load_reward("reaching", {})
    batch = make_batch(readings(START, (0.1, 0.2, 0), (0.3, 0.2, 0)), readings(START, THERE))
    result = reward(batch)
    np.testing.assert_allclose(result.score, [-0.1, 10], rtol=1e-6)
    assert result.max_score >= 10


def test_the_potential_form_pays_for_what_was_gained_and_kept():
    reward = load_reward("reaching", {"form": "potential"})
    batch = make_batch(readings(START, (0.1, 0.2, 0), (0.3, 0.2, 0)), readings(START, THERE))
    np.testing.assert_allclose(reward(batch).score, [0.1, 10.4], rtol=1e-6)


def test_a_detour_does_not_change_the_potential_form():
    reward = load_reward("reaching", {"form": "potential"})
    straight = make_batch(readings(START, HALFWAY))
    detour = replace(straight, goals=(readings(START, (0.9, 0.9, 0), THERE, HALFWAY),))
    assert reward(straight).score == reward(detour).score


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("oracle", {"alpha": 1.0}, "alpha is 1.0"),
        ("reaching", {"form": "shortest"}, "form is 'shortest'"),
        ("reaching", {"success_score": 0.0}, "success_score is 0.0"),
    ],
)
def test_wrong_arguments_are_refused(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(name, arguments)
