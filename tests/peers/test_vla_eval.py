"""An evaluator that others wrote sees what ours sees: images to the bit, states, and successes.

vla-eval (allenai, Apache-2.0) has its own LIBERO benchmark around the stock environment. The same
actions go through it and through `LiberoEnv`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from verl_vla.config.choices import CAMERAS
from verl_vla.core.episode import Outcome
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env

pytestmark = pytest.mark.sim

TASKS = {
    "libero_spatial": (3, 5),
    "libero_object": (0, 6),
    "libero_goal": (3, 7),
    "libero_10": (4, 7),
    "libero_90": (40, 55),
}
INIT_STATES = (0, 17)
STEPS = 30
STOVE = ("libero_goal", 7)
"""Turn on the stove: solved wherever its option is on."""
KNOB_ON_RAD = 1.0
IMAGE_SIZE, IMAGE_EVERY = 128, 10
"""Those of vla_eval_libero.py."""
STATE_TOLERANCE = 1e-6
"""vla-eval computes the hand's rotation in float32."""


@dataclass(frozen=True)
class Episode:
    suite: str
    task: int
    init_state: np.ndarray
    actions: np.ndarray
    """[steps, 7], exact in float32."""


def actions(seed: int, length: int) -> np.ndarray:
    """Moves and turns in all directions, and a gripper that changes its mind."""
    rng = np.random.default_rng(seed)
    moves = np.clip(rng.normal(0.0, 0.5, (length, 7)), -1.0, 1.0)
    moves[:, 6] = np.sign(moves[:, 6])
    return moves.astype(np.float32).astype(np.float64)


def open_env(suite: str) -> LiberoEnv:
    return make_libero_env(
        EnvConfig(suite=suite, cameras=CAMERAS, render_size=IMAGE_SIZE, image_size=112)
    )


def stove_on(env: LiberoEnv) -> np.ndarray:
    state = env.suite.load_init_states(STOVE[1])[0].copy()
    option = env.simulator(STOVE[1]).model.joint("flat_stove_1_button").qposadr[0]
    state[1 + option] = KNOB_ON_RAD  # before the positions stands the time
    return state


@pytest.fixture(scope="module")
def envs() -> dict[str, LiberoEnv]:
    return {suite: open_env(suite) for suite in TASKS}


@pytest.fixture(scope="module")
def episodes(envs: dict[str, LiberoEnv]) -> list[Episode]:
    recorded = [
        Episode(suite, task, envs[suite].suite.load_init_states(task)[state], actions(state, STEPS))
        for suite, tasks in TASKS.items()
        for task in tasks
        for state in INIT_STATES
    ]
    return [*recorded, Episode(*STOVE, stove_on(envs[STOVE[0]]), actions(0, 1))]


@pytest.fixture(scope="module")
def peer(
    episodes: list[Episode], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, np.ndarray]]:
    """What vla-eval sees, an entry for each episode.

    It has a process of its own: robosuite neither chooses its GL context before it draws nor before
    it frees one, so it must not share a process with another renderer.
    """
    folder = tmp_path_factory.mktemp("vla_eval")
    question = [
        {
            "suite": episode.suite,
            "task": episode.task,
            "init_state": episode.init_state.tolist(),
            "actions": episode.actions.tolist(),
        }
        for episode in episodes
    ]
    (folder / "question.json").write_text(json.dumps(question))
    program = Path(__file__).with_name("vla_eval_libero.py")
    subprocess.run([sys.executable, str(program), str(folder)], check=True)
    with np.load(folder / "answer.npz") as answer:
        return [
            {name: answer[f"{i}/{name}"] for name in ("agentview", "wrist", "states", "done")}
            for i in range(len(episodes))
        ]


@pytest.mark.parametrize("suite", TASKS)
def test_the_same_actions_show_the_same(
    suite: str,
    envs: dict[str, LiberoEnv],
    episodes: list[Episode],
    peer: list[dict[str, np.ndarray]],
) -> None:
    env = envs[suite]
    compared = 0
    for episode, theirs in zip(episodes, peer, strict=True):
        if episode.suite != suite:
            continue
        env.settle(episode.task, episode.init_state)
        simulator = env.simulator(episode.task)
        for step in range(len(episode.actions) + 1):
            where = f"{suite} {episode.task}, step {step}"
            outcome = env.step(episode.actions[step - 1]) if step else None
            assert (outcome is Outcome.SUCCESS) == theirs["done"][step], where
            apart = np.abs(simulator.proprio() - theirs["states"][step]).max()
            assert apart < STATE_TOLERANCE, where
            if step % IMAGE_EVERY == 0:
                for camera, name in zip(CAMERAS, ("agentview", "wrist"), strict=True):
                    image = theirs[name][step // IMAGE_EVERY]
                    assert np.array_equal(simulator.render(camera), image), f"{where}, {camera}"
                    assert image.std() > 10, f"{where}: nothing is to be seen"
                    compared += 1
    env.close()
    assert compared >= len(TASKS[suite]) * len(INIT_STATES) * (STEPS // IMAGE_EVERY + 1) * 2


def test_both_saw_a_success(episodes: list[Episode], peer: list[dict[str, np.ndarray]]) -> None:
    successes = [
        (episode.suite, episode.task)
        for episode, theirs in zip(episodes, peer, strict=True)
        if theirs["done"].any()
    ]
    assert successes == [STOVE]
