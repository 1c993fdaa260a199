"""Recording demonstrations: what is recorded, of whom, and from which starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.datasets.demonstrations import Demonstration
from verl_vla.datasets.record import FASTEST, RecordingConfig, play_expert, record
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env

PUSH, LIFT = 0, 1
SMALL = EnvConfig(suite="mini", render_size=32, image_size=28)


def same(a: Demonstration, b: Demonstration) -> bool:
    return (a.task_id, a.instruction, a.num_steps) == (b.task_id, b.instruction, b.num_steps) and (
        all(
            np.array_equal(getattr(a, name), getattr(b, name))
            and getattr(a, name).dtype == getattr(b, name).dtype
            for name in ("images", "frame_steps", "actions")
        )
    )


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
def test_an_attempt_is_what_an_sft_sample_needs(env: LiberoEnv) -> None:
    config = RecordingConfig(every=3, horizon=8, noise=0.0)
    made = play_expert(env, LIFT, config, seed=1, index=0)
    assert made is not None
    assert made.instruction == "lift the red cube"
    assert made.images.shape == (len(made.frame_steps), 1, 28, 28, 3)
    assert made.frame_steps.tolist() == list(range(0, made.num_steps, 3))
    assert made.actions.shape == (made.num_steps + 8, 7)
    assert np.abs(made.actions[:, :3]).max() <= np.float32(FASTEST)
    assert np.ptp(made.actions[:, 3:6]) == 0
    assert set(made.actions[:, 6].tolist()) == {-1.0, 1.0}


@pytest.mark.sim
def test_an_attempt_starts_from_neither_split(env: LiberoEnv) -> None:
    recorded = env.suite.load_init_states(LIFT)
    starts: list[np.ndarray] = []
    reset_to = env.reset_to
    env.reset_to = lambda task_id, state: (starts.append(state), reset_to(task_id, state))[1]  # type: ignore[method-assign]
    for index in range(3):
        play_expert(env, LIFT, RecordingConfig(), seed=1, index=index)
    env.reset_to = reset_to  # type: ignore[method-assign]
    assert len({start.tobytes() for start in starts}) == 3
    for start in starts:
        assert np.abs(recorded - start).max(1).min() > 1e-4


@pytest.mark.sim
def test_what_follows_an_image_is_what_was_executed(env: LiberoEnv) -> None:
    made = play_expert(env, LIFT, RecordingConfig(every=1), seed=2, index=0)
    assert made is not None
    assert made.frame_steps.tolist() != list(range(made.num_steps)), "nothing disturbed it"
    executed: list[np.ndarray] = []
    simulator = env.simulator(LIFT)
    run = simulator.step
    simulator.step = lambda action: (executed.append(action), run(action))[1]  # type: ignore[method-assign]
    again = play_expert(env, LIFT, RecordingConfig(every=1), seed=2, index=0)
    del simulator.step
    assert again is not None
    assert same(made, again)
    commanded = np.stack(executed)[env.config.settle_steps :].astype(np.float32)
    for step in made.frame_steps:
        assert np.array_equal(commanded[step : step + 8], made.actions[step : step + 8])
    disturbed = np.abs(commanded - made.actions).max(1) > 0
    assert 0 < disturbed.sum() < len(disturbed) / 2


@pytest.mark.sim
def test_a_disturbance_leads_elsewhere(env: LiberoEnv) -> None:
    seen = [
        play_expert(env, LIFT, RecordingConfig(noise=noise), seed=2, index=0)
        for noise in (0.0, 0.5)
    ]
    assert seen[0] is not None
    assert seen[1] is not None
    both = min(len(seen[0].actions), len(seen[1].actions))
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
    for demonstration in made:
        assert demonstration is not None
        assert len(demonstration.actions) == demonstration.num_steps + config.horizon
        closing = int(np.argmax(demonstration.actions[:, 6] > 0))
        lowest.append(float(demonstration.actions[:closing, 2].sum()))
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
