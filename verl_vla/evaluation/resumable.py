"""An evaluation that resumes: what has ended is in the episode log, the rest is played.

Every start is played until it has an outcome of the policy's: where a simulator is lost the start
is played again, a few times, so a quota of N episodes is N episodes. What a policy chooses depends
on the observation and the episode's noise alone (`verl_vla.policies.base.Policy.act`), so it does
not matter in whose company an episode is played, nor by how many processes one after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from verl_vla.core.episode import EpisodeSpec, Outcome, Start
from verl_vla.core.tables import Trajectories
from verl_vla.evaluation.evaluate import EVALUATION_STREAM
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.policies.base import Policy
from verl_vla.rl.rollout import NoiseSource, Simulators, rollout
from verl_vla.runs.episode_log import EpisodeLog, episode_lines

ATTEMPTS = 3
"""How often a start is played whose simulator is lost each time, before it counts as a crash."""

EPISODES_AT_ONCE = 256
"""Images of an episode stay in memory until those played with it have ended: 65 policy steps of 150
kB in LIBERO-10, so 2.5 GB."""


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
    """Play every start that has no outcome yet, and write each into the episode log as it ends.

    Args:
        starts: of the whole evaluation; the index of a start is the id of its episode.
        policy: what is judged.
        simulators: a pool whose slots are all free.
        codec: turns the policy's bins into the actions that are kept.
        episode_log: of the evaluation.
        known: the lines that it holds already.
        temperature: 0 plays greedily.
        seed: of the noise, used where play is sampled.
        show: told of each line as it is written.

    Returns:
        One line for each start, in their order.
    """
    lines = [dict(line) for line in known]

    def keep(ended: Trajectories) -> None:
        fresh = episode_lines(ended, codec, with_actions=True)
        episode_log.append(fresh)
        lines.extend(fresh)
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
            ended=keep,
        )
    return last_of_each(lines)


def unplayed(lines: Sequence[Mapping[str, Any]], number: int) -> list[int]:
    """Episodes without an outcome of the policy's that may still be tried."""
    played = {line["episode"] for line in lines if line["outcome"] != Outcome.CRASH}
    losses = Counter(line["episode"] for line in lines if line["outcome"] == Outcome.CRASH)
    return [i for i in range(number) if i not in played and losses[i] < ATTEMPTS]


def last_of_each(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The line of each episode's last attempt, in the order of the episodes."""
    last = {line["episode"]: line for line in lines}
    return [last[episode] for episode in sorted(last)]
