"""The pick-and-place expert on the mini suite: what it sees, where it grips, what it does then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.experts.grasp import choose_grasp
from verl_vla.envs.experts.pick_and_place import LOST_M, PickAndPlace
from verl_vla.envs.experts.scene import Scene
from verl_vla.envs.libero.env import SETTLE_ACTION, LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.envs.mini import CUBE_HALF_M

if TYPE_CHECKING:
    from verl_vla.envs.libero.simulator import Simulator

pytestmark = pytest.mark.sim

LIFT, PLACE, STACK = 1, 2, 3
PACE = 0.8
MAX_STEPS = 200
ACROSS = np.array([0.0, 1.0, 0.0])
"""How the open hand stands at the start: its fingers move along the table's y."""


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    made = make_libero_env(EnvConfig())
    yield made
    made.close()


def started(env: LiberoEnv, task_id: int, init_state_id: int = 0) -> Simulator:
    simulator = env.simulator(task_id)
    simulator.begin(env.suite.load_init_states(task_id)[init_state_id])
    settle(simulator)
    return simulator


def settle(simulator: Simulator) -> None:
    for _ in range(10):
        simulator.step(np.array(SETTLE_ACTION))


def put(simulator: Simulator, item: str, place: tuple[float, float], turn_rad: float) -> None:
    """Put a cube somewhere else on the table and let the scene settle."""
    state = simulator.flat_state()
    joint = 1 + simulator.model.joint(f"{item}_joint0").qposadr[0]
    state[joint : joint + 2] = place
    state[joint + 3 : joint + 7] = [np.cos(turn_rad / 2), 0.0, 0.0, np.sin(turn_rad / 2)]
    simulator.begin(state)
    settle(simulator)


def solves(simulator: Simulator, expert: PickAndPlace) -> bool:
    return any(simulator.step(expert.act()) and expert.has_finished for _ in range(MAX_STEPS))


@pytest.mark.parametrize("task_id", [PLACE, STACK])
def test_it_puts_a_cube_onto_things(env: LiberoEnv, task_id: int) -> None:
    for init_state_id in (0, 1, 2):
        simulator = started(env, task_id, init_state_id)
        assert solves(simulator, PickAndPlace(simulator, PACE, 0.0))


def test_what_it_drops_it_picks_up_again(env: LiberoEnv) -> None:
    simulator = started(env, STACK)
    expert = PickAndPlace(simulator, PACE, 0.0)
    on_table = simulator.object_position("red_cube")[2]
    lifted = (
        simulator.step(expert.act())
        or simulator.object_position("red_cube")[2] > on_table + 1.25 * LOST_M
        for _ in range(MAX_STEPS)
    )
    assert any(lifted)
    for _ in range(12):
        dropping = expert.act()
        dropping[6] = -1.0
        assert not simulator.step(dropping)
    assert simulator.object_position("red_cube")[2] < on_table + 0.01
    assert solves(simulator, expert)


@pytest.mark.parametrize(("height_error_m", "misses"), [(0.01, False), (0.04, True)])
def test_a_careless_expert_goes_on_without_what_it_missed(
    env: LiberoEnv, height_error_m: float, misses: bool
) -> None:
    simulator = started(env, STACK)
    expert = PickAndPlace(simulator, PACE, height_error_m)
    on_table = simulator.object_position("red_cube")[2]
    solved = False
    while not (solved or expert.has_missed()):
        solved = simulator.step(expert.act())
    assert solved is not misses
    assert (simulator.object_position("red_cube")[2] < on_table + 0.01) == misses


def test_a_task_that_is_no_pick_and_place_is_refused(env: LiberoEnv) -> None:
    with pytest.raises(ConfigError, match="only moves one object"):
        PickAndPlace(started(env, LIFT), PACE, 0.0)


@pytest.mark.parametrize("degrees", [-40.0, -20.0, 0.0, 20.0, 40.0])
def test_a_cube_is_gripped_across_its_faces(env: LiberoEnv, degrees: float) -> None:
    simulator = started(env, PLACE)
    put(simulator, "red_cube", (-0.05, 0.0), np.deg2rad(degrees))
    grasp = choose_grasp(Scene(simulator), ACROSS)
    middle = simulator.object_position("red_cube")
    assert grasp.position[:2] == pytest.approx(middle[:2], abs=1e-3)
    assert middle[2] - CUBE_HALF_M < grasp.position[2] < middle[2] + CUBE_HALF_M
    faces = np.deg2rad(degrees) + np.array([0.0, np.pi / 2])
    along = np.abs(np.stack([np.cos(faces), np.sin(faces)], axis=1) @ grasp.axis[:2])
    assert along.max() > np.cos(np.deg2rad(5.0))


@pytest.mark.parametrize("neighbour", [(0.0, 1.0), (0.0, -1.0), (1.0, 0.0)])
def test_fingers_go_where_there_is_room(env: LiberoEnv, neighbour: tuple[float, float]) -> None:
    simulator = started(env, STACK)
    put(simulator, "red_cube", (-0.05, 0.0), 0.0)
    beside = 2.5 * CUBE_HALF_M
    put(simulator, "blue_cube", (-0.05 + beside * neighbour[0], beside * neighbour[1]), 0.0)
    grasp = choose_grasp(Scene(simulator), ACROSS)
    assert abs(grasp.axis[:2] @ neighbour) < np.sin(np.deg2rad(10.0))


def test_a_scene_knows_its_goal_and_what_stands_in_the_way(env: LiberoEnv) -> None:
    simulator = started(env, STACK)
    put(simulator, "red_cube", (-0.1, -0.1), 0.0)
    put(simulator, "blue_cube", (0.0, 0.0), 0.0)
    scene = Scene(simulator)
    table, blue = scene.item.bottom, simulator.object_position("blue_cube")
    on_blue = [*blue[:2], blue[2] + CUBE_HALF_M]
    assert scene.goal_position == pytest.approx(np.array(on_blue), abs=1e-3)
    start, beyond, aside = np.array([-0.1, -0.1]), np.array([0.1, 0.1]), np.array([-0.1, 0.1])
    over = scene.highest_on_the_way(start, beyond, 0.0)
    assert over == pytest.approx(on_blue[2], abs=1e-3)
    assert scene.highest_on_the_way(start, aside, 0.0) == pytest.approx(table, abs=1e-3)
    assert scene.highest_on_the_way(start, aside, 0.1) == pytest.approx(on_blue[2], abs=1e-3)
    # the tips of the fingers, the point between them and the hand, from below
    assert 0.0 < scene.fingers_below_m < 0.02 < scene.hand_above_m < 0.05 < scene.hand_half_m
