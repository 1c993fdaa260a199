"""Interface of a simulator: a `Suite` of tasks, and an `Env` that plays them.

An environment plays one episode at a time. A `Snapshot` puts it back to any moment of any episode
of its suite. Snapshots are plain values: a pool may keep one, send it to another process and
continue there, and the numbers stay the same to the bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from verl_vla.config.choices import MOST_STEPS, Fixtures, Split
from verl_vla.core.episode import GoalReadings, Observation, Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.core.text import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The complete state of one episode at one moment; continuing from it changes no number."""

    task_id: int
    num_steps: int
    """Number of simulator steps the policy has chosen so far; settling steps are not counted."""
    state: Any
    """State that the environment continues from; picklable, made of numpy arrays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkResult:
    """Result of running one action chunk."""

    executed: int
    """Number of actions that ran, 1..K; below K only where the episode ended inside the chunk."""
    outcome: Outcome | None
    """`SUCCESS` or `TIMEOUT` where the episode ended, else None. A success at any step of the
    chunk ends the episode there."""
    observation: Observation | None
    """Observation for the next policy step; None where the episode ended."""
    goals: GoalReadings
    """[2, G, 3], before the chunk and after it."""
    final_image: npt.NDArray[np.uint8] | None = None
    """[V, H, W, 3], image after the episode's last step, as in an observation; None where the
    episode continues, or where the environment was not asked to render it."""
    video: npt.NDArray[np.uint8] | None = None
    """[F, H, W, 3], frames of the first camera at its full size, not prepared for the policy, in
    order (`EnvConfig.video_every`); F may be 0. None where no video was asked for."""


class Env(Protocol):
    """One simulator of a suite."""

    def reset(self, task_id: int, init_state_id: int) -> Observation:
        """Start an episode from a recorded init state, settle, and return the first observation."""
        ...

    def step_chunk(self, actions: npt.NDArray[np.float32]) -> ChunkResult:
        """Run ``actions`` [K, A] open loop until they are used up or the episode ends.

        Raises:
            ContractError: the episode has already ended, or ``actions`` has a wrong shape.
        """
        ...

    def snapshot(self) -> Snapshot:
        """Return this moment of the current episode."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from ``snapshot``, which may come from another process."""
        ...

    def close(self) -> None:
        """Free the simulator."""
        ...


EnvFactory = Callable[[], Env]
"""Function that makes an environment in a worker process; picklable (a `functools.partial`)."""


StepLimit = Literal["published", "simplevla"] | int

HELD_OUT_EVERY = 5
SHARES_KEPT, LEAST_KEPT = 2, 2
"""A process keeps simulators for 2 times its share of the tasks, and for at least 2 tasks, so that
it can help with a second task whose own processes are all busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One instruction of a suite."""

    name: str
    instruction: str
    """Instruction as the policies were fine-tuned on it: lower case, no full stop."""
    published_steps: int
    """Step limit of the published evaluation; for an unpublished suite, its author's limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvConfig:
    """Suite, step limit, cameras and image sizes of an environment."""

    suite: str = "mini"
    step_limit: StepLimit = "published"
    """Steps the policy may choose before an episode has failed; see `Suite.step_limit`."""
    render_size: int = 256
    """Height and width of a camera's image, pixels."""
    image_size: int = 224
    """Height and width of the image that the policy sees, pixels."""
    cameras: tuple[str, ...] = ("agentview",)
    render_final: bool = False
    """Render an image after an episode's last step too; policies do not use it, rewards that look
    at images do."""
    video_every: int = 0
    """Simulator steps between two frames of `ChunkResult.video`, for rewards that compare videos;
    the first moment of an episode and its last are always frames. 0 makes no video. With 1, a
    chunk of 8 steps renders 8 images of that camera instead of 1. With software rendering an
    episode then takes 6.5 times the processor time on LIBERO-Spatial and 3.4 times on mini; with 4
    it takes 1.9 and 1.4 times (``bench video``, docs/benchmarks.md)."""
    settle_steps: int = 10
    """LIBERO only: steps with an open gripper at rest before the first observation, during which
    objects fall into place."""
    fixtures: Fixtures = "first"
    """LIBERO only: where cabinets, stoves and racks stand."""
    max_simulators: int = 10
    """LIBERO only: number of tasks whose simulators are kept; the least recently used one is closed
    first. A simulator takes 0.1 GB in the mini suite, 0.7 to 1.8 GB in LIBERO's, and seconds to
    build. Fewer are kept where memory is short."""

    def __post_init__(self) -> None:
        for name in ("render_size", "image_size", "max_simulators"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("settle_steps", "video_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0")


def simulators_per_process(num_tasks: int, num_workers: int) -> int:
    """Return how many simulators each process keeps: twice its share of the tasks.

    The pool gives a process the tasks that it has served before, so twice the share is enough. The
    number is at least 2 and at most the default of `EnvConfig.max_simulators`.

    >>> [simulators_per_process(10, workers) for workers in (1, 2, 8, 64)]
    [10, 10, 3, 2]
    """
    share = math.ceil(SHARES_KEPT * num_tasks / num_workers)
    return min(max(share, LEAST_KEPT), EnvConfig().max_simulators)


class Suite(ABC):
    """A benchmark: tasks that share robot, cameras and step limits. A recipe's ``suite`` names one.

    Your own suite sets the attributes and `make_env`; see docs/add-an-environment.md. Making a
    suite must start no simulator: the trainer makes one too, only its workers simulate.
    """

    name: str
    tasks: Sequence[Task]
    num_init_states: int
    """Number of recorded starts per task; start i is the same in every process."""
    cameras: tuple[str, ...]
    """Names of the cameras; a policy of V views gets the first V."""
    action_dim: int
    """A, number of values of one action."""
    proprio_dim: int
    """P, number of values of `Observation.proprio`."""
    gripper_dims: tuple[int, ...]
    """Indices of the values of an action that are commanded by sign, -1 opens and +1 closes. A
    policy's statistics do not normalise them. Empty where all values are normalised."""

    images_are_mirrored: bool = False
    """True where left and right are swapped in every image, as in LIBERO's training data; a reward
    whose judge knows the sides (a vision-language model) swaps them back."""
    policy_sizes: Mapping[str, Any] = MappingProxyType({})
    """Entries of ``config.json`` in which OpenVLA-OFT policies published for this suite differ from
    those for LIBERO; ``plan`` uses them where the policy's folder is not available."""

    @property
    @abstractmethod
    def versions(self) -> Mapping[str, str]:
        """Names and versions of the packages that decide a simulator's results.

        They are stored with every success rate; rates with different versions are not compared.
        """

    @abstractmethod
    def make_env(self, config: EnvConfig) -> Env:
        """Build one environment, in a worker process."""

    @property
    def refusals(self) -> Mapping[int, str]:
        """Ids of tasks that cannot be simulated here, with the reasons; most suites have none.

        Unless tasks are requested by id, these are left out, and their number is reported.
        """
        return {}

    def require_simulator(self) -> None:  # noqa: B027 -- most suites need nothing more
        """Check that the suite can be simulated here; called before anything starts.

        Raises:
            ConfigError: something is missing; names it and the remedy.
        """

    def task(self, task_id: int) -> Task:
        """Return one task.

        Raises:
            ConfigError: there is no such task.
        """
        if not 0 <= task_id < len(self.tasks):
            raise ConfigError(
                f"task {task_id} is not in {self.name}; its tasks are 0..{len(self.tasks) - 1}"
            )
        return self.tasks[task_id]

    def step_limit(self, limit: StepLimit, task_id: int) -> int:
        """Return the number of policy-chosen steps after which an episode has failed.

        Args:
            limit: ``published``, ``simplevla`` or a number of steps.
            task_id: index of the task; the limits of LIBERO's suites are equal for all tasks.

        Raises:
            ConfigError: the limit is below 1 or not defined for this suite.
        """
        task = self.task(task_id)
        if limit == "published":
            return task.published_steps
        if limit == "simplevla":
            raise ConfigError(
                f"step_limit is 'simplevla', but SimpleVLA-RL never played {self.name}; "
                "choose 'published' or a number of steps"
            )
        # True is an int in Python, and would pass as a limit of one step
        if isinstance(limit, (str, bool)) or limit < 1:
            raise ConfigError(
                f"step_limit is {limit!r}; choose 'published', 'simplevla' or at least 1 step"
            )
        if limit > MOST_STEPS:
            raise ConfigError(f"step_limit is {limit}; set at most {MOST_STEPS:,}")
        return limit

    def init_state_ids(self, task_id: int, split: Split) -> list[int]:
        """Return the ids of the starts of a split.

        Every fifth recorded start (4, 9, .., of 50 the last is 49) is held out from training.

        Raises:
            ConfigError: there is no such task or split, or nothing can be sampled.
        """
        self.task(task_id)
        if split not in get_args(Split):
            raise ConfigError(f"split is {split!r}; {nearest(split, get_args(Split))}")
        ids = range(self.num_init_states)
        if split == "official":
            return list(ids)
        if split == "sampled":
            return self.sampled_ids()
        held_out = self.held_out_ids()
        return held_out if split == "held_out" else [i for i in ids if i not in held_out]

    def held_out_ids(self) -> list[int]:
        """Return the ids of the recorded starts that are never trained on."""
        return list(range(HELD_OUT_EVERY - 1, self.num_init_states, HELD_OUT_EVERY))

    def sampled_ids(self) -> list[int]:
        """Return the ids of sampled starts, which follow the recorded ones.

        Raises:
            ConfigError: the suite cannot sample starts.
        """
        raise ConfigError(
            f"sampled starts were requested, but {self.name} has recorded ones alone; choose "
            "another split"
        )
