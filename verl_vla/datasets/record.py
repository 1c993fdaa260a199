"""Recording of demonstrations by scripted experts, many attempts at a time.

The n-th attempt at a task depends on the seed, the task and n alone, so the number of processes
changes nothing.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import count

from verl_vla.core.errors import ConfigError
from verl_vla.core.signals import end_with_parent
from verl_vla.datasets.expert_episode import RecordingConfig, play_expert
from verl_vla.datasets.libero_writer import LiberoEpisode
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env

MIN_ENDED = 0.5
"""Least share of attempts that must end in time; below it the expert counts as broken."""
SPARE_FAILURES = 3
"""Number of attempts that may fail whatever the share: a few attempts may well fail by chance."""


def record(
    env: EnvConfig,
    tasks: Sequence[int],
    *,
    episodes: int,
    config: RecordingConfig,
    seed: int,
    workers: int,
) -> Iterator[LiberoEpisode]:
    """Yield the first ``episodes`` attempts at each task that ended in time, task by task.

    Args:
        env: environment of every process; its ``cameras`` are recorded.
        tasks: task ids.
        episodes: number of attempts to keep per task.
        config: pace, disturbances and errors of the expert.
        seed: seed of all attempts.
        workers: number of processes; they end with this one, even if it is killed.

    Raises:
        ConfigError: an expert runs out of steps in more than half of its attempts.
    """
    # spawned, so that each process makes a GL context of its own
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    try:
        # as many attempts of every task as are wanted; more only where one of them is not kept
        waiting = {
            task: deque(pool.submit(attempt, env, config, task, seed, n) for n in range(episodes))
            for task in tasks
        }
        for task in tasks:
            num_kept = 0
            for n in count():
                if num_kept == episodes:
                    break
                # failures so far: with more than that, less than `MIN_ENDED` can end in time
                if n - num_kept > max(episodes * (1 / MIN_ENDED - 1), SPARE_FAILURES):
                    raise ConfigError(
                        f"the expert of task {task} ended {num_kept} of {n} attempts in time; "
                        "record with less noise, or other tasks"
                    )
                is_early = bool(waiting[task])
                future = (
                    waiting[task].popleft()
                    if is_early
                    else pool.submit(attempt, env, config, task, seed, n)
                )
                episode = future.result()
                if episode is not None:
                    num_kept += 1
                    yield episode
    finally:
        # a caller that stops early does not wait for attempts that have not begun
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=1)
def env_of_process(config: EnvConfig) -> LiberoEnv:
    """Return the environment that a recording process keeps for all its attempts."""
    return make_libero_env(config)


def attempt(
    config: EnvConfig, recording: RecordingConfig, task_id: int, seed: int, index: int
) -> LiberoEpisode | None:
    """Let the expert try once in this process; see `play_expert`."""
    return play_expert(env_of_process(config), task_id, recording, seed=seed, index=index)
