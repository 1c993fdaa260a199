"""Recording of demonstrations by scripted experts.

An expert without errors does not show how to recover from one. Therefore the arm is disturbed from
time to time (DART, arXiv:1703.09327, disturbs every step). An image is recorded only if no
disturbance follows within one action chunk: the actions after an image are then exactly those that
were executed.

Experts may be biased: they misjudge the height of objects, and their failures are recorded too. A
policy that imitates them does the right thing at the wrong height, which more imitation does not
correct but reinforcement learning does.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from verl_vla.core.errors import ConfigError
from verl_vla.core.signals import end_with_parent
from verl_vla.datasets.demonstrations import Demonstration
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.experts.choice import make_expert
from verl_vla.envs.libero.env import LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.envs.mini.make_init_states import sample_init_state

Attempted = TypeVar("Attempted")

FASTEST = 0.9
"""Bound of each translation of a recorded action, below 1: values clipped at the bound of the
action range would all get the same action token."""
MIN_ENDED = 0.5
"""Least share of attempts that must end in time; below it the expert counts as broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingConfig:
    """Settings of the recording; spans are in simulator steps."""

    slowest_pace: float = 0.75
    """Lower bound of the largest commanded translation, which is sampled per episode; the bound of
    an action is 1."""
    fastest_pace: float = 0.85
    noise: float = 0.5
    """Standard deviation of a disturbance of each translation; the bound of an action is 1."""
    disturbed_steps: int = 5
    """Longest disturbance; the shortest is one step."""
    calm_steps: int = 24
    """Longest span between disturbances; the shortest is ``horizon``."""
    every: int = 2
    """Steps between images within a span without disturbance."""
    horizon: int = 8
    """Undisturbed actions recorded after each image, past the success if necessary."""
    height_error_m: float = 0.0
    """Largest error of a biased expert, which takes objects to be higher than they are. The error
    is sampled per episode, and failed attempts are recorded too. 0 for experts without error."""

    def __post_init__(self) -> None:
        if not 0 < self.slowest_pace <= self.fastest_pace <= FASTEST:
            raise ConfigError(
                f"the pace is {self.slowest_pace} to {self.fastest_pace}; it must rise, above 0 "
                f"and up to {FASTEST}"
            )
        for name, value in (("noise", self.noise), ("height_error_m", self.height_error_m)):
            if value < 0:
                raise ConfigError(f"{name} is {value}; set 0 or more")
        if min(self.every, self.horizon, self.disturbed_steps) < 1:
            raise ConfigError(
                f"every is {self.every}, horizon {self.horizon} and disturbed_steps "
                f"{self.disturbed_steps}; set at least 1 each"
            )
        if self.calm_steps < self.horizon:
            raise ConfigError(
                f"calm_steps is {self.calm_steps}, less than horizon, {self.horizon}; no image "
                "would be followed by enough calm actions"
            )


def record(
    env: EnvConfig,
    tasks: Sequence[int],
    *,
    episodes: int,
    config: RecordingConfig,
    seed: int,
    workers: int,
) -> Iterator[Demonstration]:
    """Yield ``episodes`` episodes of each task, task by task.

    The result depends on ``seed`` only, not on ``workers``: the n-th attempt at a task is a pure
    function of the seed, the task and n. The first attempts that ended are kept: in a success, or,
    for biased experts, with a miss.

    Raises:
        ConfigError: an expert runs out of steps in more than half of its attempts.
    """
    yield from first_kept(partial(attempt, env, config), tasks, episodes, seed, workers)


def first_kept(
    attempt_task: Callable[[int, int, int], Attempted | None],
    tasks: Sequence[int],
    episodes: int,
    seed: int,
    workers: int,
) -> Iterator[Attempted]:
    """Yield the first ``episodes`` successful attempts at each task, task by task.

    Args:
        attempt_task: called in another process with the task, the seed and the attempt's number;
            it returns None for an attempt that is not kept.
        tasks: task ids.
        episodes: number of attempts to keep per task.
        seed: seed of all attempts.
        workers: number of processes; they end with this one, even if it is killed.

    Raises:
        ConfigError: more than half of the attempts are not kept.
    """
    # spawned, so that each process makes a GL context of its own
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    try:
        # as many attempts of every task as are wanted; more only where one of them is not kept
        waiting = {
            task: deque(pool.submit(attempt_task, task, seed, n) for n in range(episodes))
            for task in tasks
        }
        for task in tasks:
            num_kept = 0
            for n in count():
                if num_kept == episodes:
                    break
                # a few tasks with few episodes may well fail by chance
                if n - num_kept > max(episodes * (1 / MIN_ENDED - 1), 3):
                    raise ConfigError(
                        f"the expert of task {task} ended {num_kept} of {n} attempts in time; "
                        "record with less noise, or other tasks"
                    )
                is_early = bool(waiting[task])
                future = (
                    waiting[task].popleft()
                    if is_early
                    else pool.submit(attempt_task, task, seed, n)
                )
                attempted = future.result()
                if attempted is not None:
                    num_kept += 1
                    yield attempted
    finally:
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=1)
def env_of_process(config: EnvConfig) -> LiberoEnv:
    """Return the environment that a recording process keeps for all its attempts."""
    return make_libero_env(config)


def attempt(
    config: EnvConfig, recording: RecordingConfig, task_id: int, seed: int, index: int
) -> Demonstration | None:
    """Let the expert try once in this process; see `play_expert`."""
    return play_expert(env_of_process(config), task_id, recording, seed=seed, index=index)


def play_expert(
    env: LiberoEnv, task_id: int, config: RecordingConfig, *, seed: int, index: int
) -> Demonstration | None:
    """Run the ``index``-th attempt at a task; return None if it exceeded the step limit.

    The start is sampled from the task's regions and is in neither split of the suite.
    """
    # the order of these draws is part of the data: another one gives other episodes
    rng = np.random.default_rng([seed, task_id, index])
    env.reset_to(task_id, sample_init_state(env, task_id, int(rng.integers(2**31))))
    simulator, task = env.simulator(task_id), env.suite.tasks[task_id]
    pace = rng.uniform(config.slowest_pace, config.fastest_pace)
    height_error_m = rng.uniform(0.0, config.height_error_m)
    expert = make_expert(task.name, simulator, pace, height_error_m)
    limit = env.suite.step_limit(env.config.step_limit, task_id)
    # an episode may go on for a chunk after its last step
    disturbances = _disturbances(config, limit + config.horizon, rng)
    images: list[npt.NDArray[np.uint8]] = []
    frame_steps: list[int] = []
    actions: list[npt.NDArray[np.float64]] = []
    num_steps: int | None = None
    for step, disturbance in enumerate(disturbances):
        if num_steps is None and _is_recorded(disturbances, step, config):
            images.append(env.observe().image)
            frame_steps.append(step)
        actions.append(expert.act())
        executed = actions[-1].copy()
        # the disturbance is executed but not recorded: the expert's own action is the target
        executed[:3] = np.clip(executed[:3] + disturbance, -FASTEST, FASTEST)
        is_solved = simulator.step(executed)
        if (is_solved or (height_error_m > 0 and expert.has_missed())) and num_steps is None:
            num_steps = step + 1
        # the last image before the success is followed by a whole chunk, too
        if num_steps is not None and step >= num_steps - 1 + config.horizon:
            break
    if num_steps is None or num_steps > limit or not images:
        return None
    return Demonstration(
        task_id=task_id,
        instruction=task.instruction,
        images=np.stack(images),
        frame_steps=np.array(frame_steps),
        actions=np.stack(actions).astype(np.float32),
        num_steps=num_steps,
    )


def _disturbances(
    config: RecordingConfig, num_steps: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Return [num_steps, 3], added to the executed translations: constant pushes with pauses.

    Half of the episodes begin with a push, so that early images show the arm in many positions.
    """
    pushes = np.zeros((num_steps, 3))
    step = 0 if rng.random() < 0.5 else int(rng.integers(config.horizon, config.calm_steps + 1))
    while step < num_steps:
        length = int(rng.integers(1, config.disturbed_steps + 1))
        pushes[step : step + length] = rng.normal(0.0, config.noise, 3)
        # a pause is never shorter than a chunk, so that an image fits in
        step += length + int(rng.integers(config.horizon, config.calm_steps + 1))
    return pushes


def _is_recorded(disturbances: npt.NDArray[np.float64], step: int, config: RecordingConfig) -> bool:
    """Check that an image is due and that the next ``horizon`` actions are not disturbed."""
    return step % config.every == 0 and not disturbances[step : step + config.horizon].any()
