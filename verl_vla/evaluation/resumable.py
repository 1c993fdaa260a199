"""A resumable evaluation: completed episodes are in the episode log, the rest is rolled out.

Every start is repeated until it has an outcome of the policy: if a simulator is lost, the start is
rolled out again, a few times, so N requested episodes give N outcomes. The actions of a policy
depend only on the observation and the episode's noise (`verl_vla.policies.base.Policy.act`).
Therefore the result does not depend on the other episodes of a batch or on interruptions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_vla.core.episode import EpisodeSpec, Outcome, Start
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import LOCK, writing_to
from verl_vla.core.tables import Trajectories
from verl_vla.evaluation.evaluate import EVALUATION_STREAM
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.policies.base import Policy
from verl_vla.rl.rollout import NoiseSource, Simulators, rollout
from verl_vla.runs.episode_log import (
    EPISODE_LOG_FILE,
    REMEDY,
    EpisodeLog,
    episode_lines,
    require_own,
    stream_episodes,
)

ATTEMPTS = 3
"""Number of attempts after which a start whose simulator is lost each time counts as a crash."""

EPISODES_AT_ONCE = 256
"""Number of episodes per call of `rollout`, which keeps their images in memory until all have
ended: 65 policy steps of 150 kB in LIBERO-10, so 2.5 GB."""


def require_evaluation(folder: Path, header: Mapping[str, Any]) -> None:
    """Refuse a folder that is not this evaluation's, before anything is written to it.

    Raises:
        ConfigError: it holds the episodes of something else, or other files.
    """
    if not folder.exists():
        return
    with writing_to(folder):
        others = {path.name for path in folder.iterdir()} - {LOCK}
    if others and EPISODE_LOG_FILE not in others:
        raise ConfigError(
            f"--out is {folder}, which holds {min(others)!r} and no evaluation; choose a new or an "
            "empty folder"
        )
    require_own(folder, header)


def read_played(folder: Path, starts: Sequence[Start]) -> list[dict[str, Any]]:
    """Read the episodes of an evaluation that were rolled out already.

    Raises:
        ConfigError: a line is damaged, or is of another start than its episode, which would be
            counted in place of the right one.
    """
    lines: list[dict[str, Any]] = []
    ended: set[int] = set()
    # as they are read: a foreign log of gigabytes is refused at its first line
    for index, line in enumerate(stream_episodes(folder)):
        lines.append(line)
        number = line["episode"]
        start = starts[number] if number < len(starts) else None
        if start != Start(task_id=line["task"], init_state_id=line["init_state"]):
            raise ConfigError(
                # the header is line 1
                f"{folder / EPISODE_LOG_FILE}, line {index + 2}: episode {number} of task "
                f"{line['task']} and init state {line['init_state']} is not among the "
                f"{len(starts)} of this evaluation; {REMEDY}"
            )
        # a start is rolled out again after a crash only
        if number in ended:
            raise ConfigError(
                f"{folder / EPISODE_LOG_FILE}, line {index + 2}: episode {number} ended before; "
                f"{REMEDY}"
            )
        if line["outcome"] != Outcome.CRASH:
            ended.add(number)
    return lines


def play_remaining(
    starts: Sequence[Start],
    policy: Policy,
    simulators: Simulators,
    codec: ActionCodec,
    episode_log: EpisodeLog,
    known: Sequence[Mapping[str, Any]],
    *,
    temperature: float,
    seed: int,
    show: Callable[[Mapping[str, Any]], None],
) -> list[dict[str, Any]]:
    """Roll out every start that has no outcome yet, and log each episode as it ends.

    Args:
        starts: all starts of the evaluation; the index of a start is the id of its episode.
        policy: the policy to evaluate.
        simulators: a pool whose slots are all free.
        codec: decodes action tokens into the actions that are kept.
        episode_log: episode log of the evaluation.
        known: lines that the episode log holds already.
        temperature: sampling temperature; 0 is greedy.
        seed: seed of the sampling noise; greedy episodes do not use it.
        show: callback that gets each line after it is written.

    Returns:
        One line for each start, in their order.
    """
    lines = [dict(line) for line in known]

    def keep(ended: Trajectories) -> None:
        fresh = episode_lines(ended, codec, with_actions=True)
        # written before it is shown: what the user has seen is on disk
        episode_log.append(fresh)
        lines.extend(fresh)
        # `rollout` hands over one episode at a time
        show(fresh[0])

    while remaining := unplayed(lines, len(starts)):
        specs = [
            EpisodeSpec(
                task_id=starts[i].task_id,
                init_state_id=starts[i].init_state_id,
                group_id=i,
                episode_id=i,
            )
            for i in remaining[:EPISODES_AT_ONCE]
        ]
        rollout(
            specs,
            policy,
            simulators,
            temperature=temperature,
            noise=NoiseSource(seed=seed, stream=EVALUATION_STREAM),
            # logged as it ends: a stopped evaluation loses only what is under way
            ended=keep,
        )
    return last_of_each(lines)


def unplayed(lines: Sequence[Mapping[str, Any]], number: int) -> list[int]:
    """Return the episodes without an outcome of the policy that have attempts left."""
    played = {line["episode"] for line in lines if line["outcome"] != Outcome.CRASH}
    losses = Counter(line["episode"] for line in lines if line["outcome"] == Outcome.CRASH)
    # a lost simulator is no outcome of the policy, so its start is due again
    return [i for i in range(number) if i not in played and losses[i] < ATTEMPTS]


def last_of_each(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the line of each episode's last attempt, in the order of the episodes."""
    # a later line of an episode replaces an earlier one
    last = {line["episode"]: line for line in lines}
    return [last[episode] for episode in sorted(last)]
