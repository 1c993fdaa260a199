"""The simulator against the stock environment, and its snapshots, to the bit."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from other_process import continued_elsewhere, stock_trace

from verl_vla.config.choices import CAMERAS
from verl_vla.core.episode import Outcome
from verl_vla.core.image_preprocessing import prepare_image
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero import env as libero_env
from verl_vla.envs.libero.env import SETTLE_ACTION, LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env

pytestmark = pytest.mark.sim

MINI_PLACE = ("mini", 2)
SPATIAL = ("libero_spatial", 0)
OPEN_DRAWER = ("libero_10", 3)
"""Its drawer starts open, so the stock environment draws numbers for it before it places the
fixtures."""
MB, GB = 10**6, 10**9
STOVE = ("libero_goal", 7)
"""Turn on the stove: a light follows a joint."""
TASKS = [MINI_PLACE, SPATIAL, OPEN_DRAWER, STOVE]


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: f"{task[0]}-{task[1]}")
def played(request: pytest.FixtureRequest) -> Iterator[tuple[LiberoEnv, int]]:
    """An environment and a task of it."""
    name, task_id = request.param
    env = make_libero_env(EnvConfig(suite=name, cameras=CAMERAS, render_size=128, image_size=112))
    yield env, task_id
    env.close()


def actions(seed: int, length: int) -> np.ndarray:
    """Moves in all directions, turns now and then, a gripper that changes its mind."""
    rng = np.random.default_rng(seed)
    moves = np.clip(rng.normal(0.0, 0.5, (length, 7)), -1.0, 1.0)
    moves[:, 3:6] *= rng.random((length, 1)) < 0.3
    moves[:, 6] = np.sign(moves[:, 6])
    return moves


def physics(env: LiberoEnv, task_id: int) -> np.ndarray:
    return env.simulator(task_id).state.physics


def test_every_step_is_that_of_the_stock_environment(
    played: tuple[LiberoEnv, int], tmp_path: Path
) -> None:
    env, task_id = played
    simulator = env.simulator(task_id)
    init_state = env.suite.load_init_states(task_id)[3].copy()
    if (env.suite.name, task_id) == STOVE:
        option = simulator._model.joint("flat_stove_1_button").qposadr[0]
        init_state[1 + option] = 1.0  # rad: on, so the flame must be drawn
    # the stock environment draws two cameras at every step, which takes long in LIBERO's suites
    length = 40 if env.suite.needs_assets else 190
    moves = np.concatenate([[SETTLE_ACTION] * 10, actions(0, length)])
    stock = stock_trace(env.suite.name, task_id, init_state, moves, tmp_path)
    simulator.begin(init_state)
    for i, move in enumerate(moves):
        assert simulator.step(move) == stock["solved"][i]
        assert np.array_equal(simulator._data.qpos, stock["qpos"][i]), f"step {i}"
        assert np.array_equal(simulator._data.qvel, stock["qvel"][i]), f"step {i}"
        assert np.array_equal(simulator.proprio(), stock["proprio"][i]), f"step {i}"
        assert np.array_equal(simulator.seen_robot().arm_rad, stock["arm"][i]), f"step {i}"
        if i % 10 == 9 and env.suite.needs_assets:  # the mini suite is drawn more cheaply
            for camera in CAMERAS:
                as_evaluated = stock[camera][i][::-1, ::-1]
                assert np.array_equal(simulator.render(camera), as_evaluated), f"step {i}"


def test_an_observation_is_the_prepared_render(played: tuple[LiberoEnv, int]) -> None:
    env, task_id = played
    seen = env.reset(task_id, 0)
    for view, camera in zip(seen.image, CAMERAS, strict=True):
        render = env.simulator(task_id).render(camera)
        assert np.array_equal(view, prepare_image(render, size=env.config.image_size))


def test_a_restored_episode_goes_on_to_the_bit(played: tuple[LiberoEnv, int]) -> None:
    env, task_id = played
    chunks = actions(1, 56).reshape(7, 8, 7).astype(np.float32)
    env.reset(task_id, 1)
    for chunk in chunks[:2]:
        env.step_chunk(chunk)
    kept = pickle.dumps(env.snapshot())
    views = [env.step_chunk(chunk).observation for chunk in chunks[2:]]
    straight = physics(env, task_id)
    env.reset(task_id, 2)
    env.step_chunk(chunks[0])
    env.restore(pickle.loads(kept))
    again = [env.step_chunk(chunk).observation for chunk in chunks[2:]]
    assert np.array_equal(physics(env, task_id), straight)
    assert pickle.dumps(again) == pickle.dumps(views)


def test_what_was_seen_is_part_of_a_snapshot(played: tuple[LiberoEnv, int]) -> None:
    env, task_id = played
    env.reset(task_id, 1)
    env.step_chunk(actions(2, 8).astype(np.float32))
    kept, seen = env.snapshot(), env.observe()
    env.step_chunk(actions(3, 8).astype(np.float32))
    env.restore(kept)
    assert pickle.dumps(env.observe()) == pickle.dumps(seen)


def test_the_first_step_after_a_start_survives_a_snapshot_too() -> None:
    """Without settling, the controller still holds the pose of the reset."""
    env = make_libero_env(EnvConfig(settle_steps=0, render_size=64, image_size=56))
    env.reset(0, 0)
    kept = env.snapshot()
    for action in actions(4, 5):
        env.step(action)
    straight = physics(env, 0)
    env.reset(0, 1)
    env.step(actions(5, 1)[0])
    env.restore(kept)
    for action in actions(4, 5):
        env.step(action)
    assert np.array_equal(physics(env, 0), straight)
    env.close()


def test_another_process_goes_on_to_the_bit(tmp_path: Path) -> None:
    config = EnvConfig(render_size=64, image_size=56)
    chunks = actions(6, 40).reshape(5, 8, 7).astype(np.float32)
    env = make_libero_env(config)
    env.reset(3, 0)
    env.step_chunk(actions(7, 8).astype(np.float32))
    theirs, their_state = continued_elsewhere(config, env.snapshot(), chunks, tmp_path)
    ours = [env.step_chunk(chunk).observation for chunk in chunks]
    assert np.array_equal(physics(env, 3), their_state.physics)
    assert pickle.dumps(ours) == pickle.dumps(theirs)
    env.close()


def test_a_simulator_that_had_to_go_comes_back_the_same() -> None:
    env = make_libero_env(EnvConfig(max_simulators=1, render_size=64, image_size=56))
    chunk = actions(8, 8).astype(np.float32)
    env.reset(0, 0)
    kept = env.snapshot()
    first = env.step_chunk(chunk)
    env.reset(1, 0)
    assert list(env._simulators) == [1]
    env.restore(kept)
    assert list(env._simulators) == [0]
    assert pickle.dumps(env.step_chunk(chunk)) == pickle.dumps(first)
    env.close()


def test_the_least_recently_used_simulator_goes_first() -> None:
    env = make_libero_env(EnvConfig(max_simulators=2, render_size=64, image_size=56))
    for task_id in (0, 1, 0, 2):
        env.simulator(task_id)
    assert list(env._simulators) == [0, 2]
    env.close()


def test_simulators_go_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_libero_env(EnvConfig(max_simulators=3, render_size=64, image_size=56))
    left = iter([8 * GB, 8 * GB])
    monkeypatch.setattr(libero_env, "available_bytes", lambda: next(left))
    for task_id in (0, 1, 2):
        env.simulator(task_id)
    assert list(env._simulators) == [0, 1, 2]
    env.close()
    left = iter([MB, MB])
    for task_id in (0, 1, 2):
        env.simulator(task_id)
        assert list(env._simulators) == [task_id]
    env.close()


def test_a_draw_moves_what_a_state_holds_and_nothing_else(
    played: tuple[LiberoEnv, int],
) -> None:
    env, task_id = played
    simulator = env.simulator(task_id)
    before = simulator.model.body_pos.copy(), simulator.model.body_quat.copy()
    first, second = (simulator.place_objects(seed) for seed in (1, 2))
    assert not np.array_equal(first, second)
    assert np.array_equal(simulator.place_objects(1), first)
    for was, is_now in zip(
        before, (simulator.model.body_pos, simulator.model.body_quat), strict=True
    ):
        assert np.array_equal(was, is_now)


def test_a_program_keeps_its_random_numbers() -> None:
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    env = make_libero_env(EnvConfig(render_size=64, image_size=56))
    env.reset(0, 0)
    env.simulator(0).place_objects(3)
    env.close()
    assert np.array_equal(np.random.random(3), expected)


def test_a_value_that_is_no_number_is_refused() -> None:
    env = make_libero_env(EnvConfig(render_size=64, image_size=56))
    env.reset(0, 0)
    bad = np.zeros((8, 7), np.float32)
    bad[3, 2] = np.nan
    with pytest.raises(TypeError, match="not finite"):
        env.step_chunk(bad)
    env.close()


def test_a_success_ends_the_episode_at_its_step() -> None:
    from verl_vla.envs.mini.experts import EXPERTS  # noqa: PLC0415 -- beside its only use

    env = make_libero_env(EnvConfig(render_size=64, image_size=56))
    env.reset(1, 0)
    expert = EXPERTS["lift_the_red_cube"](env.simulator(1), 0.8, 0.0)
    moves = []
    outcome = None
    while outcome is None:
        moves.append(expert.act())
        outcome = env.step(moves[-1])
    assert outcome is Outcome.SUCCESS
    padded = np.array(moves + [moves[-1]] * (-len(moves) % 8 + 8), np.float64)
    env.reset(1, 0)
    results = []
    while not results or results[-1].outcome is None:
        start = 8 * len(results)
        results.append(env.step_chunk(padded[start : start + 8]))
    assert results[-1].outcome is Outcome.SUCCESS
    assert sum(result.executed for result in results) == len(moves)
    assert results[-1].observation is None
    env.close()
