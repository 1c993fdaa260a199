"""The pick-and-place expert on LIBERO's own tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from verl_vla.envs.experts.measure import PACE, play
from verl_vla.envs.experts.pick_and_place import FASTEST_CHANGE, PickAndPlace
from verl_vla.envs.libero import EnvConfig, LiberoEnv, make_env
from verl_vla.envs.simulator import Simulator
from verl_vla.errors import ConfigError

pytestmark = pytest.mark.sim

SOUP, MILK = 0, 7
BETWEEN, NEXT_TO_PLATE = 0, 8
TURN_ON_THE_STOVE = 7


@pytest.fixture(scope="module", params=["libero_object", "libero_spatial"])
def env(request: pytest.FixtureRequest, libero_assets: Path) -> Iterator[LiberoEnv]:
    made = make_env(EnvConfig(suite=request.param))
    yield made
    made.close()


def test_it_solves_tasks_in_time_and_smoothly(
    env: LiberoEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[np.ndarray] = []
    step = Simulator.step
    monkeypatch.setattr(
        Simulator, "step", lambda self, move: (moves.append(move), step(self, move))[1]
    )
    tasks = (SOUP, MILK) if env.suite.name == "libero_object" else (BETWEEN, NEXT_TO_PLATE)
    for task_id in tasks:
        assert any(play(env, task_id, init_state_id) for init_state_id in (0, 1))
    translations = np.array(moves)[:, :3]
    changes = np.linalg.norm(np.diff(translations, axis=0), axis=1)
    assert np.linalg.norm(translations, axis=1).max() <= PACE + 1e-9
    # a settling step after an episode's last action may change more
    assert np.quantile(changes, 0.99) <= FASTEST_CHANGE + 1e-9
    assert np.abs(moves).max() <= 1.0


def test_a_task_that_is_no_pick_and_place_is_refused(libero_assets: Path) -> None:
    made = make_env(EnvConfig(suite="libero_goal"))
    simulator = made.simulator(TURN_ON_THE_STOVE)
    with pytest.raises(ConfigError, match="only moves one object"):
        PickAndPlace(simulator, PACE)
    made.close()
