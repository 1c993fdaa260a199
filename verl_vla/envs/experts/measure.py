"""Measure the scripted experts: ``python -m verl_vla.envs.experts.measure SUITE``.

Each expert plays its task's first training starts; no image is rendered. An episode is a success if
the task is solved within the published step limit and *still* solved once the hand has let go and
left; its steps are counted until then.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from verl_vla.envs.base import EnvConfig
from verl_vla.envs.experts.choice import check_experts, make_expert
from verl_vla.envs.libero.env import SETTLE_ACTION, LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env

PACE = 0.8
EPISODES = 20


def main() -> None:
    """Print a table with one row per task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite")
    suite_name: str = parser.parse_args().suite
    check_experts(suite_name)
    env = make_libero_env(EnvConfig(suite=suite_name, max_simulators=1))
    sys.stdout.write(f"| task of {suite_name} | success | median steps |\n|---|---|---|\n")
    for task_id in range(len(env.suite.tasks)):
        ids = env.suite.init_state_ids(task_id, "train")[:EPISODES]
        steps = [play(env, task_id, init_state_id) for init_state_id in ids]
        solved = [count for count in steps if count is not None]
        median = f"{np.median(solved):.0f}" if solved else "-"
        words = f"{task_id} {env.suite.task(task_id).instruction}"
        sys.stdout.write(f"| {words} | {len(solved)} of {len(ids)} | {median} |\n")
        sys.stdout.flush()
    env.close()


def play(env: LiberoEnv, task_id: int, init_state_id: int) -> int | None:
    """Play one start; return the steps until the hand has left, or None if the expert failed."""
    simulator = env.simulator(task_id)
    simulator.begin(env.suite.load_init_states(task_id)[init_state_id])
    for _ in range(env.config.settle_steps):
        simulator.step(np.array(SETTLE_ACTION))
    expert = make_expert(env.suite.task(task_id).name, simulator, PACE)
    for step in range(env.suite.step_limit(env.config.step_limit, task_id)):
        if simulator.step(expert.act()) and expert.has_finished:
            return step + 1
    return None


if __name__ == "__main__":
    main()
