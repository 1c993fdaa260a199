"""The episodes that rewards are judged on: played once, kept on disk, read ever after.

A folder holds ``played.json``, which says how they were played, and one ``round_NNNN.npz`` for
every few groups, so that a stopped call goes on where it stood.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from verl_vla.core.episode import EpisodeSpec, Start
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import atomic_write, writing_to
from verl_vla.core.tables import Trajectories
from verl_vla.core.trajectory_io import read_trajectories, write_trajectories
from verl_vla.envs.base import StepLimit
from verl_vla.policies.base import Policy
from verl_vla.rl.rollout import NoiseSource, Simulators, rollout

logger = logging.getLogger(__name__)

BENCH_STREAM = 2
"""Stream of the noise source; training plays from stream 0 and evaluation from 1."""
GROUPS_PER_ROUND = 8
"""Groups that are played together and kept in one file: a training step's worth of mini."""
PLAYED_FILE = "played.json"

Group = list[EpisodeSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayConfig:
    """Which episodes are played, and how; calls that agree in it mean the same episodes."""

    policy: str = "bases/mini"
    """Folder of a checkpoint."""
    suite: str = "mini"
    tasks: tuple[int, ...] | None = None
    """Task ids; None plays all of the suite."""
    groups: int = 64
    """Groups in all, spread evenly over the tasks; each has a training start of its own."""
    group_size: int = 8
    temperature: float = 1.0
    """Of the action tokens; failures must differ, so above 0."""
    seed: int = 0
    """Of the choice of starts and of the noise."""
    step_limit: StepLimit = "published"
    render_size: int | None = None
    """Camera image, pixels; None takes what the policy was fine-tuned on. The record of what was
    played holds the number."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    unnorm_key: str | None = None
    slots: int = 16
    """Episodes under way at the same time; a batch's size can move the last bit of a logit."""

    def __post_init__(self) -> None:
        for name, least in (("groups", 2), ("group_size", 2), ("slots", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; set at least {least}")
        if self.temperature <= 0:
            raise ConfigError(
                f"temperature is {self.temperature}; episodes of one start must differ to be "
                "ranked, so set a positive number"
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; set 0 or more")


def choose_groups(
    starts: Sequence[Start], *, groups: int, group_size: int, seed: int
) -> list[Group]:
    """Choose starts, task by task in turn, each at most once.

    Args:
        starts: to choose from, of all tasks.
        groups: how many.
        group_size: episodes of each.
        seed: of the choice among the starts of a task.

    Raises:
        ConfigError: more groups than starts, or fewer than two for a task, which could then not
            be learned from and judged on different starts.
    """
    tasks = sorted({start.task_id for start in starts})
    if groups > len(starts):
        raise ConfigError(
            f"groups is {groups}, but the tasks have {len(starts)} training starts; set at most "
            "that, or name more tasks"
        )
    if groups < 2 * len(tasks):
        raise ConfigError(
            f"groups is {groups} for {len(tasks)} tasks; a task needs two starts, one to learn "
            f"from and one to be judged on: set at least {2 * len(tasks)}"
        )
    by_task: list[list[Start]] = []
    for task in tasks:
        of_task = [start for start in starts if start.task_id == task]
        order = np.random.default_rng([seed, task]).permutation(len(of_task))
        by_task.append([of_task[i] for i in order])
    longest = max(map(len, by_task))
    in_turn = [found[lap] for lap in range(longest) for found in by_task if lap < len(found)]
    return [
        [
            EpisodeSpec(
                task_id=start.task_id,
                init_state_id=start.init_state_id,
                group_id=group_id,
                episode_id=group_id * group_size + member,
            )
            for member in range(group_size)
        ]
        for group_id, start in enumerate(in_turn[:groups])
    ]


def claim(folder: Path, record: Mapping[str, Any]) -> None:
    """Make the folder of episodes, or check that it holds those that ``record`` means.

    Args:
        folder: of the episodes.
        record: everything that decides what is played, as plain values.

    Raises:
        ConfigError: the folder holds others, or cannot be written.
    """
    wanted = json.loads(json.dumps(dict(record)))
    if (folder / PLAYED_FILE).is_file():
        found = played_with(folder)
        changed = [
            f"{name}: {found.get(name)!r} -> {wanted.get(name)!r}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        if changed:
            raise ConfigError(
                f"{folder} holds other episodes ({'; '.join(changed)}); choose another --out, or "
                "read these with --episodes"
            )
        return
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / PLAYED_FILE, json.dumps(wanted, indent=1))


def played_with(folder: Path) -> dict[str, Any]:
    """Read what decided the episodes of a folder.

    Raises:
        ConfigError: the folder holds no episodes.
    """
    file = folder / PLAYED_FILE
    if not file.is_file():
        raise ConfigError(
            f"{folder} holds no {PLAYED_FILE}; name a folder that reward-bench has played into"
        )
    return json.loads(file.read_text())


def is_complete(folder: Path, num_groups: int) -> bool:
    """Whether all rounds are on disk."""
    return all(_round_file(folder, i).is_file() for i in range(_num_rounds(num_groups)))


def play_missing(
    folder: Path,
    groups: Sequence[Group],
    policy: Policy,
    simulators: Simulators,
    *,
    temperature: float,
    seed: int,
) -> None:
    """Play the rounds that are not on disk yet and write each when it is over."""
    num_rounds = _num_rounds(len(groups))
    for index in range(num_rounds):
        file = _round_file(folder, index)
        if file.is_file():
            continue
        first = index * GROUPS_PER_ROUND
        specs = [spec for group in groups[first : first + GROUPS_PER_ROUND] for spec in group]
        noise = NoiseSource(seed=seed, stream=BENCH_STREAM)
        trajectories = rollout(specs, policy, simulators, temperature=temperature, noise=noise)
        write_trajectories(file, trajectories)
        solved = int(trajectories.episodes.success.sum())
        logger.info(
            "round %d of %d: %d of %d episodes solved", index + 1, num_rounds, solved, len(specs)
        )


def read_rounds(folder: Path, num_groups: int) -> Trajectories:
    """Read all rounds, crashed episodes included.

    Raises:
        ConfigError: a round is missing.
    """
    if not is_complete(folder, num_groups):
        raise ConfigError(
            f"{folder} holds fewer than {num_groups} groups; repeat the command that played them, "
            "which goes on where it stopped"
        )
    return Trajectories.concat(
        [read_trajectories(_round_file(folder, index)) for index in range(_num_rounds(num_groups))]
    )


def _num_rounds(num_groups: int) -> int:
    return -(-num_groups // GROUPS_PER_ROUND)


def _round_file(folder: Path, index: int) -> Path:
    return folder / f"round_{index:04d}.npz"
