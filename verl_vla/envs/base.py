"""What must be there to train in: a `Suite`, and an `Env` that plays its tasks.

An environment plays one episode at a time and can be put back to any moment of any episode of
its suite by a `Snapshot`. Snapshots are plain values: a pool may keep them, send them to another
process and go on there, and the numbers stay the same to the bit.
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

from verl_vla.core.episode import GoalReadings, Observation, Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.core.text import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One moment of one episode, complete: continuing from it equals never having stopped."""

    task_id: int
    num_steps: int
    """Simulator steps the policy has chosen so far; settling steps are not counted."""
    state: Any
    """What the environment needs to continue; picklable, made of numpy arrays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkResult:
    """What became of one action chunk."""

    executed: int
    """How many actions ran, 1..K; fewer than K only where the episode ended inside the chunk."""
    outcome: Outcome | None
    """`SUCCESS` or `TIMEOUT` where the episode ended, else None. A success at any step of the
    chunk ends the episode there."""
    observation: Observation | None
    """What the policy sees next; None where the episode ended."""
    goals: GoalReadings
    """[2, G, 3], before the chunk and after it."""
    final_image: npt.NDArray[np.uint8] | None = None
    """[V, H, W, 3], what was to be seen after the last step, as in an observation; None where the
    episode goes on, or where the environment was not told to render it."""


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
        """Continue from ``snapshot``, whoever made it."""
        ...

    def close(self) -> None:
        """Free the simulator."""
        ...


EnvFactory = Callable[[], Env]
"""Makes an environment inside a worker process; must be picklable (a `functools.partial`)."""


Split = Literal["train", "held_out", "official", "sampled"]
"""``official`` is every recorded start, as in published evaluations: trained on or not; ``sampled``
starts are recorded nowhere."""
StepLimit = Literal["published", "simplevla"] | int

HELD_OUT_EVERY = 5
SHARES_KEPT, LEAST_KEPT = 2, 2
"""Of tasks by a process: room for a second one while all processes of a task are busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One instruction of a suite."""

    name: str
    instruction: str
    """As the policies were fine-tuned on it: lower case, no full stop."""
    published_steps: int
    """Step limit of the published evaluation; of a suite of our own, our own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvConfig:
    """What is simulated and what is seen of it."""

    suite: str = "mini"
    step_limit: StepLimit = "published"
    """Steps the policy may choose before an episode has failed; see `Suite.step_limit`."""
    render_size: int = 256
    """Height and width of a camera's image, pixels."""
    image_size: int = 224
    """Height and width of what the policy sees, pixels."""
    cameras: tuple[str, ...] = ("agentview",)
    render_final: bool = False
    """Render what is to be seen after an episode's last step; a policy has no use for it, a reward
    that looks at images has."""
    settle_steps: int = 10
    """Of LIBERO: steps with an open, resting gripper before the first observation; objects drop
    meanwhile."""
    max_simulators: int = 10
    """Of LIBERO: tasks whose simulators are kept, the one unused for longest going first. One takes
    0.1 GB in the mini suite and 0.7 to 1.8 GB in LIBERO's, and seconds to build. Fewer are kept
    where memory is short."""

    def __post_init__(self) -> None:
        for name in ("render_size", "image_size", "max_simulators"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.settle_steps < 0:
            raise ConfigError(f"settle_steps is {self.settle_steps}; it must be at least 0")


def simulators_per_process(num_tasks: int, num_workers: int) -> int:
    """Return how many simulators each process keeps: its share of the tasks, twice over.

    The pool gives a process the tasks that it has served before, so that twice the share is enough;
    never fewer than 2, nor more than `EnvConfig.max_simulators` is by itself.

    >>> [simulators_per_process(10, workers) for workers in (1, 2, 8, 64)]
    [10, 10, 3, 2]
    """
    share = math.ceil(SHARES_KEPT * num_tasks / num_workers)
    return min(max(share, LEAST_KEPT), EnvConfig().max_simulators)


class Suite(ABC):
    """Tasks that share their robot, cameras and step limits; what a recipe's ``suite`` names.

    A suite of your own sets the attributes and `make_env`; how to is in docs/add-an-environment.md.
    Reading one must start no simulator: the trainer reads it, only its workers simulate.
    """

    name: str
    tasks: Sequence[Task]
    num_init_states: int
    """Recorded starts of each task, counted from 0; a start is the same in every process."""
    cameras: tuple[str, ...]
    """The first V of them are shown to a policy of V views."""
    action_dim: int
    """A, values of one action."""
    proprio_dim: int
    """P, values of `Observation.proprio`."""
    gripper_dims: tuple[int, ...]
    """Places in an action that are commanded by sign, -1 opens and +1 closes, and that a policy's
    statistics therefore do not normalise; empty where all values are what the data says."""

    policy_sizes: Mapping[str, Any] = MappingProxyType({})
    """Entries of ``config.json`` in which OpenVLA-OFT policies published for it differ from those
    for LIBERO; what a plan goes by where the policy is not at hand."""

    @property
    @abstractmethod
    def versions(self) -> Mapping[str, str]:
        """Names and versions of what decides a simulator's answers.

        They stand beside every rate; rates under others are not compared.
        """

    @abstractmethod
    def make_env(self, config: EnvConfig) -> Env:
        """Build one environment, in a worker process."""

    @property
    def refusals(self) -> Mapping[int, str]:
        """Tasks that cannot be simulated here, each with the reason; most suites have none.

        They are left out where no tasks are asked for by number, and counted.
        """
        return {}

    def require_simulator(self) -> None:  # noqa: B027 -- most suites need nothing more
        """Make sure that it can be simulated here; asked before anything starts.

        Raises:
            ConfigError: what is missing, with the remedy.
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
        """Return after how many steps of the policy a task counts as failed.

        Args:
            limit: ``published``, ``simplevla`` or a number of steps.
            task_id: index of the task; the limits of LIBERO's suites are equal for all tasks.

        Raises:
            ConfigError: the limit is below 1 or means nothing for this suite.
        """
        task = self.task(task_id)
        if limit == "published":
            return task.published_steps
        if limit == "simplevla":
            raise ConfigError(
                f"step_limit is 'simplevla', but SimpleVLA-RL never played {self.name}; "
                "choose 'published' or a number of steps"
            )
        if isinstance(limit, (str, bool)) or limit < 1:
            raise ConfigError(
                f"step_limit is {limit!r}; choose 'published', 'simplevla' or at least 1 step"
            )
        return limit

    def init_state_ids(self, task_id: int, split: Split) -> list[int]:
        """Return the recorded starts that may be trained on, those kept for evaluation, or all.

        Every fifth (4, 9, .., of 50 the last is 49) is held out.

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
        """Recorded starts that are never trained on."""
        return list(range(HELD_OUT_EVERY - 1, self.num_init_states, HELD_OUT_EVERY))

    def sampled_ids(self) -> list[int]:
        """Starts that are sampled; their ids follow the recorded ones, nobody trains on them."""
        raise ConfigError(
            f"starts shall be sampled, but {self.name} has recorded ones alone; choose "
            "another split"
        )
