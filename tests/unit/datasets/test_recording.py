"""Recording demonstrations: what is recorded, of whom, and from which starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.datasets.expert_episode import FASTEST, RecordingConfig, play_expert
from verl_vla.datasets.libero_writer import LiberoEpisode
from verl_vla.datasets.record import record
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env

PUSH, LIFT = 0, 1
SMALL = EnvConfig(suite="mini", render_size=32)
SETTLE = SMALL.settle_steps
AGENTVIEW = "obs/agentview_rgb"


def same(a: LiberoEpisode, b: LiberoEpisode) -> bool:
    return a.task_id == b.task_id and all(
        np.array_equal(mine, theirs) for mine, theirs in zip(arrays(a), arrays(b), strict=True)
    )


def arrays(episode: LiberoEpisode) -> list[np.ndarray]:
    fields = (episode.actions, episode.disturbed, episode.states, episode.rendered)
    return [*fields, *episode.proprio.values(), *episode.images.values()]


@pytest.mark.parametrize(
    "change",
    [
        {"slowest_pace": 0.0},
        {"fastest_pace": FASTEST + 0.01},
        {"slowest_pace": 0.8, "fastest_pace": 0.7},
        {"noise": -0.1},
        {"height_error_m": -0.01},
        {"every": 0},
        {"horizon": 0},
        {"disturbed_steps": 0},
        {"calm_steps": 7},
    ],
)
def test_impossible_recordings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change)).split("_")[-1]):
        replace(RecordingConfig(), **change)


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    made = make_libero_env(SMALL)
    yield made
    made.close()


@pytest.mark.sim
def test_an_undisturbed_attempt_has_an_image_at_every_row(env: LiberoEnv) -> None:
    made = play_expert(env, LIFT, RecordingConfig(), seed=1, index=0)
    assert made is not None
    assert made.rendered.all()
    assert not made.disturbed.any()
    assert made.images[AGENTVIEW].shape == (made.num_steps, 32, 32, 3)
    assert np.abs(made.actions[:, :3]).max() <= FASTEST
    assert np.ptp(made.actions[:, 3:6]) == 0
    assert set(made.actions[:, 6].tolist()) == {-1.0, 1.0}
    assert not made.actions[:SETTLE, :6].any()


@pytest.mark.sim
def test_images_are_where_training_can_use_them(env: LiberoEnv) -> None:
    config = RecordingConfig(every=3, horizon=8, noise=0.5)
    made = play_expert(env, LIFT, config, seed=1, index=0)
    assert made is not None
    rows = np.flatnonzero(made.rendered)
    assert len(made.images[AGENTVIEW]) == len(rows) > 3
    assert rows.min() >= SETTLE
    assert not ((rows - SETTLE) % 3).any()
    assert made.disturbed.any()
    for row in rows:
        assert row + 8 <= made.num_steps, "a whole chunk follows"
        assert not made.disturbed[row : row + 8].any()


@pytest.mark.sim
def test_an_attempt_starts_from_neither_split(env: LiberoEnv) -> None:
    recorded = env.suite.load_init_states(LIFT)
    starts = [
        made.states[0]
        for index in range(3)
        if (made := play_expert(env, LIFT, RecordingConfig(every=8), seed=1, index=index))
    ]
    assert len({start.tobytes() for start in starts}) == 3
    for start in starts:
        assert np.abs(recorded - start).max(1).min() > 1e-4


@pytest.mark.sim
def test_the_actions_are_those_that_were_executed(env: LiberoEnv) -> None:
    made = play_expert(env, LIFT, RecordingConfig(noise=0.5), seed=2, index=0)
    assert made is not None
    assert 0 < made.disturbed.sum() < made.num_steps / 2
    simulator = env.simulator(LIFT)
    simulator.begin(made.states[0])
    for state, action in zip(made.states, made.actions, strict=True):
        assert np.array_equal(simulator.flat_state(), state)
        simulator.step(action)


@pytest.mark.sim
def test_a_disturbance_leads_elsewhere(env: LiberoEnv) -> None:
    seen = [
        play_expert(env, LIFT, RecordingConfig(noise=noise), seed=2, index=0)
        for noise in (0.0, 0.5)
    ]
    assert seen[0] is not None
    assert seen[1] is not None
    both = min(seen[0].num_steps, seen[1].num_steps)
    assert np.array_equal(seen[0].states[0], seen[1].states[0])
    assert not np.array_equal(seen[0].actions[:both], seen[1].actions[:both])


@pytest.mark.sim
def test_an_attempt_that_takes_too_long_is_dropped(env: LiberoEnv) -> None:
    hopeless = replace(env.config, step_limit=5)
    short = make_libero_env(hopeless)
    assert play_expert(short, PUSH, RecordingConfig(), seed=0, index=0) is None
    short.close()
    with pytest.raises(ConfigError, match="ended 0 of"):
        list(record(hopeless, [PUSH], episodes=2, config=RecordingConfig(), seed=0, workers=1))


@pytest.mark.sim
def test_a_careless_operators_miss_is_recorded_until_just_after_it(env: LiberoEnv) -> None:
    config = RecordingConfig(noise=0.0, height_error_m=0.06)
    made = [play_expert(env, LIFT, config, seed=3, index=index) for index in range(6)]
    lowest = []
    for episode in made:
        assert episode is not None
        assert episode.num_steps < env.suite.step_limit("published", LIFT)
        closing = int(np.argmax(episode.actions[:, 6] > 0))
        lowest.append(float(episode.actions[:closing, 2].sum()))
    # who believes the cube to lie higher comes down less before the fingers close
    assert np.ptp(lowest) > 0.5
    flawless = play_expert(env, LIFT, replace(config, height_error_m=0.0), seed=3, index=0)
    assert flawless is not None


@pytest.mark.sim
def test_a_recording_depends_on_the_seed_and_not_on_the_workers() -> None:
    config = RecordingConfig(every=8)
    parts = [
        list(record(SMALL, [LIFT, PUSH], episodes=2, config=config, seed=seed, workers=workers))
        for seed, workers in ((0, 1), (0, 2), (1, 2))
    ]
    assert [d.task_id for d in parts[0]] == [LIFT, LIFT, PUSH, PUSH]
    assert all(same(a, b) for a, b in zip(parts[0], parts[1], strict=True))
    assert not any(same(a, b) for a, b in zip(parts[0], parts[2], strict=True))
