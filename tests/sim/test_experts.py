"""The pick-and-place expert on LIBERO's own tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from verl_vla.envs.base import EnvConfig
from verl_vla.envs.experts.measure import PACE, play
from verl_vla.envs.experts.pick_and_place import FASTEST_CHANGE
from verl_vla.envs.libero.env import LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env

pytestmark = pytest.mark.sim

Step = Callable[[np.ndarray], bool]

SOUP, MILK = 0, 7
BETWEEN, NEXT_TO_PLATE = 0, 8


@pytest.fixture(scope="module", params=["libero_object", "libero_spatial"])
def env(request: pytest.FixtureRequest) -> Iterator[LiberoEnv]:
    made = make_libero_env(EnvConfig(suite=request.param))
    yield made
    made.close()


def noting(moves: list[np.ndarray], step: Step) -> Step:
    def note_and_step(move: np.ndarray) -> bool:
        moves.append(move)
        return step(move)

    return note_and_step


def test_it_solves_tasks_in_time_and_smoothly(
    env: LiberoEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[np.ndarray] = []
    tasks = (SOUP, MILK) if env.suite.name == "libero_object" else (BETWEEN, NEXT_TO_PLATE)
    for task_id in tasks:
        simulator = env.simulator(task_id)
        monkeypatch.setattr(simulator, "step", noting(moves, simulator.step))
        assert play(env, task_id, init_state_id=0) is not None
    translations = np.array(moves)[:, :3]
    changes = np.linalg.norm(np.diff(translations, axis=0), axis=1)
    assert np.linalg.norm(translations, axis=1).max() <= PACE + 1e-9
    # a settling step after an episode's last action may change more
    assert np.quantile(changes, 0.99) <= FASTEST_CHANGE + 1e-9
    assert np.abs(moves).max() <= 1.0
