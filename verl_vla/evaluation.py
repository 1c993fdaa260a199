"""Success rate per task with its interval, on fixed held-out starts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from verl_vla.errors import ConfigError
from verl_vla.policies.base import Policy
from verl_vla.rollout import NoiseSource, RolloutTimes, Simulators, play
from verl_vla.sampling import Start
from verl_vla.types import EpisodeSpec, Outcome, Trajectories

WILSON_Z = 1.959963984540054
"""The 97.5% quantile of the normal distribution: a two-sided 95% interval."""

EVALUATION_STREAM = 1
"""Stream of the noise source; training plays from stream 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """What an evaluation plays."""

    episodes_per_task: int | None = None
    """Held-out starts per task, from the first on; null plays all of them once."""
    temperature: float = 0.0
    """0 plays greedily."""
    states: Literal["held_out", "drawn"] = "held_out"
    """``held_out``: recorded init states that are never trained on, 10 a task of LIBERO's suites;
    ``drawn``: starts drawn from the tasks' regions, as many as ``episodes_per_task`` says."""

    def __post_init__(self) -> None:
        if self.episodes_per_task is not None and self.episodes_per_task < 1:
            raise ConfigError(
                f"evaluation.episodes_per_task is {self.episodes_per_task}; "
                "set at least 1, or null for all held-out starts"
            )
        if self.temperature < 0:
            raise ConfigError(
                f"evaluation.temperature is {self.temperature}; set 0 for greedy play or more"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SuccessRate:
    """A rate that never travels without its counts."""

    successes: int
    episodes: int
    """Episodes that count: played and not crashed."""
    crashes: int

    @property
    def rate(self) -> float:
        """Successes / episodes; NaN where every simulator was lost."""
        return self.successes / self.episodes if self.episodes else math.nan

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson score interval (Wilson 1927), lower and upper end.

        >>> SuccessRate(successes=8, episodes=10, crashes=0).ci95
        (0.4901..., 0.9433...)
        """
        if not self.episodes:
            return (0.0, 1.0)
        n, p, z = self.episodes, self.rate, WILSON_Z
        centre = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        # the rate itself bounds what rounding makes of the ends 0 and 1
        low, high = min(p, (centre - half) / scale), max(p, (centre + half) / scale)
        return (max(0.0, low), min(1.0, high))

    def as_json(self) -> dict[str, Any]:
        """The rate (null where every simulator was lost), its counts, and its interval."""
        return {
            "rate": self.rate if self.episodes else None,
            "successes": self.successes,
            "episodes": self.episodes,
            "crashes": self.crashes,
            "ci95": list(self.ci95),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The result of one evaluation."""

    total: SuccessRate
    per_task: dict[int, SuccessRate]
    """Keyed by task id."""
    trajectories: Trajectories
    """What was played, in the order of the starts."""

    def as_metrics(self, task_names: dict[int, str]) -> dict[str, float]:
        """The numbers under the names of `verl_vla.metrics`."""
        low, high = self.total.ci95
        pooled = {
            "eval/success_rate": self.total.rate,
            "eval/episodes": float(self.total.episodes),
            "eval/ci_low": low,
            "eval/ci_high": high,
        }
        tasks = {f"eval/task/{task_names[t]}": rate.rate for t, rate in self.per_task.items()}
        return pooled | tasks


def evaluate(
    starts: Sequence[Start],
    policy: Policy,
    simulators: Simulators,
    *,
    config: EvaluationConfig,
    seed: int,
    times: RolloutTimes | None = None,
) -> Evaluation:
    """Play every start once and count.

    Args:
        starts: fixed held-out starts; the same list gives comparable numbers.
        policy: what is judged.
        simulators: a pool whose slots are all free.
        config: greedy or sampled.
        seed: of the noise, used where play is sampled.
        times: if given, the seconds spent are added to it.
    """
    specs = [
        EpisodeSpec(
            task_id=start.task_id, init_state_id=start.init_state_id, group_id=i, episode_id=i
        )
        for i, start in enumerate(starts)
    ]
    trajectories = play(
        specs,
        policy,
        simulators,
        temperature=config.temperature,
        noise=NoiseSource(seed=seed, stream=EVALUATION_STREAM),
        times=times,
    )
    tasks = sorted({start.task_id for start in starts})
    return Evaluation(
        total=count(trajectories, tasks),
        per_task={task: count(trajectories, [task]) for task in tasks},
        trajectories=trajectories,
    )


def count(trajectories: Trajectories, tasks: Sequence[int]) -> SuccessRate:
    """Count the episodes of some tasks; a crash is no failure of the policy."""
    episodes = trajectories.episodes
    of_tasks = torch.isin(episodes.task_id, torch.tensor(tasks, dtype=torch.int64))
    crashes = int((episodes.crashed & of_tasks).sum())
    return SuccessRate(
        successes=int((episodes.success & of_tasks).sum()),
        episodes=int(of_tasks.sum()) - crashes,
        crashes=crashes,
    )


def count_entries(entries: Sequence[Mapping[str, Any]], tasks: Collection[int]) -> SuccessRate:
    """Count as `count` does, from what `episode_entries` wrote down."""
    outcomes = [entry["outcome"] for entry in entries if entry["task"] in tasks]
    crashes = outcomes.count(Outcome.CRASH)
    return SuccessRate(
        successes=outcomes.count(Outcome.SUCCESS),
        episodes=len(outcomes) - crashes,
        crashes=crashes,
    )


def episode_entries(trajectories: Trajectories) -> list[dict[str, Any]]:
    """Where each episode began and how it ended, as plain values in the order of the episodes.

    ``crash`` is why the simulator was lost, else None.
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
