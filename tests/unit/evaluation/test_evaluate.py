"""Success rates with their counts and intervals, on starts that stay the same."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_chunk_world import (
    SHAPE,
    STARTS,
    TASK_NAMES,
    NotingPolicy,
    OneChunkSimulators,
)

from verl_vla.config.shared import EvaluationConfig
from verl_vla.core.episode import Start
from verl_vla.core.errors import ConfigError
from verl_vla.core.success_rate import WILSON_Z, SuccessRate, count
from verl_vla.evaluation.evaluate import EVALUATION_STREAM, evaluate
from verl_vla.rl.rollout import NoiseSource, RolloutTimes
from verl_vla.runs.metrics import check_declared
from verl_vla.trainer.grpo.env_loop import TRAINING_STREAM


def run_evaluation(starts: Sequence[Start], temperature: float = 0.0):
    policy, simulators = NotingPolicy(), OneChunkSimulators()
    result = evaluate(starts, policy, simulators, temperature=temperature, seed=3)
    return result, policy, simulators


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        # scipy 1.17, binomtest(successes, episodes).proportion_ci(0.95, "wilson")
        (8, 10, 0.49016, 0.94332),
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (50, 100, 0.40383, 0.59617),
        (1, 1, 0.20655, 1.0),
    ],
)
def test_the_interval_has_known_values(successes, episodes, low, high):
    interval = SuccessRate(successes=successes, episodes=episodes, crashes=0).ci95
    assert interval == pytest.approx((low, high), abs=1e-5)


@given(st.integers(1, 500), st.data())
def test_the_interval_holds_every_rate_that_the_count_does_not_contradict(episodes, data):
    """Wilson's definition: at both ends the count lies just z standard errors away."""
    successes = data.draw(st.integers(0, episodes))
    rate = SuccessRate(successes=successes, episodes=episodes, crashes=0)
    low, high = rate.ci95
    assert 0 <= low <= rate.rate <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            distance = abs(rate.rate - end) / math.sqrt(end * (1 - end) / episodes)
            assert distance == pytest.approx(WILSON_Z, rel=1e-6)


def test_a_rate_of_nothing_is_unknown():
    nothing = SuccessRate(successes=0, episodes=0, crashes=5)
    assert math.isnan(nothing.rate)
    assert nothing.ci95 == (0.0, 1.0)
    record = json.loads(json.dumps(nothing.as_json(), allow_nan=False))
    assert record == {"rate": None, "successes": 0, "episodes": 0, "crashes": 5, "ci95": [0.0, 1.0]}


def test_a_rate_is_written_with_its_counts():
    record = SuccessRate(successes=1, episodes=4, crashes=2).as_json()
    assert (record["rate"], record["successes"], record["episodes"], record["crashes"]) == (
        0.25,
        1,
        4,
        2,
    )


def test_crashes_count_neither_as_success_nor_as_failure():
    result, _, _ = run_evaluation(STARTS)
    assert result.total == SuccessRate(successes=2, episodes=4, crashes=2)
    assert result.per_task == {
        0: SuccessRate(successes=0, episodes=1, crashes=1),
        4: SuccessRate(successes=2, episodes=3, crashes=1),
    }


def test_counting_no_task_counts_nothing():
    result, _, _ = run_evaluation(STARTS)
    nothing = SuccessRate(successes=0, episodes=0, crashes=0)
    assert count(result.trajectories, []) == nothing
    assert count(result.trajectories, [9]) == nothing


def test_what_was_played_is_in_the_order_of_the_starts():
    result, _, _ = run_evaluation(STARTS)
    episodes = result.trajectories.episodes
    assert episodes.task_id.tolist() == [s.task_id for s in STARTS]
    assert episodes.init_state_id.tolist() == [s.init_state_id for s in STARTS]
    assert episodes.outcome.tolist() == [0, 1, 2, 0, 1, 2]


def test_every_start_is_played_once_and_is_a_group_of_its_own():
    _, _, simulators = run_evaluation(STARTS)
    assert [s.episode_id for s in simulators.specs] == list(range(len(STARTS)))
    assert len({s.group_id for s in simulators.specs}) == len(STARTS)


def test_the_metrics_are_declared_and_carry_the_counts():
    result, _, _ = run_evaluation(STARTS)
    metrics = result.as_metrics(TASK_NAMES)
    check_declared(metrics)
    low, high = result.total.ci95
    assert metrics == {
        "val/success_rate": 0.5,
        "val/episodes": 4.0,
        "val/ci_low": low,
        "val/ci_high": high,
        "val/task/lift": 0.0,
        "val/task/push": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_play_is_at_the_temperature_and_the_noise_of_evaluation(temperature):
    _, policy, _ = run_evaluation(STARTS, temperature)
    assert policy.temperatures == {temperature}
    noise = NoiseSource(seed=3, stream=EVALUATION_STREAM)
    expected = {tuple(noise.uniform(i, 0, SHAPE.num_tokens)) for i in range(len(STARTS))}
    assert {tuple(n.tolist()) for n in policy.noises} == expected


def test_training_plays_from_another_stream_of_noise():
    assert TRAINING_STREAM != EVALUATION_STREAM


def test_the_seconds_are_added_up():
    times = RolloutTimes()
    evaluate(STARTS, NotingPolicy(), OneChunkSimulators(), temperature=0.0, seed=0, times=times)
    assert times.total_s > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes_per_task": 0}, "evaluation.episodes_per_task is 0; set at least 1, or null"),
        ({"temperature": -0.1}, "evaluation.temperature is -0.1; set 0 for greedy play"),
    ],
)
def test_an_impossible_knob_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig(**options)
