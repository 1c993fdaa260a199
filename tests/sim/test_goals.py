"""Distances to the goals, against what LIBERO itself says."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from verl_vla.core.episode import Outcome, Reading
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.envs.mini.experts import EXPERTS
from verl_vla.rewards import goal_progress

pytestmark = pytest.mark.sim

OPEN_DRAWER, STOVE = "open_the_middle_drawer_of_the_cabinet", "turn_on_the_stove"


@pytest.fixture(scope="module")
def mini() -> Iterator[LiberoEnv]:
    env = make_libero_env(EnvConfig(render_size=64, image_size=56))
    yield env
    env.close()


@pytest.mark.parametrize("task_id", range(7))
def test_progress_rises_to_one_as_an_expert_works(mini: LiberoEnv, task_id: int) -> None:
    mini.reset(task_id, 0)
    simulator = mini.simulator(task_id)
    expert = EXPERTS[mini.suite.task(task_id).name](simulator, 0.8, 0.0)
    readings, outcome = [simulator.goals()], None
    while outcome is None:
        outcome = mini.step(expert.act())
        readings.append(simulator.goals())
    progress = goal_progress(np.array(readings))
    assert outcome is Outcome.SUCCESS
    assert progress[0] == 0
    assert progress[-1] == 1
    assert progress[:-1].max() < 1
    assert progress[len(progress) // 2] > 0.1


def test_reading_the_goals_changes_nothing(mini: LiberoEnv) -> None:
    """Not even the last bit of what follows."""
    ends = []
    for is_read in (False, True):
        mini.reset(0, 3)
        simulator = mini.simulator(0)
        for i in range(8):
            if is_read:
                simulator.goals()
            mini.step(np.full(7, 0.1 * (i % 3)))
        ends.append(simulator.state.physics)
    assert np.array_equal(*ends)


@pytest.mark.parametrize("name", [OPEN_DRAWER, STOVE])
def test_a_joint_is_there_when_libero_says_so(name: str) -> None:
    env = make_libero_env(EnvConfig(suite="libero_goal", render_size=64, image_size=56))
    task_id = [task.name for task in env.suite.tasks].index(name)
    env.reset(task_id, 0)
    simulator = env.simulator(task_id)
    problem = simulator._env
    thing = problem.parsed_problem["goal_state"][0][1]
    owner = thing if name == STOVE else problem.object_states_dict[thing].parent_name
    joints = (
        problem.get_object(owner) if name == STOVE else problem.object_sites_dict[thing]
    ).joints
    seen = []
    for place in np.linspace(
        *problem.sim.model.jnt_range[problem.sim.model.joint_name2id(joints[0])], 40
    ):
        problem.sim.data.set_joint_qpos(joints[0], place)
        problem.sim.forward()
        reading = simulator.goals()[0]
        assert bool(reading[Reading.HOLDS]) == bool(problem._check_success())
        assert (reading[Reading.REMAINING] == 0) == bool(reading[Reading.HOLDS])
        seen.append(reading)
    held = np.array(seen)[:, Reading.HOLDS]
    assert 0 < held.sum() < len(held)
    env.close()
