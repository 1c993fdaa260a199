"""Where LIBERO's fixtures stand: the first placement, and that of each reset of a stock
environment."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from other_process import continued_elsewhere, stock_trace

from verl_vla.config.choices import CAMERAS
from verl_vla.core.errors import ConfigError
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import SETTLE_ACTION, LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env

pytestmark = pytest.mark.sim

SMALL = EnvConfig(suite="libero_goal", render_size=64, image_size=56, settle_steps=2)
CABINET = "wooden_cabinet_1"
CABINET_X_M = (0.0396, 0.0226, 0.0259, 0.0315)
"""Cabinet of libero_goal task 0 after each of the first four resets of a stock environment."""
OPEN_DRAWER = ("libero_10", 3)
"""Its drawer starts open: a random number for each time that the model was built."""
CHUNK = np.tile(np.float32([0.3, 0.1, -0.2, 0.0, 0.0, 0.1, 1.0]), (8, 1))


@pytest.fixture(scope="module")
def redrawn() -> Iterator[LiberoEnv]:
    env = make_libero_env(replace(SMALL, fixtures="redrawn"))
    yield env
    env.close()


def cabinet_x_m(env: LiberoEnv) -> float:
    simulator = env.simulator(0)
    return float(simulator.model.body_pos[simulator.body(CABINET)][0])


def test_an_init_state_has_the_fixtures_of_its_reset_in_any_order(redrawn: LiberoEnv) -> None:
    for init_state in (3, 0, 2, 1, 3):
        redrawn.reset(0, init_state)
        assert cabinet_x_m(redrawn) == pytest.approx(CABINET_X_M[init_state], abs=5e-5)


def test_fixtures_stay_where_the_first_reset_puts_them() -> None:
    env = make_libero_env(SMALL)
    for init_state in (0, 3):
        env.reset(0, init_state)
        assert cabinet_x_m(env) == pytest.approx(CABINET_X_M[0], abs=5e-5)
    env.close()


@pytest.mark.parametrize(
    ("suite", "task_id"), [("libero_goal", 0), OPEN_DRAWER], ids=["goal", "open-drawer"]
)
def test_the_third_episode_is_that_of_a_stock_environment(
    suite: str, task_id: int, tmp_path: Path
) -> None:
    env = make_libero_env(
        EnvConfig(suite=suite, cameras=CAMERAS, render_size=128, fixtures="redrawn")
    )
    init_state = env.suite.load_init_states(task_id)[2]
    moves = np.concatenate([[SETTLE_ACTION] * env.config.settle_steps, CHUNK.astype(np.float64)])
    stock = stock_trace(suite, task_id, init_state, moves, tmp_path, resets=3)
    env.reset(task_id, 2)
    for action in CHUNK:
        env.step(action.astype(np.float64))
    simulator = env.simulator(task_id)
    assert np.array_equal(simulator.data.qpos, stock["qpos"][-1])
    assert np.array_equal(simulator.data.qvel, stock["qvel"][-1])
    for camera in CAMERAS:
        assert np.array_equal(simulator.render(camera), stock[camera][-1][::-1, ::-1])
    env.close()


def test_a_snapshot_takes_its_fixtures_to_another_process(
    redrawn: LiberoEnv, tmp_path: Path
) -> None:
    """Even to an environment that keeps its own fixtures in the first placement."""
    redrawn.reset(0, 2)
    redrawn.step_chunk(CHUNK)
    kept = pickle.loads(pickle.dumps(redrawn.snapshot()))
    (theirs,), their_state = continued_elsewhere(SMALL, kept, [CHUNK], tmp_path, starts=[1])
    # another placement in between, from which the snapshot brings its own back
    redrawn.reset(0, 1)
    redrawn.restore(kept)
    ours = redrawn.step_chunk(CHUNK).observation
    state = redrawn.simulator(0).state
    assert np.array_equal(state.physics, their_state.physics)
    assert np.array_equal(state.fixtures.position_m, their_state.fixtures.position_m)
    assert cabinet_x_m(redrawn) == pytest.approx(CABINET_X_M[2], abs=5e-5)
    assert pickle.dumps(ours) == pickle.dumps(theirs)


def test_samples_do_not_depend_on_the_episode_before(redrawn: LiberoEnv) -> None:
    redrawn.reset(0, 0)
    before = redrawn.simulator(0).place_objects(5)
    redrawn.reset(0, 3)
    assert np.array_equal(redrawn.simulator(0).place_objects(5), before)
    assert cabinet_x_m(redrawn) == pytest.approx(CABINET_X_M[0], abs=5e-5)


def test_a_sampled_start_is_refused(redrawn: LiberoEnv) -> None:
    first_sampled = redrawn.suite.num_init_states
    with pytest.raises(ConfigError, match="fixtures is 'redrawn', but init state 50 is sampled"):
        redrawn.reset(0, first_sampled)


def test_redrawing_keeps_the_random_numbers_of_a_program(redrawn: LiberoEnv) -> None:
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    redrawn.simulator(0).fixtures_of_reset(7)
    assert np.array_equal(np.random.random(3), expected)


def test_a_reset_without_room_for_the_objects_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in LIBERO: the model is built once more, and its drawer is listed once more."""
    suite, task_id = OPEN_DRAWER
    env = make_libero_env(replace(SMALL, suite=suite))
    simulator = env.simulator(task_id)
    from robosuite.utils.errors import RandomizationError  # noqa: PLC0415 -- GL is set up above

    problem, listed = simulator._env, []
    reset, before = problem.reset, problem.object_property_initializers

    def crowded_once() -> None:
        listed.append(len(problem.object_property_initializers))
        if len(listed) == 1:
            raise RandomizationError("no room")
        reset()

    monkeypatch.setattr(problem, "reset", crowded_once)
    simulator.fixtures_of_reset(1)
    assert listed == [3, 4]
    assert problem.object_property_initializers is before
    env.close()


def test_a_task_without_fixtures_has_nothing_to_move() -> None:
    env = make_libero_env(EnvConfig(render_size=64, image_size=56, fixtures="redrawn"))
    seen = env.reset(0, 1)
    assert env.simulator(0).fixtures_of_reset(1).position_m.shape == (0, 3)
    env.close()
    plain = make_libero_env(EnvConfig(render_size=64, image_size=56))
    assert pickle.dumps(plain.reset(0, 1)) == pickle.dumps(seen)
    plain.close()
