"""The cold-start check: what is played, what decides, and what it says."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from verl_vla.config.grpo import ColdStartConfig
from verl_vla.core.episode import Start
from verl_vla.core.errors import ColdStartError, ConfigError
from verl_vla.core.success_rate import SuccessRate
from verl_vla.envs.fake import FakeEnv, FakeEnvConfig
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.evaluation.cold_start import (
    MAX_ROUNDS,
    Probe,
    Rates,
    keep,
    probe,
    probe_starts,
    was_passed,
)
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tiny_policy

THRESHOLD = ColdStartConfig().threshold
NAMES = {0: "lift", 4: "push"}


def rates(successes: int, episodes: int, split: str = "train", crashes: int = 0) -> Rates:
    rate = SuccessRate(successes=successes, episodes=episodes, crashes=crashes)
    return Rates(split=split, total=rate, per_task={4: rate})


def measured(sampled: tuple[int, int], greedy: tuple[int, int]) -> Probe:
    return Probe(greedy=rates(*greedy, "held_out"), sampled=rates(*sampled), temperature=1.6)


@pytest.mark.parametrize(
    ("sampled", "greedy", "passes"),
    [
        ((0, 32), (0, 100), False),
        ((4, 32), (14, 100), False),
        ((5, 32), (0, 100), True),  # 15.6% sampled: GRPO learns from that
        ((3, 20), (0, 20), True),  # exactly the threshold
        ((4, 32), (90, 100), False),  # greedy play decides nothing
        ((0, 32), (90, 100), False),  # drowned by the temperature
        ((0, 0), (0, 0), False),  # every simulator was lost
        ((0, 0), (9, 10), False),
    ],
)
def test_the_rule(sampled: tuple[int, int], greedy: tuple[int, int], passes: bool) -> None:
    found = measured(sampled, greedy)
    assert found.passes(THRESHOLD) == passes
    if passes:
        found.require(THRESHOLD, NAMES)
    else:
        with pytest.raises(ColdStartError):
            found.require(THRESHOLD, NAMES)


@pytest.mark.parametrize(
    ("sampled", "is_decided"),
    [((0, 32), True), ((1, 32), False), ((4, 32), False), ((5, 32), True), ((0, 0), False)],
)
def test_more_episodes_are_played_while_the_interval_holds_the_threshold(
    sampled: tuple[int, int], is_decided: bool
) -> None:
    assert measured(sampled, (0, 0)).is_decided(THRESHOLD) == is_decided


@pytest.mark.parametrize(("rate", "low", "high"), [(0.05, 0.0, 0.05), (0.2, 0.93, 1.0)])
def test_a_policy_of_5_percent_is_refused_and_one_of_20_percent_trained(
    rate: float, low: float, high: float
) -> None:
    rng = np.random.default_rng(0)
    episodes = ColdStartConfig().episodes
    passed = 0
    for _ in range(2000):
        solved = played = 0
        while played < MAX_ROUNDS * episodes:
            solved, played = solved + int(rng.binomial(episodes, rate)), played + episodes
            found = measured((solved, played), (0, 0))
            if found.is_decided(THRESHOLD):
                break
        passed += found.passes(THRESHOLD)
    assert low <= passed / 2000 <= high


def refusal(found: Probe) -> str:
    with pytest.raises(ColdStartError) as caught:
        found.require(THRESHOLD, NAMES)
    return str(caught.value)


@pytest.mark.parametrize(("split", "word"), [("held_out", "held-out"), ("sampled", "sampled")])
def test_a_probe_says_which_starts_it_played(split: str, word: str) -> None:
    found = Probe(greedy=rates(3, 100, split), sampled=rates(0, 32), temperature=1.6)
    assert f"greedily 3 of 100 {word} ones" in found.summary()


def test_a_refusal_says_what_was_measured_and_what_to_do() -> None:
    says = refusal(measured((0, 32), (3, 100)))
    assert "sampled at temperature 1.6 it solved 0 of 32 training episodes" in says
    assert "(95% interval 0.0-10.7%), greedily 3 of 100 held-out ones" in says
    assert "at least 15% are wanted (cold_start.threshold)" in says
    assert "lift: greedy not played, sampled not played" in says
    assert "push: greedy 3 of 100, sampled 0 of 32" in says
    for remedy in (
        "demonstrations (sft)",
        "environment.tasks",
        "reward=reaching sampling.filter_on=reward",
        "docs/add-a-reward.md",
        "cold_start.mode=off",
    ):
        assert remedy in says


def test_the_remedy_fits_what_was_measured() -> None:
    assert "lower sampling.temperature" in refusal(measured((0, 32), (90, 100)))
    lost = Probe(greedy=rates(0, 0, crashes=4), sampled=rates(0, 0, crashes=4), temperature=1.0)
    assert "0 of 0 (4 crashed)" in refusal(lost)
    assert "reason of each crash" in refusal(lost)


def test_starts_are_the_first_of_every_task_in_turn() -> None:
    starts = [Start(task_id=t, init_state_id=i) for t in range(6) for i in range(t + 1, 5)]
    chosen = [(s.task_id, s.init_state_id) for s in probe_starts(starts, 6)]
    assert chosen == [(0, 1), (1, 2), (2, 3), (3, 4), (0, 2), (1, 3)]
    assert [s.task_id for s in probe_starts(starts, 2)] == [0, 2]  # at even distances
    assert sorted(map(repr, probe_starts(starts, 99))) == sorted(map(repr, starts))


@pytest.mark.parametrize("damaged", ["{", "{}", "null", '{"passed": 1}'])
def test_a_damaged_record_is_named(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "cold_start.json").write_text(damaged)
    with pytest.raises(ConfigError, match=r"cold_start.json.*remove the file to check again"):
        was_passed(tmp_path)


def test_a_record_is_kept_whole_and_read_back(tmp_path: Path) -> None:
    assert not was_passed(tmp_path)
    config = ColdStartConfig(threshold=0.5)
    for sampled, passed in (((1, 4), False), ((2, 4), True)):
        keep(tmp_path, measured(sampled, (0, 9)).as_json(config, NAMES))
        assert was_passed(tmp_path) == passed
    kept = json.loads((tmp_path / "cold_start.json").read_text())
    assert kept["greedy"]["states"] == "held_out"
    assert kept["sampled"]["tasks"]["push"]["successes"] == 2
    assert (kept["threshold"], kept["temperature"]) == (0.5, 1.6)
    assert [file.name for file in tmp_path.iterdir()] == ["cold_start.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "cold_start.threshold is 0.0; it is a share of episodes"),
        ({"threshold": 15.0}, "cold_start.threshold is 15.0"),
        ({"episodes": 0}, "cold_start.episodes is 0; set 1 to 1,000,000, or cold_start.mode=off"),
    ],
)
def test_an_impossible_gate_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ColdStartConfig(**options)


def test_a_real_policy_is_probed_on_real_processes() -> None:
    """Greedy play is not repeated where its counts are known; the probe repeats itself exactly."""
    statistics = ActionStatistics(q01=[-1.0] * 7, q99=[1.0] * 7, mask=[True] * 6 + [False])
    sizes = TinySizes(image_size=28, vision_width=12, llm_width=16, llm_depth=1, llm_mlp=16)
    instructions = [FakeEnv(FakeEnvConfig(image_size=28)).reset(t, 0).instruction for t in (0, 1)]
    policy = build_tiny_policy(instructions, statistics, sizes=sizes)
    starts = [Start(task_id=t, init_state_id=i) for i in range(8) for t in (0, 1)]
    with EnvPool(
        partial(FakeEnv, FakeEnvConfig(image_size=28)),
        num_workers=1,
        num_slots=8,
        image_shape=(1, 28, 28, 3),
        timeout_s=60.0,
        worker_env={},
    ) as pool:
        first, again, passed = (
            probe(
                starts,
                policy,
                pool,
                config=ColdStartConfig(episodes=episodes, threshold=threshold),
                temperature=1.0,
                seed=5,
                greedy=greedy,
            )
            for greedy, episodes, threshold in (
                (None, 6, 0.35),
                (rates(7, 9, "held_out"), 6, 0.35),
                (None, 16, 0.01),
            )
        )
    assert first.sampled == again.sampled
    assert first.greedy is not None
    assert first.greedy.total.episodes == 6
    assert first.sampled.total.episodes == 16  # 6, 6 and what is left: the interval holds 35%
    assert passed.greedy is None
    assert passed.sampled.total.successes > 0
    # Actions drawn evenly solve one in six of these; an untrained greedy policy goes one way.
    assert 0 < first.sampled.total.successes < 16
    assert first.greedy.split == "train"
    assert first.greedy.total != first.sampled.total
    assert again.greedy == rates(7, 9, "held_out")
