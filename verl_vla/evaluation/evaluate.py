"""Evaluation: success rate per task with its interval, on fixed held-out starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from verl_vla.core.episode import EpisodeSpec, Start
from verl_vla.core.success_rate import SuccessRate, count
from verl_vla.core.tables import Trajectories
from verl_vla.policies.base import Policy
from verl_vla.rl.rollout import NoiseSource, RolloutTimes, Simulators, rollout

EVALUATION_STREAM = 1
"""Stream of the noise source; training uses stream 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The result of one evaluation."""

    total: SuccessRate
    per_task: dict[int, SuccessRate]
    """Success rates by task id."""
    trajectories: Trajectories
    """Trajectories in the order of the starts."""

    def as_metrics(self, task_names: dict[int, str], suffix: str = "") -> dict[str, float]:
        """Return the numbers under the names of `verl_vla.runs.metrics`.

        Args:
            task_names: names of the tasks, by task id.
            suffix: last part of the names; with one there are no metrics of single tasks.
        """
        low, high = self.total.ci95
        pooled = {
            f"val/success_rate{suffix}": self.total.rate,
            f"val/episodes{suffix}": float(self.total.episodes),
            f"val/ci_low{suffix}": low,
            f"val/ci_high{suffix}": high,
        }
        if suffix:
            return pooled
        tasks = {f"val/task/{task_names[t]}": rate.rate for t, rate in self.per_task.items()}
        return pooled | tasks


def evaluate(
    starts: Sequence[Start],
    policy: Policy,
    simulators: Simulators,
    *,
    temperature: float,
    seed: int,
    times: RolloutTimes | None = None,
    first_episode: int = 0,
    ended: Callable[[Trajectories], None] | None = None,
) -> Evaluation:
    """Roll out every start once and count the successes.

    Args:
        starts: fixed held-out starts; the same list gives comparable numbers.
        policy: the policy to evaluate.
        simulators: a pool whose slots are all free.
        temperature: sampling temperature; 0 is greedy.
        seed: seed of the sampling noise; greedy episodes do not use it.
        times: if given, the seconds spent are added to it.
        first_episode: id of the first episode; episodes of another id have other noise.
        ended: see `verl_vla.rl.rollout.rollout`.
    """
    # each start is a group of its own: an evaluation compares no episodes with each other
    specs = [
        EpisodeSpec(
            task_id=start.task_id, init_state_id=start.init_state_id, group_id=i, episode_id=i
        )
        for i, start in enumerate(starts, first_episode)
    ]
    trajectories = rollout(
        specs,
        policy,
        simulators,
        temperature=temperature,
        noise=NoiseSource(seed=seed, stream=EVALUATION_STREAM),
        times=times,
        ended=ended,
    )
    tasks = sorted({start.task_id for start in starts})
    return Evaluation(
        total=count(trajectories, tasks),
        per_task={task: count(trajectories, [task]) for task in tasks},
        trajectories=trajectories,
    )
