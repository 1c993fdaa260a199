"""Demonstrations of the mini suite by its scripted experts, and the file they are kept in.

An expert that never errs shows no way back from an error. So what an episode *executes* is the
expert's action plus a disturbance, while what is *recorded* is the expert's own answer to where
that led (DART, arXiv:1703.09327).

A file is an ``.npz`` that numpy alone can read, one episode a member, so that reading an episode
reads nothing else.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from verl_vla.envs.libero import EnvConfig, LiberoEnv, make_env
from verl_vla.envs.mini.make_init_states import sample_init_state
from verl_vla.errors import ConfigError

FASTEST = 0.9
"""No translation of a recorded action exceeds it: values on a bound all fall into one bin."""
MIN_SUCCESS = 0.5
"""An expert that solves fewer of its attempts is broken, not unlucky."""
HEADER = "header"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingConfig:
    """How demonstrations are made."""

    slowest_pace: float = 0.7
    """Each episode draws the largest commanded translation, of 1, between these two."""
    fastest_pace: float = 0.85
    noise: float = 0.3
    """Standard deviation of the disturbance of each translation, of 1."""
    hold: int = 3
    """Steps that a disturbance lasts, so that it leads somewhere."""
    label_noise: float = 0.03
    """Standard deviation of what blurs the recorded translations over neighbouring bins."""
    every: int = 2
    """Steps between recorded images."""
    horizon: int = 8
    """Actions recorded after each image, past the success if need be."""

    def __post_init__(self) -> None:
        if not 0 < self.slowest_pace <= self.fastest_pace <= FASTEST:
            raise ConfigError(
                f"the pace is {self.slowest_pace} to {self.fastest_pace}; it must rise, above 0 "
                f"and up to {FASTEST}"
            )
        for name in ("noise", "label_noise"):
            if self.__getattribute__(name) < 0:
                raise ConfigError(f"{name} is {self.__getattribute__(name)}; set 0 or more")
        for name in ("hold", "every", "horizon"):
            if self.__getattribute__(name) < 1:
                raise ConfigError(f"{name} is {self.__getattribute__(name)}; set at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One solved episode; F images, S steps."""

    task_id: int
    instruction: str
    images: npt.NDArray[np.uint8]
    """[F, V, H, W, 3], as the policy sees them."""
    frame_steps: npt.NDArray[np.int64]
    """[F], which action comes right after each image."""
    actions: npt.NDArray[np.float32]
    """[S, A] the expert's answers, simulator units; at least ``horizon`` after each image."""
    num_steps: int
    """Steps until the success."""


class DemonstrationFile:
    """Solved episodes on disk, read one at a time; a context manager and a sequence."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            ConfigError: there is no such file, or it holds something else.
        """
        if not path.is_file():
            raise ConfigError(f"there are no demonstrations at {path}; record some with `demos`")
        try:
            self._members: Any = np.load(path, allow_pickle=False)
            header = json.loads(str(self._members[HEADER]))
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path} holds no demonstrations: {error}") from error
        self.suite: str = header["suite"]
        self.horizon: int = header["horizon"]
        self._episodes: list[dict[str, Any]] = header["episodes"]

    def __enter__(self) -> DemonstrationFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._members.close()

    def __len__(self) -> int:
        return len(self._episodes)

    def __getitem__(self, index: int) -> Demonstration:
        name = _member(range(len(self))[index])
        return Demonstration(
            **self._episodes[index],
            images=self._members[f"{name}/images"],
            frame_steps=self._members[f"{name}/frame_steps"],
            actions=self._members[f"{name}/actions"],
        )

    def __iter__(self) -> Iterator[Demonstration]:
        return (self[index] for index in range(len(self)))


def write(path: Path, demonstrations: Iterator[Demonstration], *, suite: str, horizon: int) -> None:
    """Write demonstrations as they come; the file appears when it is whole."""
    partial_file = path.with_suffix(".partial")
    episodes: list[dict[str, Any]] = []
    with zipfile.ZipFile(partial_file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for index, demonstration in enumerate(demonstrations):
            name = _member(index)
            _write_member(archive, f"{name}/images", demonstration.images)
            _write_member(archive, f"{name}/frame_steps", demonstration.frame_steps)
            _write_member(archive, f"{name}/actions", demonstration.actions)
            episodes.append(
                {
                    "task_id": demonstration.task_id,
                    "instruction": demonstration.instruction,
                    "num_steps": demonstration.num_steps,
                }
            )
        header = {"suite": suite, "horizon": horizon, "episodes": episodes}
        _write_member(archive, HEADER, np.array(json.dumps(header)))
    partial_file.replace(path)


def record(
    env: EnvConfig,
    tasks: Sequence[int],
    *,
    episodes: int,
    config: RecordingConfig,
    seed: int,
    workers: int,
) -> Iterator[Demonstration]:
    """Yield ``episodes`` solved episodes of each task, task by task.

    The result depends on ``seed`` alone, not on ``workers``: the n-th attempt at a task is a pure
    function of the seed, the task and n, and the first attempts that succeed are kept.

    Raises:
        ConfigError: an expert fails more often than it succeeds.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        first = {
            task: [pool.submit(attempt, env, config, task, seed, n) for n in range(episodes)]
            for task in tasks
        }
        for task in tasks:
            num_kept = 0
            for n in count():
                if num_kept == episodes:
                    break
                if n - num_kept > max(episodes * (1 / MIN_SUCCESS - 1), 3):
                    raise ConfigError(
                        f"the expert of task {task} solved {num_kept} of {n} attempts; "
                        "record with less noise"
                    )
                late = n >= episodes
                future = (
                    pool.submit(attempt, env, config, task, seed, n) if late else first[task][n]
                )
                demonstration = future.result()
                if not late:
                    first[task][n].cancel()
                if demonstration is not None:
                    num_kept += 1
                    yield demonstration


def attempt(
    config: EnvConfig, recording: RecordingConfig, task_id: int, seed: int, index: int
) -> Demonstration | None:
    """Let the expert try once; None where it failed within the task's step limit."""
    return play_expert(_env(config), task_id, recording, seed=seed, index=index)


def play_expert(
    env: LiberoEnv, task_id: int, config: RecordingConfig, *, seed: int, index: int
) -> Demonstration | None:
    """Play the ``index``-th attempt at a task; None where it failed.

    The start is drawn from the task's regions and is in neither split of the suite.
    """
    rng = np.random.default_rng([seed, task_id, index])
    start_seed = int(rng.integers(2**31))
    env.reset_to(task_id, sample_init_state(env, task_id, start_seed))
    simulator = env.simulator(task_id)
    make_expert = _expert_of(env.suite.tasks[task_id].name)
    expert = make_expert(simulator, rng.uniform(config.slowest_pace, config.fastest_pace))
    images: list[npt.NDArray[np.uint8]] = []
    actions: list[npt.NDArray[np.float64]] = []
    num_steps: int | None = None
    limit = env.suite.step_limit(env.config.step_limit, task_id)
    while num_steps is None or len(actions) < num_steps + config.horizon:
        if num_steps is None and len(actions) % config.every == 0:
            images.append(env.observe().image)
        if len(actions) % config.hold == 0:
            disturbance = rng.normal(0.0, config.noise, 3)
        action = expert.act()
        actions.append(_shift(action, rng.normal(0.0, config.label_noise, 3)))
        solved = simulator.step(_shift(action, disturbance))
        if solved and num_steps is None:
            num_steps = len(actions)
        if num_steps is None and len(actions) >= limit:
            return None
    return Demonstration(
        task_id=task_id,
        instruction=env.suite.tasks[task_id].instruction,
        images=np.stack(images),
        frame_steps=np.arange(len(images)) * config.every,
        actions=np.stack(actions).astype(np.float32),
        num_steps=num_steps,
    )


def _shift(action: npt.NDArray[np.float64], by: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    moved = action.copy()
    moved[:3] = np.clip(action[:3] + by, -FASTEST, FASTEST)
    return moved


def _expert_of(task_name: str) -> Callable[[Any, float], Any]:
    # the experts' module imports MuJoCo, which must wait until the environment has chosen a GL
    return importlib.import_module("verl_vla.envs.mini.experts").EXPERTS[task_name]


@lru_cache(maxsize=1)
def _env(config: EnvConfig) -> LiberoEnv:
    """The environment of a recording process."""
    return make_env(config)


def _member(index: int) -> str:
    return f"episode_{index:05d}"


def _write_member(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)
