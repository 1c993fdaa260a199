"""Success rates with their counts and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from verl_vla.core.episode import Outcome
from verl_vla.core.tables import Trajectories

WILSON_Z = 1.959963984540054
"""The 97.5% quantile of the normal distribution: a two-sided 95% interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuccessRate:
    """A success rate together with the counts that it comes from."""

    successes: int
    episodes: int
    """Number of episodes that were played and did not crash."""
    crashes: int

    @property
    def rate(self) -> float:
        """Successes / episodes; NaN where every episode crashed."""
        return self.successes / self.episodes if self.episodes else math.nan

    @property
    def ci95(self) -> tuple[float, float]:
        """Lower and upper end of the 95% Wilson score interval (Wilson 1927).

        >>> SuccessRate(successes=8, episodes=10, crashes=0).ci95
        (0.4901..., 0.9433...)
        """
        if not self.episodes:
            return (0.0, 1.0)
        n, p, z = self.episodes, self.rate, WILSON_Z
        # Wilson's interval: (centre +- half) / scale
        centre = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        # rounding can put an end past a rate of exactly 0 or 1; the rate itself bounds it
        low, high = min(p, (centre - half) / scale), max(p, (centre + half) / scale)
        return (max(0.0, low), min(1.0, high))

    def plus(self, other: SuccessRate) -> SuccessRate:
        """Return the counts of both."""
        return SuccessRate(
            successes=self.successes + other.successes,
            episodes=self.episodes + other.episodes,
            crashes=self.crashes + other.crashes,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the rate (null where every episode crashed), its counts, and its interval."""
        return {
            # JSON has no NaN
            "rate": self.rate if self.episodes else None,
            "successes": self.successes,
            "episodes": self.episodes,
            "crashes": self.crashes,
            "ci95": list(self.ci95),
        }


def count(trajectories: Trajectories, tasks: Sequence[int]) -> SuccessRate:
    """Count the episodes of some tasks; crashes are counted apart from failures."""
    episodes = trajectories.episodes
    of_tasks = torch.isin(episodes.task_id, torch.tensor(tasks, dtype=torch.int64))
    crashes = int((episodes.crashed & of_tasks).sum())
    return SuccessRate(
        successes=int((episodes.success & of_tasks).sum()),
        episodes=int(of_tasks.sum()) - crashes,
        crashes=crashes,
    )


def count_entries(entries: Sequence[Mapping[str, Any]], tasks: Collection[int]) -> SuccessRate:
    """Count as `count` does, from entries made by `episode_entries`."""
    outcomes = [entry["outcome"] for entry in entries if entry["task"] in tasks]
    crashes = outcomes.count(Outcome.CRASH)
    return SuccessRate(
        successes=outcomes.count(Outcome.SUCCESS),
        episodes=len(outcomes) - crashes,
        crashes=crashes,
    )


def episode_entries(trajectories: Trajectories) -> list[dict[str, Any]]:
    """Return start and outcome of each episode as plain values, in the order of the episodes.

    ``crash`` is the reason why the simulator was lost, or None.
    """
    episodes = trajectories.episodes
    columns = zip(
        episodes.episode_id.tolist(),
        episodes.task_id.tolist(),
        episodes.init_state_id.tolist(),
        episodes.outcome.tolist(),
        episodes.num_steps.tolist(),
        strict=True,
    )
    return [
        {
            "episode": episode,
            "task": task,
            "init_state": state,
            "outcome": outcome,
            "steps": steps,
            "crash": trajectories.crashes.get(episode),
        }
        for episode, task, state, outcome, steps in columns
    ]
