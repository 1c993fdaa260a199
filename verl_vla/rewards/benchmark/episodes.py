"""The episodes that rewards are measured on: rolled out once, kept on disk, then only read.

A folder holds ``played.json``, the settings of the rollouts, and one ``round_NNNN.npz`` for every
few groups, so that a stopped call resumes after the last complete round.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, JsonValue, StrictFloat, StrictInt

from verl_vla.config.choices import MOST_PX, MOST_SEED, MOST_SLOTS, Dtype
from verl_vla.config.schema import remedy, section
from verl_vla.core.episode import EpisodeSpec, Start
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import atomic_write, writing_to
from verl_vla.core.json_files import read_json
from verl_vla.core.tables import Trajectories
from verl_vla.core.trajectory_io import REMEDY as TRAJECTORIES_REMEDY
from verl_vla.core.trajectory_io import read_trajectories, write_trajectories
from verl_vla.policies.base import Policy
from verl_vla.rl.rollout import NoiseSource, Simulators, rollout

logger = logging.getLogger(__name__)

BENCH_STREAM = 2
"""Stream of the noise source; training uses stream 0 and evaluation stream 1."""
GROUPS_PER_ROUND = 8
"""Groups of one rollout round, kept in one file: as many as a training step of mini."""
PLAYED_FILE = "played.json"

Group = list[EpisodeSpec]


@section("")
class PlayConfig:
    """Settings of the rollouts; calls with equal settings use the same episodes."""

    policy: str = "bases/mini"
    """Folder of a checkpoint."""
    suite: str = "mini"
    tasks: tuple[StrictInt, ...] | None = None
    """Task ids; None for all of the suite."""
    groups: StrictInt = Field(default=64, ge=2)
    """Number of groups over all tasks, spread evenly; each has a different training start."""
    group_size: StrictInt = Field(default=8, ge=2)
    temperature: StrictFloat = Field(
        default=1.0,
        gt=0,
        json_schema_extra=remedy(
            "episodes of one start must differ to be ranked, so set a positive number"
        ),
    )
    """Sampling temperature of the action tokens; above 0, since failures must differ."""
    seed: StrictInt = Field(default=0, ge=0, le=MOST_SEED)
    """Seed of the choice of starts and of the sampling noise."""
    step_limit: Literal["published", "simplevla"] | StrictInt = "published"
    render_size: StrictInt | None = Field(default=None, ge=1, le=MOST_PX)
    """Side of the camera image in pixels; None for the size that the policy was fine-tuned on.
    ``played.json`` holds the resolved number."""
    dtype: Dtype = "float32"
    unnorm_key: str | None = None
    num_slots: StrictInt = Field(default=16, ge=1, le=MOST_SLOTS)
    """Simulator slots, the number of episodes that run at the same time. It is part of the settings
    because the batch size can change the last bit of a logit."""


def choose_groups(
    starts: Sequence[Start], *, groups: int, group_size: int, seed: int
) -> list[Group]:
    """Choose starts round-robin over the tasks, each at most once.

    Args:
        starts: candidates, of all tasks.
        groups: number of groups.
        group_size: episodes per group.
        seed: seed of the choice among the starts of a task.

    Raises:
        ConfigError: more groups than starts, or fewer than two for a task: the train and the test
            split need different starts.
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
        # by task: the choice in one task does not depend on the others
        order = np.random.default_rng([seed, task]).permutation(len(of_task))
        by_task.append([of_task[i] for i in order])
    longest = max(map(len, by_task))
    # a start of every task, then another of every task, ..
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
    """Create the folder of episodes, or check that it holds those that ``record`` describes.

    Args:
        folder: folder of the episodes.
        record: all settings that decide the episodes, as plain values.

    Raises:
        ConfigError: the folder holds other episodes, or cannot be written.
    """
    # as JSON gives it back, e.g. lists for tuples
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
                "read these with --episodes-from"
            )
        return
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / PLAYED_FILE, json.dumps(wanted, indent=1))


def played_with(folder: Path) -> dict[str, Any]:
    """Read the settings that decided the episodes of a folder.

    Raises:
        ConfigError: the folder holds no episodes, or the file of their settings is damaged.
    """
    file = folder / PLAYED_FILE
    if not file.exists():
        raise ConfigError(
            f"{folder} holds no {PLAYED_FILE}; name a folder that reward-bench has played into"
        )
    return read_json(file, dict[str, JsonValue], "play the episodes again, into another folder")


def is_complete(folder: Path, num_groups: int) -> bool:
    """Check that all rounds are on disk."""
    return all(round_file(folder, i).is_file() for i in range(num_rounds(num_groups)))


def play_missing(
    folder: Path,
    groups: Sequence[Group],
    policy: Policy,
    simulators: Simulators,
    *,
    temperature: float,
    seed: int,
    ended: Callable[[Trajectories], None] | None,
) -> None:
    """Roll out the rounds that are not on disk yet, and write each when it is complete.

    ``ended`` is called as each episode ends; see `verl_vla.rl.rollout.rollout`.
    """
    rounds = num_rounds(len(groups))
    for index in range(rounds):
        file = round_file(folder, index)
        # a call before this one was stopped after it
        if file.is_file():
            continue
        first = index * GROUPS_PER_ROUND
        specs = [spec for group in groups[first : first + GROUPS_PER_ROUND] for spec in group]
        noise = NoiseSource(seed=seed, stream=BENCH_STREAM)
        trajectories = rollout(
            specs, policy, simulators, temperature=temperature, noise=noise, ended=ended
        )
        write_trajectories(file, trajectories)
        solved = int(trajectories.episodes.success.sum())
        logger.info(
            "round %d of %d: %d of %d episodes solved", index + 1, rounds, solved, len(specs)
        )


def read_rounds(folder: Path, num_groups: int) -> Trajectories:
    """Read all rounds, crashed episodes included.

    Raises:
        ConfigError: a round is missing or damaged, or they hold other groups.
    """
    if not is_complete(folder, num_groups):
        raise ConfigError(
            f"{folder} holds fewer than {num_groups} groups; repeat the command that played them, "
            "which goes on where it stopped"
        )
    files = [round_file(folder, index) for index in range(num_rounds(num_groups))]
    found = Trajectories.concat([read_trajectories(file) for file in files])
    missing = set(range(num_groups)) - set(found.episodes.group_id.tolist())
    if missing:
        raise ConfigError(
            f"{folder} holds no episodes of group {min(missing)}, and {PLAYED_FILE} says "
            f"{num_groups} groups; {TRAJECTORIES_REMEDY}"
        )
    return found


def num_rounds(num_groups: int) -> int:
    """Return the number of rounds in which so many groups are played."""
    return -(-num_groups // GROUPS_PER_ROUND)


def round_file(folder: Path, index: int) -> Path:
    """Return the file of a round."""
    return folder / f"round_{index:04d}.npz"


def require_groups(folder: Path, played: Trajectories, groups: Sequence[Group]) -> None:
    """Refuse rounds that hold other episodes than `PLAYED_FILE` beside them says.

    Args:
        folder: folder of the episodes, for the message.
        played: result of `read_rounds`.
        groups: result of `choose_groups` for the settings in the file.

    Raises:
        ConfigError: an episode is missing, superfluous, or of another task or start.
    """
    columns = played.episodes
    found = zip(
        *(column.tolist() for column in (columns.episode_id, columns.group_id)),
        *(column.tolist() for column in (columns.task_id, columns.init_state_id)),
        strict=True,
    )
    wanted = [
        (spec.episode_id, spec.group_id, spec.task_id, spec.init_state_id)
        for group in groups
        for spec in group
    ]
    wrong = sorted(Counter(found).items() ^ Counter(wanted).items())
    if wrong:
        (episode, group, task, state), _ = wrong[0]
        raise ConfigError(
            f"{folder}: {PLAYED_FILE} and the rounds beside it do not agree, first on episode "
            f"{episode} of group {group}, task {task} and init state {state}; one of them is of "
            "other episodes: restore it, or play again into another folder"
        )
