"""The mini suite: its scenes, its starts and the experts that solve it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import EVALUATED, LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.envs.mini import CUBE_HALF_M, PLATE_HALF_HEIGHT_M, TABLE_M, make_init_states
from verl_vla.envs.mini.experts import EXPERTS
from verl_vla.envs.mini.make_init_states import sample_init_state

pytestmark = pytest.mark.sim

PUSH, LIFT, PLACE, STACK, CAN, MILK, PUSH_BLUE = TASKS = range(7)
PACE = 0.8
OBJECTS = {
    PUSH: ("red_cube",),
    LIFT: ("red_cube",),
    PLACE: ("red_cube", "white_plate"),
    STACK: ("red_cube", "blue_cube"),
    CAN: ("can", "milk"),
    MILK: ("can", "milk"),
    PUSH_BLUE: ("blue_cube",),
}


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    env = make_libero_env(EnvConfig(render_size=128, image_size=112))
    yield env
    env.close()


def play_expert(
    env: LiberoEnv,
    task_id: int,
    *,
    expert_of: int | None = None,
    noise: float = 0.0,
    height_error_m: float = 0.0,
) -> tuple[Outcome, list[np.ndarray]]:
    """Let an expert play the episode under way; by default the expert of the task."""
    rng = np.random.default_rng(task_id)
    name = env.suite.task(task_id if expert_of is None else expert_of).name
    expert = EXPERTS[name](env.simulator(task_id), PACE, height_error_m)
    outcome, moves = None, []
    while outcome is None:
        moves.append(expert.act())
        move = moves[-1].copy()
        move[:3] += rng.normal(0.0, noise, 3)
        outcome = env.step(np.clip(move, -1.0, 1.0))
    return outcome, moves


@pytest.mark.parametrize("task_id", TASKS)
def test_an_expert_solves_its_task_with_time_to_spare(env: LiberoEnv, task_id: int) -> None:
    limit = env.suite.step_limit("published", task_id)
    lengths = []
    for init_state_id in (0, 1, 50, 51):
        env.reset(task_id, init_state_id)
        outcome, moves = play_expert(env, task_id)
        assert outcome is Outcome.SUCCESS
        lengths.append(len(moves))
        translations = np.array(moves)[:, :3]
        assert np.abs(translations).max() <= PACE
        assert not np.array(moves)[:, 3:6].any()
        assert set(np.array(moves)[:, 6]) <= {-1.0, 1.0}
    assert np.median(lengths) < 0.65 * limit


@pytest.mark.parametrize("task_id", [PUSH, STACK])
def test_an_expert_corrects_what_disturbs_it(env: LiberoEnv, task_id: int) -> None:
    env.reset(task_id, 0)
    assert play_expert(env, task_id, noise=0.2)[0] is Outcome.SUCCESS


@pytest.mark.parametrize("task_id", TASKS)
def test_an_expert_that_misjudges_heights_misses(env: LiberoEnv, task_id: int) -> None:
    env.reset(task_id, 0)
    assert play_expert(env, task_id, height_error_m=0.01)[0] is Outcome.SUCCESS
    env.reset(task_id, 0)
    expert = EXPERTS[env.suite.task(task_id).name](env.simulator(task_id), PACE, 0.06)
    outcome, missed = None, []
    while outcome is None:
        missed.append(expert.has_missed())
        outcome = env.step(expert.act())
    assert outcome is Outcome.TIMEOUT
    assert not missed[0]
    assert missed[-1]


@pytest.mark.parametrize("task_id", TASKS)
def test_doing_nothing_solves_nothing(env: LiberoEnv, task_id: int) -> None:
    env.reset(task_id, 0)
    outcome = None
    while outcome is None:
        outcome = env.step(np.zeros(7))
    assert outcome is Outcome.TIMEOUT


def test_the_same_scene_asks_for_different_things(env: LiberoEnv) -> None:
    """Tasks 4 and 5 look alike; who lifts the wrong object has failed."""
    assert OBJECTS[CAN] == OBJECTS[MILK]
    env.reset(CAN, 0)
    outcome, _ = play_expert(env, CAN, expert_of=MILK)
    assert outcome is Outcome.TIMEOUT
    assert env.simulator(CAN).object_position("milk")[2] > 1.0


@pytest.mark.parametrize("task_id", TASKS)
def test_objects_lie_apart_and_still_when_play_begins(env: LiberoEnv, task_id: int) -> None:
    for init_state_id in range(0, 100, 25):
        env.reset(task_id, init_state_id)
        simulator = env.simulator(task_id)
        places = [simulator.object_position(name) for name in OBJECTS[task_id]]
        for place in places:
            assert np.abs(place[:2]).max() < 0.2
            assert place[2] > TABLE_M
        if len(places) == 2:
            assert np.linalg.norm(places[0][:2] - places[1][:2]) > 2 * CUBE_HALF_M
        env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
        again = [simulator.object_position(name) for name in OBJECTS[task_id]]
        assert np.allclose(places, again, atol=5e-4)


def test_objects_rest_on_the_table(env: LiberoEnv) -> None:
    env.reset(PLACE, 0)
    simulator = env.simulator(PLACE)
    assert simulator.object_position("red_cube")[2] == pytest.approx(
        TABLE_M + CUBE_HALF_M, abs=2e-3
    )
    # MuJoCo 3.3.2 gives a cylinder on a box one point of contact, into which it sinks 3 mm
    assert simulator.object_position("white_plate")[2] == pytest.approx(
        TABLE_M + PLATE_HALF_HEIGHT_M - 3e-3, abs=1e-3
    )
    upright = simulator.data.xmat[simulator.body("white_plate")].reshape(3, 3)[2, 2]
    assert upright > 0.9999


@pytest.mark.parametrize("task_id", [PUSH, LIFT, PLACE, STACK])
def test_the_image_shows_where_the_cube_is(env: LiberoEnv, task_id: int) -> None:
    """Enough red pixels to see, and they move with the cube: mirrored, far is up."""
    seen, places = [], []
    for init_state_id in range(12):
        image = env.reset(task_id, init_state_id).image[0].astype(int)
        is_red = (image[..., 0] > 90) & (image[..., 1:].max(-1) < 60)
        assert is_red.sum() >= 60
        seen.append(np.argwhere(is_red).mean(0))
        places.append(env.simulator(task_id).object_position("red_cube")[:2])
    rows, columns = np.array(seen).T
    x, y = np.array(places).T
    assert np.corrcoef(rows, x)[0, 1] > 0.98
    assert np.corrcoef(columns, y)[0, 1] < -0.98


def test_the_init_state_files_can_be_made_again(env: LiberoEnv, tmp_path: Path) -> None:
    make_init_states.main(tmp_path)
    for task_id, task in enumerate(env.suite.tasks):
        made = tmp_path / f"{task.name}.npz"
        with np.load(made) as stored:
            assert np.array_equal(stored["states"], env.suite.load_init_states(task_id))
        assert made.read_bytes() == task.init_states_file.read_bytes()


def test_demonstrations_start_where_neither_split_does(env: LiberoEnv) -> None:
    recorded = env.suite.load_init_states(STACK)
    sampled = np.stack([sample_init_state(env, STACK, seed) for seed in range(20)])
    assert np.array_equal(sampled[3], sample_init_state(env, STACK, 3))
    assert len(np.unique(np.concatenate([recorded, sampled]), axis=0)) == 120
    env.reset_to(STACK, sampled[0])
    assert play_expert(env, STACK)[0] is Outcome.SUCCESS


def test_evaluations_can_draw_starts_that_nothing_else_sees(env: LiberoEnv) -> None:
    ids = env.suite.init_state_ids(STACK, "sampled")
    drawn = [env.sample_start(STACK, EVALUATED, start) for start in ids[:10]]
    sampled = [sample_init_state(env, STACK, seed) for seed in ids[:10]]
    recorded = env.suite.load_init_states(STACK)
    assert len(np.unique(np.concatenate([drawn, sampled, recorded]), axis=0)) == 120
    env.reset_to(STACK, drawn[3])
    expected = env.simulator(STACK).state.physics
    env.reset(STACK, ids[3])
    assert np.array_equal(env.simulator(STACK).state.physics, expected)
    with pytest.raises(ConfigError, match="1000 more can be sampled"):
        env.reset(STACK, ids[-1] + 1)
